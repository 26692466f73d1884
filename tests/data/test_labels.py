import pytest

from lightning_compress.data.labels import LabelSpace, infer_label_space


def test_whole_numbers_are_class_numbers():
    space = infer_label_space(["0", "2", 1, 1.0], "the file")
    assert space == LabelSpace(3)
    assert space.encode(["2", 0], "the file") == [2, 0]


def test_words_are_class_names_in_alphabetical_order():
    space = infer_label_space(["spam", "ham", "spam"], "the file")
    assert (space.num_labels, space.names) == (2, ("ham", "spam"))
    assert space.encode(["spam", "ham"], "the file") == [1, 0]


def test_a_data_set_s_own_names_are_kept_for_numbers_and_for_names():
    assert infer_label_space([1, 0], "x", names=("no", "yes")).encode([1], "x") == [1]
    assert infer_label_space(["yes", "no"], "x", names=("no", "yes")).encode(["yes"], "x") == [1]


def test_regression_takes_real_numbers():
    space = infer_label_space(["0.5", "3"], "the file", regression=True)
    assert space.num_labels == 1
    assert space.encode(["0.5", 3], "the file") == [0.5, 3.0]


def test_more_classes_than_seen_can_be_announced():
    assert infer_label_space(["0", "1"], "the file", num_classes=5).num_labels == 5


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["0", ""], {}, "the file, row 2: the label is missing"),
        (["0", None], {}, "the file, row 2: the label is missing"),
        (["0", "spam"], {}, "row 2: label 'spam' is not a whole number while other labels are"),
        (["0.5", "1.5"], {}, "are real numbers; set `regression=True`"),
        (["spam", "spam"], {}, "every label is 'spam'"),
        (["a", "b", "c"], {"num_classes": 2}, "holds 3 different labels"),
    ],
)
def test_labels_that_make_no_classes_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        infer_label_space(values, "the file", **options)


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (LabelSpace(2), "-1", r"row 2: label -1 is outside the range 0\.\.1.*`num_classes`"),
        (LabelSpace(2), "2", r"row 2: label 2 is outside the range 0\.\.1"),
        (LabelSpace(2), "x", "row 2: label 'x' is not a whole number"),
        (
            LabelSpace(2, ("0", "1"), is_named=True),
            "x",
            r"label 'x' is none of the training labels \['0', '1'\]",
        ),
        (LabelSpace(1, is_regression=True), "nan", "label 'nan' is not a finite number"),
    ],
)
def test_a_label_outside_the_space_is_refused_with_its_row(space, value, message):
    with pytest.raises(ValueError, match=message):
        space.encode(["0", value], "the file")

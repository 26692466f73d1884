import datasets
import numpy as np
import pytest

from lightning_compress.data import sources
from lightning_compress.data.sources import Part, TextParts, load_dataset_parts, split_off, take

TABLE = {"text": list("abcdefgh"), "label": [0, 1] * 4}


@pytest.fixture
def saved(tmp_path) -> str:
    """A data set folder with a training and a development part and named classes."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict(TABLE, features=features)
    datasets.DatasetDict({"train": rows, "dev": rows.select(range(2))}).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_a_saved_folder_gives_its_parts_with_class_names(saved):
    parts = load_dataset_parts(saved)
    assert parts["train"].columns == TABLE
    assert parts["train"].label_names == ("no", "yes")
    assert parts["validation"].columns["text"] == ["a", "b"]


def test_a_single_saved_data_set_is_the_training_part(tmp_path):
    datasets.Dataset.from_dict(TABLE).save_to_disk(str(tmp_path / "one"))
    assert list(load_dataset_parts(str(tmp_path / "one"))) == ["train"]


def test_a_hub_name_is_loaded_by_datasets_with_its_configuration(monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict(TABLE)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_dataset_parts("owner/reviews", "small")["test"].columns == TABLE
    assert asked == [("owner/reviews", "small")]


def test_a_hub_name_that_cannot_be_loaded_is_said(monkeypatch):
    def fail(name, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="could it be loaded from the Hugging Face hub: no network"):
        load_dataset_parts("owner/reviews")


def test_an_empty_part_is_refused(monkeypatch):
    empty = datasets.Dataset.from_dict({"text": [], "label": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict({"train": empty}))
    with pytest.raises(ValueError, match="part 'train' of the hub data set 'owner/reviews' is empty"):
        load_dataset_parts("owner/reviews")


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\n")
    with pytest.raises(ValueError, match=r"is not a data set folder.*it holds: a\.tsv"):
        load_dataset_parts(str(tmp_path))
    with pytest.raises(ValueError, match="is a file; give it as `train=`"):
        load_dataset_parts(str(tmp_path / "a.tsv"))
    with pytest.raises(ValueError, match="does not exist"):
        load_dataset_parts(str(tmp_path / "nothing"))


def test_splitting_off_divides_the_rows_by_the_seed():
    rest, share = split_off(Part(TABLE, "it"), 0.25, seed=1)
    assert (len(rest), len(share)) == (6, 2)
    assert sorted(rest.columns["text"] + share.columns["text"]) == TABLE["text"]
    assert split_off(Part(TABLE, "it"), 0.25, seed=1)[1].columns == share.columns
    assert split_off(Part(TABLE, "it"), 0.25, seed=2)[1].columns != share.columns
    with pytest.raises(ValueError, match="too few to split"):
        split_off(take(Part(TABLE, "it"), np.array([0])), 0.25, seed=1)


def test_the_validation_part_is_split_off_before_the_subset_is_taken(reviews):
    parts = TextParts({"train": reviews}, validation_ratio=0.25, limit_train=6)
    train, validation = parts.find("train"), parts.find("validation")
    assert (len(train), len(validation)) == (6, 10)
    assert TextParts({"train": reviews}, validation_ratio=0.25, limit_train=6).find("train") == train


def test_the_validation_part_can_be_asked_for_first_and_can_be_absent(reviews):
    assert len(TextParts({"train": reviews}).find("validation")) == 4
    assert TextParts({"train": reviews}, validation_ratio=0).find("validation") is None


def test_prediction_falls_back_to_the_test_part(reviews):
    assert TextParts({"test": reviews}).find("predict").where.startswith("the test file")
    assert TextParts({"test": None, "train": reviews}).find("predict") is None


def test_a_file_is_read_only_when_asked_for(reviews):
    parts = TextParts({"train": reviews, "test": "missing.tsv"})
    assert len(parts.find("train")) == 36
    with pytest.raises(ValueError, match="does not exist"):
        parts.find("test")


def test_the_standard_library_is_harvested_only_if_it_is_used(reviews, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "load_stdlib_docs", lambda: calls.append(1) or {"train": TABLE})
    TextParts({"train": reviews}).prepare()
    assert calls == []
    TextParts({}).prepare()
    assert calls == [1]
    assert len(TextParts({}).find("train").label_names) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_ratio": 1.0}, r"`validation_ratio` must be in \[0, 1\), got 1.0"),
        ({"limit_train": 0}, "`limit_train` must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextParts({}, **options)

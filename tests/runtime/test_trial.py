import pytest
import torch

from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.trial import (
    DialPoint,
    Trial,
    check_batch,
    is_regression,
    kept_counts,
    score_of,
)
from tests.toys_dropping import dropping_bert, ragged_batch


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="there are no batches"):
        Trial(dropping_bert(), [])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(1, 2),), "a batch is a tuple"),
        ({"input_ids": torch.ones(1, 2)}, r"\['input_ids'\] but no 'labels'"),
    ],
)
def test_a_batch_that_cannot_be_scored_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch)
    with pytest.raises(ValueError, match=message):
        Trial(dropping_bert(), [batch])


def test_several_labels_at_once_need_a_score():
    model = dropping_bert(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="score=function"):
        Trial(model, [ragged_batch([3])])


def test_a_model_of_one_output_or_so_declared_answers_with_numbers():
    assert is_regression(dropping_bert(num_labels=1))
    assert is_regression(dropping_bert(num_labels=2, problem_type="regression"))
    assert not is_regression(dropping_bert(num_labels=2))


def test_the_score_of_a_point_without_labels_is_not_asked_for():
    assert score_of(DialPoint(1.0, 0.5, 0.7, (1.0,))) == 0.5
    with pytest.raises(AssertionError, match="batches have labels"):
        score_of(DialPoint(1.0, None, 0.7, (1.0,)))


def test_a_failing_pass_leaves_the_dial_alone():
    model = dropping_bert()
    trial = Trial(model, [ragged_batch([3])], score=lambda logits, labels: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trial.at(7.0)
    assert packed_encoder(model).policy.scale == 1.0


def test_constant_answers_correlate_with_nothing():
    model = dropping_bert(num_labels=1)
    torch.nn.init.zeros_(model.classifier.weight)
    batch = ragged_batch([5, 3])
    assert Trial(model, [{**batch, "labels": torch.tensor([0.5, 1.5])}]).at(1.0).score == 0.0


def test_kept_counts_are_those_of_the_latest_pass():
    model = dropping_bert()
    encoder = packed_encoder(model)
    encoder.policy.scale.zero_()
    model(**ragged_batch([5, 2]))
    assert kept_counts(encoder).tolist() == [[5, 5], [2, 2]]

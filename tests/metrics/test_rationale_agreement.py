"""Shape legend: B examples, T padded length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric

from lightning_compress.metrics import RationaleAgreement

NAMES = {"false_positive_rate", "precision", "recall", "token_f1", "iou_f1", "average_precision", "auprc"}


def mask(*rows: str) -> Tensor:
    """``"x.x"`` becomes True, False, True."""
    return torch.tensor([[character == "x" for character in row] for row in rows])


def agreement(*updates: tuple[Tensor, ...]) -> dict[str, float]:
    metric = RationaleAgreement()
    for update in updates:
        metric.update(*update)
    return {name: value.item() for name, value in metric.compute().items()}


def test_every_value_by_hand():
    keep_BT = mask("xxx...x", ".x.....")
    rationale_BT = mask("xxx.xx.", "x......")
    valid_BT = mask(".xxxxx.", "xxxx...")
    scores_BT = torch.tensor([[9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 9.0], [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    values = agreement((keep_BT, rationale_BT, valid_BT, scores_BT))
    # first example, places 1 to 5: keeps 1 2 of the rationale 1 2 4 5; second, places 0 to 3: keeps 1, rationale 0
    assert values.keys() == NAMES
    assert values["false_positive_rate"] == pytest.approx(1 / (1 + 3))
    assert values["precision"] == pytest.approx(2 / 3)
    assert values["recall"] == pytest.approx(2 / 5)
    assert values["token_f1"] == pytest.approx((2 * 2 / (2 + 4) + 0) / 2)
    # spans: the first keeps 1 run that matches 1 of 2; the second keeps 1 that matches none of 1
    precision, recall = (1 + 0) / 2, (1 / 2 + 0) / 2
    assert values["iou_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    first = (1 + 1 + 3 / 4 + 4 / 5) / 4
    assert values["average_precision"] == pytest.approx((first + 1 / 2) / 2)


def test_rates_are_ratios_of_totals_and_the_rest_are_means_over_examples():
    perfect = (mask("x.........."), mask("x.........."), mask("xxxxxxxxxxx"))
    wrong = (mask(".x"), mask("x."), mask("xx"))
    values = agreement(perfect, wrong)
    assert values["false_positive_rate"] == pytest.approx(1 / 11)
    assert values["token_f1"] == values["iou_f1"] == 0.5


def test_examples_without_rationale_count_in_the_rates_only():
    values = agreement((mask("x.", "x."), mask("x.", ".."), mask("xx", "xx"), torch.tensor([[2.0, 1.0]] * 2)))
    assert values["false_positive_rate"] == pytest.approx(1 / 3)
    assert values["token_f1"] == values["iou_f1"] == values["average_precision"] == 1.0


def test_an_example_that_keeps_nothing_has_recall_zero_and_no_span_precision():
    one, nothing = mask("x."), mask("..")
    values = agreement((torch.cat([one, nothing]), torch.cat([one, one]), mask("xx", "xx")))
    assert values["token_f1"] == 0.5
    assert values["iou_f1"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert agreement((nothing, one, mask("xx")))["iou_f1"] == 0.0


def test_without_scores_the_areas_are_not_numbers_and_an_empty_batch_changes_nothing():
    empty = torch.zeros(0, 2, dtype=torch.bool)
    values = agreement((mask("x."), mask("x."), mask("xx")), (empty, empty, empty, torch.zeros(0, 2)))
    areas = torch.tensor([values["average_precision"], values["auprc"]])
    assert areas.isnan().all()
    assert values["token_f1"] == 1.0


def test_processes_are_merged_and_reset_forgets_them():
    first, second = RationaleAgreement(), RationaleAgreement()
    first.update(mask("x."), mask("x."), mask("xx"))
    second.update(mask(".x"), mask("x."), mask("xx"))
    first.merge_state(second)
    assert first.compute()["token_f1"].item() == 0.5
    assert first.compute()["false_positive_rate"].item() == 0.5
    first.reset()
    assert first.examples.item() == 0
    assert isinstance(first, Metric)


BITS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=8)


@given(st.lists(BITS, min_size=1, max_size=4), st.integers(0, 3))
def test_padding_and_batching_change_nothing(examples, more):
    length = max(map(len, examples)) + more
    padded = [[*example, *[(True, True, 9)] * (length - len(example))] for example in examples]
    columns = [torch.tensor([[token[i] for token in example] for example in padded]) for i in range(3)]
    valid_BT = torch.tensor([[place < len(example) for place in range(length)] for example in examples])
    together = agreement((columns[0], columns[1], valid_BT, columns[2].float()))
    singles = []
    for example in examples:
        keep, rationale, scores = (torch.tensor([[token[i] for token in example]]) for i in range(3))
        singles.append((keep, rationale, torch.ones_like(keep), scores.float()))
    assert together == pytest.approx(agreement(*singles), nan_ok=True, abs=1e-6)
    defined = torch.tensor(list(together.values()))
    assert bool(((defined >= 0) & (defined <= 1 + 1e-6) | defined.isnan()).all())


@given(st.lists(BITS, min_size=1, max_size=4))
def test_the_rates_equal_those_of_a_count_token_by_token(examples):
    keep_rationale = [(keep, rationale) for example in examples for keep, rationale, _ in example]
    count = {
        pair: keep_rationale.count(pair)
        for pair in [(True, True), (True, False), (False, True), (False, False)]
    }
    updates = [
        (torch.tensor([[t[0] for t in example]]), torch.tensor([[t[1] for t in example]]))
        for example in examples
    ]
    values = agreement(*[(keep, rationale, torch.ones_like(keep)) for keep, rationale in updates])
    false_positives, negatives = count[True, False], count[True, False] + count[False, False]
    if negatives:
        assert values["false_positive_rate"] == pytest.approx(false_positives / negatives)
    if count[True, True] + count[True, False]:
        kept = count[True, True] + count[True, False]
        assert values["precision"] == pytest.approx(count[True, True] / kept)
    if count[True, True] + count[False, True]:
        assert values["recall"] == pytest.approx(count[True, True] / (count[True, True] + count[False, True]))


def test_masks_that_are_not_boolean_are_refused():
    with pytest.raises(TypeError, match=r"keep_BT must be boolean, .* scores go into scores_BT"):
        RationaleAgreement().update(torch.ones(1, 2), mask("x."), mask("xx"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((mask("x."), mask("x.."), mask("xx")), r"must be \[B, T\].*\[1, 2\], \[1, 3\], \[1, 2\]"),
        ((mask("x.")[0], mask("x.")[0], mask("xx")[0]), r"must be \[B, T\]"),
        ((mask("x."), mask("x."), mask("xx"), torch.ones(1, 3)), r"must be \[B, T\]"),
        ((mask("x."), mask("x."), mask("xx"), torch.tensor([[1.0, -torch.inf]])), "must be finite"),
    ],
)
def test_shapes_that_differ_and_scores_that_are_not_finite_are_refused(tensors, message):
    metric = RationaleAgreement()
    with pytest.raises(ValueError, match=message):
        metric.update(*tensors)
    assert metric.true_positives.item() == 0

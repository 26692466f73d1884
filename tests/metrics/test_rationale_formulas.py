"""Shape legend: B examples, T padded length."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.metrics.rationale_formulas import areas_under_curve, span_matches, token_f1

TOKENS = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=12
)


def mask(*rows: str) -> Tensor:
    """``"x.x"`` becomes True, False, True."""
    return torch.tensor([[character == "x" for character in row] for row in rows])


def slow_curve(scores: list[float], truths: list[bool]) -> list[tuple[float, float]]:
    """Recall and precision of everything that scores at least as much, threshold by threshold."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = [truth for score, truth in zip(scores, truths, strict=True) if score >= threshold]
        points.append((sum(chosen) / sum(truths), sum(chosen) / len(chosen)))
    return points


def slow_areas(scores: list[float], truths: list[bool]) -> tuple[float, float]:
    average_precision = auprc = last_recall = 0.0
    last_precision = 1.0
    for recall, precision in slow_curve(scores, truths):
        average_precision += (recall - last_recall) * precision
        auprc += (recall - last_recall) * (precision + last_precision) / 2
        last_recall, last_precision = recall, precision
    return average_precision, auprc


def slow_spans(inside: list[bool]) -> list[set[int]]:
    spans: list[set[int]] = []
    for place, is_inside in enumerate(inside):
        if is_inside and place and inside[place - 1]:
            spans[-1].add(place)
        elif is_inside:
            spans.append({place})
    return spans


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall():
    f1_B = token_f1(mask("xxx.", "x...", "...."), mask("..xx", "x...", "x..."))
    precision, recall = 1 / 3, 1 / 2
    assert f1_B.tolist() == pytest.approx([2 * precision * recall / (precision + recall), 1.0, 0.0])
    assert token_f1(mask("..."), mask("...")).isnan().all()


def test_areas_under_curve_by_hand():
    # ranked: hit, miss, hit, miss -> precision 1, 1/2, 2/3, 1/2 at recall 1/2, 1/2, 1, 1
    areas = areas_under_curve(torch.tensor([[4, 3, 2, 1]]), mask("x.x."), mask("xxxx"))
    assert areas.average_precision_B.tolist() == pytest.approx([1 / 2 + 1 / 2 * 2 / 3])
    assert areas.auprc_B.tolist() == pytest.approx([1 / 2 + 1 / 2 * (1 / 2 + 2 / 3) / 2])


def test_tokens_of_equal_score_are_one_point_of_the_curve_whatever_their_order():
    rationale_BT = mask("x...", "...x")
    areas = areas_under_curve(torch.ones(2, 4), rationale_BT, torch.ones_like(rationale_BT))
    assert areas.average_precision_B.tolist() == [0.25, 0.25]
    assert areas.auprc_B.tolist() == [(1 + 0.25) / 2, (1 + 0.25) / 2]


def test_what_stands_at_invalid_tokens_is_not_read():
    scores_BT = torch.tensor([[float("nan"), 2.0, 1.0, 9.0], [0.0, 2.0, 1.0, -9.0]])
    areas = areas_under_curve(scores_BT, mask("x.xx", "..x."), mask(".xx.", ".xx."))
    assert areas.average_precision_B.tolist() == [0.5, 0.5]


def test_examples_without_rationale_have_no_area():
    areas = areas_under_curve(torch.ones(1, 3), mask("..x"), mask("xx."))
    assert areas.average_precision_B.isnan().all() and areas.auprc_B.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.long])
@given(tokens=TOKENS)
def test_areas_equal_those_of_a_slow_count_over_thresholds(dtype, tokens):
    truths, valid, _, scores = (list(column) for column in zip(*tokens, strict=True))
    kept = [place for place, is_valid in enumerate(valid) if is_valid]
    areas = areas_under_curve(
        torch.tensor([scores], dtype=dtype), torch.tensor([truths]), torch.tensor([valid])
    )
    if not any(truths[place] for place in kept):
        assert math.isnan(areas.average_precision_B.item())
        return
    slow = slow_areas([scores[place] for place in kept], [truths[place] for place in kept])
    assert (areas.average_precision_B.item(), areas.auprc_B.item()) == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize(
    ("keep", "rationale", "matched"),
    [
        ("xx....", "xxxx..", 1),  # 2 of 4: just enough
        ("xx....", "xxxxx.", 0),
        ("xxxx..", "..xxxx", 0),
        ("x.x.x.", "x.x.x.", 3),
        ("xxxxxx", "xx.xxx", 1),  # 3 of 6
        ("......", "xx....", 0),
    ],
)
def test_runs_match_at_an_intersection_over_union_of_one_half(keep, rationale, matched):
    assert span_matches(mask(keep), mask(rationale)).matched_B.tolist() == [matched]


def test_runs_end_with_their_example():
    spans = span_matches(mask("..xx", "xx.x"), mask("...x", "x..x"))
    assert spans.kept_B.tolist() == [1, 2]
    assert spans.rationale_B.tolist() == [1, 2]
    assert spans.matched_B.tolist() == [1, 2]


@given(st.lists(TOKENS, min_size=1, max_size=3), st.sampled_from([0.5, 0.7, 1.0]))
def test_matches_equal_those_of_a_slow_comparison_of_all_spans(examples, threshold):
    length = max(map(len, examples))
    padded = [example + [(False, False, False, 0)] * (length - len(example)) for example in examples]
    keep = [[token[0] for token in example] for example in padded]
    rationale = [[token[1] for token in example] for example in padded]
    spans = span_matches(torch.tensor(keep), torch.tensor(rationale), threshold)
    for example in range(len(padded)):
        predicted, true = slow_spans(keep[example]), slow_spans(rationale[example])
        best = [max((len(p & t) / len(p | t) for t in true), default=0.0) for p in predicted]
        slow = (len(predicted), len(true), sum(iou >= threshold for iou in best))
        assert tuple(count_B[example].item() for count_B in spans) == slow

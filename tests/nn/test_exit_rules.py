"""Shape legend: B examples, C classes, D hidden size, K exits."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.nn.exit_rules import make_exit_rule, prediction_entropy

LAYERS = (0, 1, 2)
OFF = {"entropy": 0.0, "max_prob": 1.0, "margin": 1.0, "patience": math.inf, "learned": 0.0}
EAGER = {"entropy": math.log(3) + 1e-6, "max_prob": 1 / 3 - 1e-6, "margin": 0.0, "learned": 1.0}
EACH_RULE = pytest.mark.parametrize("name", OFF)


def rule_of(name, layers=LAYERS, num_labels=3, **changes):
    torch.manual_seed(0)
    return make_exit_rule(name, layers, num_labels=num_labels, hidden_size=4, **changes)


def who(rule, layer, logits, hidden=None):
    logits_BC = torch.as_tensor(logits)
    hidden_BD = torch.zeros(len(logits_BC), 4) if hidden is None else hidden
    return rule.leaves(layer, logits_BC, hidden_BD).tolist()


def slow_entropy(row):
    """In plain Python floats, with classes of probability 0 left out."""
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    shares = [weight / sum(weights) for weight in weights]
    return -sum(share * math.log(share) for share in shares if share > 0)


def test_entropy_of_numbers_worked_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    by_hand = [math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
    assert prediction_entropy(logits).tolist() == pytest.approx(by_hand, abs=1e-6)
    normal = [1.0, by_hand[1] / math.log(2)]
    assert prediction_entropy(logits, normalized=True).tolist() == pytest.approx(normal, abs=1e-6)


@given(st.lists(st.lists(st.floats(-300, 300), min_size=3, max_size=3), min_size=1, max_size=4))
def test_entropy_is_that_of_a_slow_sum_and_in_range(rows):
    found = prediction_entropy(torch.tensor(rows, dtype=torch.float64)).tolist()
    assert found == pytest.approx([slow_entropy(row) for row in rows], abs=1e-9)
    assert all(0.0 <= value <= math.log(3) + 1e-9 for value in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_surest_predictions_have_no_entropy_where_products_underflow(dtype):
    logits = torch.tensor([[0.0, 200.0], [-torch.inf, 0.0]], dtype=dtype)
    found = prediction_entropy(logits)
    assert found.tolist() == pytest.approx([0.0, 0.0], abs=1e-80)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rule = rule_of("entropy", num_labels=2, threshold=1e-6)
    rule.start(2, "cpu")
    assert who(rule, 0, logits) == [True, True]


def test_each_rule_against_numbers_worked_by_hand():
    logits = torch.tensor(
        [[0.0, 0.0, math.log(2)], [0.0, 0.0, math.log(98)]]
    )  # 1/4 1/4 1/2 and 1/100 1/100 98/100
    measured = {
        "entropy": [1.5 * math.log(2), -0.02 * math.log(0.01) - 0.98 * math.log(0.98)],
        "max_prob": [0.5, 0.98],
        "margin": [0.25, 0.97],
    }
    for name, expected in measured.items():
        rule = rule_of(name)
        found = rule.measure(0, logits, torch.empty(2, 4))
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
        rule.threshold.fill_(sum(expected) / 2)
        rule.start(2, "cpu")
        assert who(rule, 0, logits) == [False, True]


def test_two_classes_leave_in_the_same_order_by_entropy_probability_and_margin():
    logits = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nothing = torch.empty(40, 4)
    entropy, probability, margin = (
        rule_of(name, num_labels=2).measure(0, logits, nothing) for name in ("entropy", "max_prob", "margin")
    )
    assert entropy.argsort().tolist() == probability.argsort(descending=True).tolist()
    torch.testing.assert_close(margin, 2 * probability - 1)


@pytest.mark.parametrize(("name", "tie"), [("entropy", math.log(2)), ("max_prob", 0.5), ("margin", 0.0)])
def test_an_example_exactly_at_the_threshold_stays(name, tie):
    rule = rule_of(name, num_labels=2, threshold=tie)
    rule.threshold = rule.measure(0, torch.zeros(1, 2), torch.empty(1, 4))[0]
    rule.start(2, "cpu")
    assert who(rule, 0, [[0.0, 0.0], [0.0, 0.1]]) == [False, True]


@EACH_RULE
def test_by_default_nobody_leaves_and_no_exit_has_to_run(name):
    rule = rule_of(name)
    assert rule.threshold.item() == OFF[name]
    rule.start(2, "cpu")
    for layer in LAYERS:
        assert not rule.is_asked(layer)
        assert who(rule, layer, [[0.0, 0.0, 900.0]] * 2, torch.full((2, 4), -90.0)) == [False, False]


@pytest.mark.parametrize("name", EAGER)
def test_logits_or_states_that_are_no_numbers_never_leave(name):
    rule = rule_of(name, threshold=EAGER[name])
    rule.start(4, "cpu")
    logits = [[0.0, 1.0, torch.nan], [torch.nan] * 3, [torch.inf, torch.inf, 0.0], [0.0, 3.0, 0.0]]
    hidden = torch.zeros(4, 4)
    if name == "learned":
        hidden[2] = torch.nan
    assert who(rule, 0, logits, hidden) == [False, False, False, True]


def test_logits_that_are_no_numbers_try_patience_anew():
    rule = rule_of("patience", threshold=1)
    rule.start(1, "cpu")
    lost = [[torch.nan, 0.0, 0.0]]
    assert [who(rule, layer, lost) for layer in LAYERS] == [[False]] * 3


def test_patience_counts_exits_in_a_row_for_each_example():
    said = torch.tensor(
        [[0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 0, 1, 1], [2, 2, 0, 0, 0]]
    )  # examples by exits
    logits = torch.nn.functional.one_hot(said, 3).double()
    for patience in (1, 2, 3):
        rule = rule_of("patience", layers=range(5), threshold=patience)
        rule.start(4, "cpu")
        left, there = {}, torch.arange(4)
        for layer in range(5):
            leaves = rule.leaves(layer, logits[there, layer], torch.zeros(len(there), 4))
            left.update({int(example): layer for example in there[leaves]})
            rule.keep(~leaves)
            there = there[~leaves]
        assert left == slow_patience(said.tolist(), patience)
    assert left == {0: 3, 1: 4}


def slow_patience(said, patience):
    left = {}
    for example, answers in enumerate(said):
        runs = [
            layer
            for layer in range(patience, len(answers))
            if len(set(answers[layer - patience : layer + 1])) == 1
        ]
        left.update({example: runs[0]} if runs else {})
    return left


def test_numbers_are_the_same_within_the_tolerance():
    rule = rule_of("patience", num_labels=1, threshold=1, tolerance=0.25)
    rule.start(3, "cpu")
    assert who(rule, 0, [[1.0], [1.0], [1.0]]) == [False] * 3
    assert who(rule, 1, [[1.125], [1.25], [0.9]]) == [True, False, True]


def test_a_new_pass_forgets_the_one_before():
    rule = rule_of("patience", threshold=1)
    for _ in range(2):
        rule.start(1, "cpu")
        assert who(rule, 0, [[0.0, 0.0, 1.0]]) == [False]
        assert who(rule, 1, [[0.0, 0.0, 1.0]]) == [True]


def test_the_learned_rule_is_one_linear_layer_for_all_exits():
    rule = rule_of("learned", threshold=0.5)
    assert sum(parameter.numel() for parameter in rule.parameters()) == 5
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    weight, bias = rule.guess.weight[0].tolist(), rule.guess.bias.item()
    by_hand = [
        1 / (1 + math.exp(-bias - sum(w * x for w, x in zip(weight, row, strict=True))))
        for row in hidden.tolist()
    ]
    for layer in LAYERS:
        assert rule.measure(layer, torch.zeros(6, 1), hidden).tolist() == pytest.approx(by_hand, abs=1e-6)
    rule.start(6, "cpu")
    assert who(rule, 0, torch.zeros(6, 1), hidden) == [value < 0.5 for value in by_hand]
    assert len(set(who(rule, 0, torch.zeros(6, 1), hidden))) == 2


@pytest.mark.parametrize("name", ["entropy", "max_prob", "margin"])
def test_rules_that_compare_classes_refuse_regression(name):
    with pytest.raises(ValueError, match=r"compares classes.*rule='patience' or rule='learned'"):
        rule_of(name, num_labels=1)
    rule = rule_of(name, threshold=0.5)
    rule.start(1, "cpu")
    with pytest.raises(ValueError, match="compares classes"):
        who(rule, 0, [[1.0]])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("entropy", {"threshold": -1.0}, r"threshold=-1.0 .* outside \[0, 1.099\]"),
        (
            "entropy",
            {"threshold": 1.2},
            "what it measures of 3 classes: give one inside; 0 lets nobody leave",
        ),
        (
            "entropy",
            {"threshold": 0.7, "num_labels": 2},
            r"outside \[0, 0.6931\], what it measures of 2 classes",
        ),
        ("entropy", {"threshold": -1.0, "num_labels": None}, r"outside \[0, inf\], what it measures: give"),
        ("entropy", {"threshold": 1.5, "normalized": True}, r"outside \[0, 1\]"),
        ("entropy", {"threshold": math.nan}, "threshold=nan"),
        ("max_prob", {"threshold": 1.01}, r"outside \[0.3333, 1\], .*; 1 lets nobody"),
        ("max_prob", {"threshold": 0.3}, r"outside \[0.3333, 1\], .*; 1 lets nobody"),
        ("margin", {"threshold": -0.1}, r"outside \[0, 1\]"),
        ("learned", {"threshold": 2.0}, r"outside \[0, 1\], .*; 0 lets nobody"),
        ("patience", {"threshold": 0}, "whole number of exits"),
        ("patience", {"threshold": 1.5}, "whole number of exits"),
        (
            "patience",
            {"threshold": 1, "layers": [0]},
            "more than can agree .* of 1 exits, 0: give a smaller one",
        ),
        ("patience", {"tolerance": 0.0}, "tolerance=0.0 must be above 0"),
        ("energy", {}, "'energy' is no exit rule: choose one of"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        rule_of(name, **settings)


@pytest.mark.parametrize("num_labels", [2, 3, 7, 150])
@pytest.mark.parametrize("name", ["entropy", "max_prob"])
def test_a_bound_may_be_passed_by_so_little_that_the_least_sure_example_leaves(name, num_labels):
    rule = rule_of(name, num_labels=num_labels)
    beyond = rule.nearest(math.inf if name == "entropy" else 0.0)
    assert beyond == rule.checked(beyond) != 0.0
    bound = math.log(num_labels) if name == "entropy" else 1 / num_labels
    assert abs(beyond - bound) < 1e-5 * (1 + bound)
    rule.threshold.fill_(beyond)
    rule.start(1, "cpu")
    assert who(rule, 0, [[0.0] * num_labels]) == [True]


def test_patience_may_be_as_long_as_there_are_exits_to_agree():
    assert rule_of("patience", layers=[0, 2, 3], threshold=2).threshold == 2
    with pytest.raises(ValueError, match="of 3 exits, 2: give a smaller one, or more exits; inf lets nobody"):
        rule_of("patience", layers=[0, 2, 3], threshold=3)
    assert rule_of("patience", layers=[0], threshold=math.inf).asked_layers() == []


def test_the_learned_rule_needs_a_width():
    with pytest.raises(ValueError, match="give hidden_size"):
        make_exit_rule("learned", [0], num_labels=2)


@EACH_RULE
def test_copies_and_pickles_forget_the_running_pass(name):
    rule = rule_of(name)
    rule.start(1, "cpu")
    who(rule, 0, [[0.0, 0.0, 1.0]])
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(twin.threshold, rule.threshold)
        with pytest.raises(RuntimeError, match="outside a pass"):
            twin.is_asked(0)

"""What all exit rules have in common."""

import pytest
import torch

from lightning_compress.nn.exit_policy import ExitRule
from lightning_compress.nn.exit_rules import EntropyRule, LearnedRule, MaxProbRule, PatienceRule

SURE = torch.tensor([[0.0, 9.0]])
STATES = torch.zeros(1, 4)


def test_threshold_and_asked_exits_are_saved_and_can_be_changed_after_loading():
    rule = EntropyRule([0, 3], threshold=0.25)
    rule.is_checked_K[1] = False
    fresh = EntropyRule([0, 3])
    fresh.load_state_dict(rule.state_dict())
    assert list(fresh.state_dict()) == ["threshold", "is_checked_K"]
    fresh.start(1, "cpu")
    assert [fresh.is_asked(layer) for layer in range(5)] == [True, False, False, False, False]
    assert fresh.leaves(0, SURE, STATES).tolist() == [True]
    assert fresh.leaves(3, SURE, STATES).tolist() == [False]
    fresh.threshold.fill_(0.0)
    fresh.start(1, "cpu")
    assert fresh.leaves(0, SURE, STATES).tolist() == [False]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_the_threshold_exact(cast):
    rule = MaxProbRule([0], threshold=0.999)
    exact = rule.threshold.item()
    model = torch.nn.Sequential(rule, LearnedRule([0], 4, threshold=0.001)).to(cast)
    assert rule.threshold.item() == exact < 1.0
    assert rule.threshold.dtype == torch.float32
    assert model[1].guess.weight.dtype == cast


def test_a_rule_can_wait_without_memory_for_its_values():
    with torch.device("meta"):
        rule = EntropyRule([0], threshold=0.5)
    rule.to(torch.bfloat16).to_empty(device="cpu").load_state_dict(EntropyRule([0], 0.999).state_dict())
    assert rule.threshold.item() == EntropyRule([0], 0.999).threshold.item() != 1.0


@pytest.mark.parametrize(("rule", "is_stateful"), [(EntropyRule([0]), False), (PatienceRule([0]), True)])
def test_only_patience_looks_back(rule, is_stateful):
    assert isinstance(rule, ExitRule)
    assert rule.looks_back is is_stateful


def test_asking_outside_a_pass_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"call start\(batch_size, device\) first"):
        EntropyRule([0]).leaves(0, SURE, STATES)


@pytest.mark.parametrize(
    ("rule", "asked"), [(EntropyRule([0, 3], 0.5), [0]), (PatienceRule([0, 3], 1), [0, 3])]
)
def test_a_rule_that_looks_back_asks_every_exit(rule, asked):
    rule.is_checked_K[1] = False
    assert rule.asked_layers() == asked
    rule.start(1, "cpu")
    assert [layer for layer in range(5) if rule.is_asked(layer)] == asked
    rule.threshold.fill_(rule.off)
    assert rule.asked_layers() == []

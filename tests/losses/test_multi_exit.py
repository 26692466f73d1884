"""The exits' losses, by hand and by a slow loop over texts, and the terms of a prepared model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.losses import TERMS, MultiExitLossMixin
from lightning_compress.losses.multi_exit import (
    final_exit_distance,
    guessed_error,
    terms,
)
from lightning_compress.methods import multi_exit
from lightning_compress.nn.label_loss import next_token_loss
from lightning_compress.nn.multi_exit import exit_logits, exit_states
from tests.slow_losses import one_hot, slow_cross_entropy, slow_softmax
from tests.toys import tiny_bert
from tests.toys_dropping import ragged_batch


def handle_of(model: Any = None, **settings: Any) -> Any:
    settings = {"dropout": 0.0, **settings}
    return multi_exit.prepare(model or tiny_bert(num_hidden_layers=4).double(), multi_exit.Config(**settings))


# formulas


def test_the_distance_to_the_final_exit_is_a_sum_of_soft_cross_entropies_and_teaches_only_the_exits() -> None:
    generator = torch.Generator().manual_seed(2)
    exits = {layer: torch.randn(4, 3, generator=generator, requires_grad=True) for layer in (0, 2)}
    final_BC = torch.randn(4, 3, generator=generator, requires_grad=True)
    targets = [slow_softmax(logits_C) for logits_C in final_BC.tolist()]
    distance = final_exit_distance(exits, final_BC)
    expected = sum(slow_cross_entropy(logits_BC, targets) for logits_BC in exits.values())
    assert distance.item() == pytest.approx(expected, abs=1e-5)
    distance.backward()
    assert final_BC.grad is None
    for logits_BC in exits.values():  # of a soft cross-entropy: (p - q) / B
        assert logits_BC.grad is not None
        by_hand = (logits_BC.detach().softmax(-1) - final_BC.detach().softmax(-1)) / 4
        assert torch.allclose(logits_BC.grad, by_hand, atol=1e-6)


def test_the_distance_of_numbers_is_squared() -> None:
    exits = {0: torch.tensor([[1.0]]), 1: torch.tensor([[4.0]])}
    assert final_exit_distance(exits, torch.tensor([[2.0]])).item() == pytest.approx(1 + 4)


def test_a_guess_is_right_where_the_exit_errs() -> None:
    logits_BC = torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 1.0]])
    labels, guess_B = torch.tensor([1, 0, 1, -100]), torch.tensor([0.2, 0.9, 0.5, 0.3])
    expected = (0.2**2 + (0.9 - 1) ** 2 + (0.5 - 1) ** 2) / 3
    assert guessed_error(guess_B, logits_BC, labels).item() == pytest.approx(expected, abs=1e-6)
    numbers = guessed_error(torch.tensor([0.1]), torch.tensor([[2.0]]), torch.tensor([1.5]))
    assert numbers.item() == pytest.approx((0.1 - math.tanh(0.5)) ** 2, abs=1e-6)


# terms


def test_terms_are_the_weighted_sums_over_exits() -> None:
    handle, batch = handle_of(label_weight=0.3, final_weight=0.7), ragged_batch([3, 5, 2])
    out = handle.model(**batch)
    found, exits = terms(handle), exit_logits(handle.model)
    labels = one_hot(batch["labels"].tolist(), 2)
    targets = [slow_softmax(logits_C) for logits_C in out.logits.tolist()]
    assert list(found) == ["labels", "final"] and len(exits) == 3
    hard = sum(slow_cross_entropy(logits_BC, labels) for logits_BC in exits.values())
    soft = sum(slow_cross_entropy(logits_BC, targets) for logits_BC in exits.values())
    assert found["labels"].item() == pytest.approx(0.3 * hard, abs=1e-5)
    assert found["final"].item() == pytest.approx(0.7 * soft, abs=1e-5)
    assert TERMS["multi_exit"] is terms


def test_without_labels_exits_learn_from_the_final_exit_alone() -> None:
    handle, batch = handle_of(), ragged_batch([3, 5])
    handle.model(batch["input_ids"], batch["attention_mask"])
    assert list(terms(handle)) == ["final"]


def test_terms_without_weight_are_left_out_but_processes_that_wait_for_gradients_get_them() -> None:
    handle, batch = handle_of(label_weight=0.0, final_weight=0.0), ragged_batch([3, 5])
    handle.model(**batch)
    found = terms(handle)
    assert {name: term.item() for name, term in found.items()} == {"final": 0.0}
    found["final"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in handle.model.exits.parameters())


def test_the_warm_up_scales_all_terms() -> None:
    handle, batch = handle_of(warmup=0.4), ragged_batch([3, 5])
    for progress, weight, phase in ((0.0, 0.0, "warmup"), (0.1, 0.25, "warmup"), (0.4, 1.0, "joint")):
        multi_exit.update(handle, progress)
        assert (handle.exit_weight, handle.phase) == (pytest.approx(weight), phase)
        handle.model(**batch)
        found = terms(handle)
        handle.exit_weight = 1.0
        assert all(torch.allclose(found[name], weight * term) for name, term in terms(handle).items())


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_learned_rule_learns_from_constants(has_labels: bool) -> None:
    handle, batch = handle_of(rule="learned"), ragged_batch([3, 5, 2, 4])
    labels = batch["labels"] if has_labels else None
    out = handle.model(batch["input_ids"], batch["attention_mask"], labels=labels)
    found = terms(handle)["rule"]
    truth = batch["labels"] if has_labels else out.logits.argmax(-1)
    rule, by_hand = handle.model.exit_rule, []
    for layer, logits_BC in exit_logits(handle.model).items():
        guess_B = rule.guess(exit_states(handle.model)[layer]).sigmoid().flatten()
        by_hand.append(((guess_B - (logits_BC.argmax(-1) != truth).double()) ** 2).mean())
    assert found.item() == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-6)
    found.backward()
    reached = {name for name, p in handle.model.named_parameters() if p.grad is not None}
    assert reached == {"exit_rule.guess.weight", "exit_rule.guess.bias"}


def test_numbers_are_learned_by_every_exit() -> None:
    handle = handle_of(tiny_bert(num_hidden_layers=3, num_labels=1), rule="learned")
    batch = ragged_batch([3, 5])
    out = handle.model(batch["input_ids"], batch["attention_mask"], labels=torch.tensor([0.5, 2.0]))
    found = terms(handle)
    exits = torch.cat(list(exit_logits(handle.model).values()), dim=1).T
    errors = (exits - torch.tensor([0.5, 2.0])).pow(2).mean(1).sum()
    distances = (exits - out.logits.detach().T).pow(2).mean(1).sum()
    assert torch.allclose(found["labels"], 0.5 * errors) and torch.allclose(found["final"], 0.5 * distances)
    assert 0.0 < found["rule"].item() < 1.0


def test_several_labels_per_text_are_refused_when_they_are_seen() -> None:
    handle, batch = handle_of(), ragged_batch([3, 5])
    handle.model(batch["input_ids"], batch["attention_mask"], labels=torch.eye(2).double())
    with pytest.raises(ValueError, match="no class indices"):
        terms(handle)


# decoders


@pytest.mark.parametrize(("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")])
def test_a_decoders_terms_are_those_of_its_early_logits_and_so_are_its_gradients(
    family: str, name: str, tiny: Any
) -> None:
    model: Any = tiny(
        family, name, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3})
    ).double()
    handle = multi_exit.prepare(model, multi_exit.Config(exits=(0, 1), equilibrium=False))
    ids_BT = torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(4))
    mask_BT = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    out = model(ids_BT, attention_mask=mask_BT, labels=labels_BT)
    found, early = terms(handle), exit_logits(model)
    hard = sum(next_token_loss(logits_BTV, labels_BT) for logits_BTV in early.values())
    log_q = out.logits.detach().log_softmax(-1)
    soft = sum(-(log_q.exp() * z.log_softmax(-1)).sum(-1)[mask_BT.bool()].mean() for z in early.values())
    assert torch.allclose(found["labels"].double(), 0.5 * hard.double(), atol=1e-5)
    assert torch.allclose(found["final"].double(), 0.5 * soft, atol=1e-5)
    gradients = []
    for loss in (sum(found.values()), 0.5 * hard + 0.5 * soft):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_the_mixin_hands_out_the_sum_of_the_terms() -> None:
    class Own(MultiExitLossMixin):
        def compression_terms(self, stem: str | None = None) -> dict[str, Tensor]:
            assert stem == "multi_exit"
            return {"multi_exit/labels": torch.tensor(1.5), "multi_exit/final": torch.tensor(2.0)}

    assert float(Own().exit_loss()) == 3.5

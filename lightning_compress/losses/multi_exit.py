"""What MultiExit minimises beside the task loss: the losses of all exits before the last, in one plain sum.

Each exit learns from the labels and from what the model's own head says. No exit outweighs another: gradient
equilibrium (:mod:`lightning_compress.nn.layer_taps`) sees to the layers beneath them. The next chapter is
:mod:`lightning_compress.callbacks.multi_exit`.

Shape legend: B batch, T padded length, D hidden size, C classes, V vocabulary, E exits.

Paper: COST-EFF (arXiv 2210.15523), equations after its official code, specification §2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_compress.losses.base import LossMixin
from lightning_compress.nn.label_loss import IGNORED, label_loss, next_token_loss
from lightning_compress.nn.multi_exit import SharedExits, exit_logits, exit_states, shared_logits
from lightning_compress.nn.soft_label_loss import prediction_distance

__all__ = [
    "TASK_TERMS",
    "MultiExitLossMixin",
    "final_exit_distance",
    "guessed_error",
    "terms",
]

TASK_TERMS = ("labels", "final")
"""Terms that belong to the task, since what they teach comes from no teacher."""


def final_exit_distance(exits: Mapping[int, Tensor], final_BC: Tensor) -> Tensor:
    """Return the sum over exits of the soft cross-entropy to what the last one says, a constant.

    Args:
        exits: Logits ``[B, C]`` by layer; one logit is a number, whose squared distance is taken.
        final_BC: Logits of the model's own head.

    Paper: specification §2.1, ``sum_l SCE(z_l, z_final)``, there with the teacher's last exit.

    Example:
        >>> final_exit_distance({0: torch.zeros(1, 2)}, torch.zeros(1, 2))  # ln 2
        tensor(0.6931)
    """
    kind = "numbers" if final_BC.shape[-1] == 1 else "classes"
    return torch.stack([prediction_distance(logits_BC, final_BC, kind) for logits_BC in exits.values()]).sum()


def guessed_error(guess_B: Tensor, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean squared error of a guess that an exit is wrong: 1 where it is, 0 where it is right.

    A number (one logit) is wrong by ``tanh`` of its error.

    Args:
        guess_B: The guess, in [0, 1].
        logits_BC: What the exit says; a constant.
        labels_B: Classes or numbers; texts with class -100 do not count.

    Paper: specification §8 (BERxiT's learning-to-exit module).

    Example:
        >>> guessed_error(torch.tensor([0.5]), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        tensor(0.2500)
    """
    logits_BC = logits_BC.detach().float()
    if logits_BC.shape[-1] == 1:
        error_B = (logits_BC.flatten() - labels_B.float().flatten()).abs().tanh()
        return F.mse_loss(guess_B.float(), error_B)
    known_B = (labels_B != IGNORED).float()
    wrong_B = (logits_BC.argmax(dim=-1) != labels_B).float()
    return (known_B * (guess_B.float() - wrong_B).pow(2)).sum() / known_B.sum().clamp_min(1.0)


def terms(handle: Any) -> dict[str, Tensor]:
    """Return the weighted terms of a prepared MultiExit handle.

    Without ``labels`` among the arguments of the model's forward, exits learn from the model's own head alone.
    """
    if isinstance(handle.model.exits, SharedExits):
        found = _shared_terms(handle)
    else:
        found = _head_terms(handle)
    return {name: handle.exit_weight * term for name, term in found.items()}


def _head_terms(handle: Any) -> dict[str, Tensor]:
    config, exits = handle.config, exit_logits(handle.model)
    labels, final_BC, weighted = handle.labels, handle.final_logits, {}
    if labels is not None and config.label_weight > 0:
        losses = [label_loss(logits_BC, labels) for logits_BC in exits.values()]
        weighted["labels"] = config.label_weight * torch.stack(losses).sum()
    if config.final_weight > 0:
        weighted["final"] = config.final_weight * final_exit_distance(exits, final_BC)
    if config.rule == "learned":
        weighted["rule"] = _rule_loss(handle, exits, final_BC if labels is None else labels)
    if not weighted:  # DDP waits for a gradient of every parameter
        weighted["final"] = 0.0 * torch.stack([logits_BC.sum() for logits_BC in exits.values()]).sum()
    return weighted


def _rule_loss(handle: Any, exits: Mapping[int, Tensor], truth: Tensor) -> Tensor:
    """Return how well the rule guesses errors, on average over exits; states are constants, so nothing else learns."""
    if truth.dim() == 2:
        truth = truth.detach().flatten() if truth.shape[-1] == 1 else truth.argmax(dim=-1)
    rule, states = handle.model.exit_rule, exit_states(handle.model)
    guesses = {l: rule.measure(l, exits[l].detach(), states[l].detach()) for l in exits}  # noqa: E741
    return torch.stack([guessed_error(guesses[l], exits[l], truth) for l in exits]).mean()  # noqa: E741


def _shared_terms(handle: Any) -> dict[str, Tensor]:
    """Return the terms of a decoder; logits, of the size of the vocabulary, are computed again for the gradient."""
    config = handle.config
    sums = torch.stack(
        [
            checkpoint(
                _shared_losses, handle, hidden_BTD, handle.labels, handle.final_logits, use_reentrant=False
            )  # type: ignore[misc]
            for hidden_BTD in exit_states(handle.model).values()
        ]
    ).sum(dim=0)
    weighted = {}
    if handle.labels is not None and config.label_weight > 0:
        weighted["labels"] = config.label_weight * sums[0]
    if config.final_weight > 0:
        weighted["final"] = config.final_weight * sums[1]
    return weighted


def _shared_losses(handle: Any, hidden_BTD: Tensor, labels_BT: Tensor | None, final_BTV: Tensor) -> Tensor:
    logits_BTV = shared_logits(handle.model, hidden_BTD)
    zero = logits_BTV.new_zeros((), dtype=torch.float32)
    hard = zero if labels_BT is None else next_token_loss(logits_BTV, labels_BT)
    soft = zero
    if handle.config.final_weight > 0:
        soft = prediction_distance(logits_BTV, final_BTV, "classes", weight=handle.real_tokens)
    return torch.stack([hard, soft])


class MultiExitLossMixin(LossMixin):
    """For modules with an objective of their own that want to place the terms themselves."""

    def exit_loss(self) -> Tensor | float:
        """Return the weighted losses of all exits before the last for this step."""
        return sum(self.compression_terms("multi_exit").values(), start=0.0)

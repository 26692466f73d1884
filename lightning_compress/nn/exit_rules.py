"""When an example may leave by an exit: entropy, largest probability, margin, patience, or a learned guess.

A rule measures what an exit says of each example, and compares it with one threshold for all exits. Evaluation in
training form and the packed engine ask the same rule, so they decide alike. The next chapter is
:mod:`lightning_compress.runtime.encoder`, which removes the rows of examples that leave.

Shape legend: B examples that are still there, C classes, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_compress.nn.exit_policy import ExitRule, ExitRuleName

__all__ = [
    "EntropyRule",
    "LearnedRule",
    "MarginRule",
    "MaxProbRule",
    "PatienceRule",
    "make_exit_rule",
    "prediction_entropy",
]


def prediction_entropy(logits_BC: Tensor, *, normalized: bool = False) -> Tensor:
    """Return the entropy of each prediction in nats, ``[B]``; in at least single precision.

    ``H = -sum_c p_c ln p_c`` from 0 (certain) to ``ln C``; a class of probability 0 adds nothing. Not a number where
    a logit is none.

    Args:
        logits_BC: Unnormalised scores of at least two classes.
        normalized: Divide by ``ln C``, so that the range is 0 to 1 for any number of classes.

    Paper: COST-EFF, [code]; the normalised form is FastBERT's.
    Departs from the paper: 0 where ``p`` underflows; the official ``p * log(p)`` is no number there, so that the surest
    examples never leave.

    Example:
        >>> prediction_entropy(torch.tensor([[0.0, 0.0], [0.0, 200.0]]), normalized=True)
        tensor([1., 0.])
    """
    entropy_B = torch.special.entr(_precise(logits_BC).softmax(dim=-1)).sum(dim=-1)
    return entropy_B / math.log(logits_BC.shape[-1]) if normalized else entropy_B


class EntropyRule(ExitRule):
    """Leave where the entropy of the prediction is below the threshold.

    Args:
        layers: See :class:`ExitRule`.
        threshold: In nats, in [0, ln C]; as a share of ``ln C``, in [0, 1], if ``normalized``. None is 0, nobody
            leaves.
        normalized: Whether the entropy is divided by ``ln C``.
        num_labels: See :class:`ExitRule`.

    Paper: COST-EFF §4 of the specification, [code].

    Example:
        >>> rule = EntropyRule([0], threshold=0.5)
        >>> rule.start(2, "cpu")
        >>> rule.leaves(0, torch.tensor([[0.0, 0.0], [0.0, 3.0]]), torch.empty(2, 1)).tolist()
        [False, True]
    """

    name = "entropy"
    off = 0.0
    is_below = True

    def __init__(
        self,
        layers: Sequence[int],
        threshold: float | None = None,
        *,
        normalized: bool = False,
        num_labels: int | None = None,
    ) -> None:
        self.normalized = normalized
        super().__init__(layers, threshold, num_labels=num_labels)

    def measure(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return the entropy."""
        del layer, hidden_BD
        _check_classes(self.name, logits_BC.shape[-1])
        return prediction_entropy(logits_BC, normalized=self.normalized)

    def _range(self) -> tuple[float, float]:
        if self.normalized:
            return 0.0, 1.0
        return 0.0, math.inf if self.num_labels is None else math.log(self.num_labels)


class MaxProbRule(ExitRule):
    """Leave where the largest probability is above the threshold, in [1/C, 1]; None is 1, nobody leaves.

    For two classes this orders examples as the entropy does.

    Paper: COST-EFF §8 of the specification (CascadeBERT, EE-LLM).
    """

    name = "max_prob"
    off = 1.0
    is_below = False

    def measure(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return the largest probability."""
        del layer, hidden_BD
        _check_classes(self.name, logits_BC.shape[-1])
        return _precise(logits_BC).softmax(dim=-1).amax(dim=-1)

    def _range(self) -> tuple[float, float]:
        return 0.0 if self.num_labels is None else 1.0 / self.num_labels, 1.0


class MarginRule(ExitRule):
    """Leave where the two largest probabilities differ by more than the threshold, in [0, 1]; None is 1, nobody leaves.

    Paper: COST-EFF §8 of the specification (CALM).
    """

    name = "margin"
    off = 1.0
    is_below = False

    def measure(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return the largest probability less the second largest."""
        del layer, hidden_BD
        _check_classes(self.name, logits_BC.shape[-1])
        top_B2 = _precise(logits_BC).softmax(dim=-1).topk(2, dim=-1).values
        return top_B2[:, 0] - top_B2[:, 1]


class PatienceRule(ExitRule):
    """Leave after ``threshold`` exits in a row that said the same as the one before; None is infinity, nobody leaves.

    Classes are the same if the largest logit is at the same place; numbers (one logit) if they differ by less than
    ``tolerance``. The first exit that can let anyone go is exit number ``threshold + 1``.

    Args:
        layers: See :class:`ExitRule`.
        threshold: Whole number, at least 1 and below the number of exits.
        tolerance: In the unit of the labels, above 0.

    Raises:
        ValueError: If a number is out of range.

    Paper: COST-EFF §8 of the specification (PABEE).

    Example:
        >>> rule = PatienceRule([0, 1], threshold=1)
        >>> rule.start(2, "cpu")
        >>> says = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> rule.leaves(0, says, says).tolist(), rule.leaves(1, says[:1].expand(2, 2), says).tolist()
        ([False, False], [True, False])
    """

    name = "patience"
    off = math.inf
    is_below = False
    looks_back = True

    def __init__(
        self, layers: Sequence[int], threshold: float | None = None, *, tolerance: float = 0.1
    ) -> None:
        if not (math.isfinite(tolerance) and tolerance > 0.0):
            raise ValueError(f"tolerance={tolerance} must be above 0, in the unit of the labels")
        super().__init__(layers, threshold)
        self.tolerance = tolerance

    def checked(self, threshold: float) -> float:
        """Return a threshold that is in range; raises ValueError if it is not."""
        if not threshold >= 1 or (math.isfinite(threshold) and threshold != int(threshold)):
            raise ValueError(
                f"threshold={threshold} of the exit rule 'patience' must be a whole number of exits in a row, at least "
                "1: inf lets nobody leave early"
            )
        if math.isfinite(threshold) and threshold >= len(self.layers):
            raise ValueError(
                f"threshold={threshold} of the exit rule 'patience' is more than can agree with the one before of "
                f"{len(self.layers)} exits, {len(self.layers) - 1}: give a smaller one, or more exits; inf lets nobody "
                "leave early"
            )
        return float(threshold)

    def start(self, batch_size: int, device: torch.device | str) -> None:
        """Begin a pass: no exit has said anything yet."""
        super().start(batch_size, device)
        self._pass.before_B, self._pass.count_B = None, torch.zeros(batch_size, device=device)

    def measure(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return how many exits in a row, this one included, said the same as the one before."""
        del layer, hidden_BD
        before_B, count_B = self._pass.before_B, self._pass.count_B
        assert count_B is not None, "a pass was started"
        logits_BC = logits_BC.detach()
        is_number = logits_BC.shape[-1] == 1
        says_B = logits_BC[:, 0] if is_number else logits_BC.argmax(dim=-1)
        if before_B is not None:
            same_B = (says_B - before_B).abs() < self.tolerance if is_number else says_B == before_B
            count_B = torch.where(same_B, count_B + 1, 0.0)
        known_B = ~logits_BC.isnan().any(dim=-1)
        self._pass.before_B = says_B
        self._pass.count_B = torch.where(known_B, count_B, 0.0)
        return self._pass.count_B

    def fires(self, measure_B: Tensor, threshold: float) -> Tensor:
        """Return whose count has reached the threshold."""
        return measure_B >= threshold

    def keep(self, stay_B: Tensor) -> None:
        """Forget what exits said of the examples that left."""
        memory = self._pass
        assert memory.count_B is not None, "a pass was started"
        memory.count_B = memory.count_B[stay_B]
        memory.before_B = None if memory.before_B is None else memory.before_B[stay_B]


class LearnedRule(ExitRule):
    """Leave where a learned guess that the exit is wrong is below the threshold, in [0, 1]; None is 0, nobody leaves.

    One linear layer, shared by all exits, reads the state that the exit reads; the only rule besides patience that
    serves regression, for which it guesses the size of the error.

    Args:
        layers: See :class:`ExitRule`.
        hidden_size: Width D of the states.
        threshold: See above.

    Paper: COST-EFF §8 of the specification (BERxiT's learning-to-exit module).

    Example:
        >>> rule = LearnedRule([0], hidden_size=4, threshold=0.6)
        >>> rule.guess.weight.data.zero_().numel()
        4
        >>> rule.start(1, "cpu")
        >>> rule.leaves(0, torch.zeros(1, 2), torch.ones(1, 4)).tolist()  # sigmoid(0) is 0.5
        [True]
    """

    name = "learned"
    off = 0.0
    is_below = True

    def __init__(self, layers: Sequence[int], hidden_size: int, threshold: float | None = None) -> None:
        super().__init__(layers, threshold)
        self.guess = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.guess.bias)

    def measure(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return the guess that the exit is wrong, in [0, 1]; not a number where a logit is none."""
        del layer
        guess_B = _precise(self.guess(hidden_BD)).sigmoid().squeeze(-1)
        return guess_B.masked_fill(logits_BC.isnan().any(dim=-1), torch.nan)


def make_exit_rule(
    name: str,
    layers: Sequence[int],
    *,
    num_labels: int | None,
    threshold: float | None = None,
    normalized: bool = False,
    tolerance: float = 0.1,
    hidden_size: int | None = None,
) -> ExitRule:
    """Return the rule of this name.

    Args:
        name: One of ``"entropy"``, ``"max_prob"``, ``"margin"``, ``"patience"``, ``"learned"``.
        layers: Layers after which there is an exit, ascending, from 0; the last layer is not among them.
        num_labels: Logits C of each exit; 1 is regression. None if they are not known.
        threshold: See the rule; None lets nobody leave.
        normalized: Of ``"entropy"``.
        tolerance: Of ``"patience"``.
        hidden_size: Of ``"learned"``, which needs it.

    Raises:
        ValueError: If the name is unknown, a number is out of range, or the rule compares classes and there is one
            logit only.

    Example:
        >>> make_exit_rule("entropy", [0, 1], num_labels=2, threshold=0.1).threshold
        tensor(0.1000)
    """
    if name in ("entropy", "max_prob", "margin") and num_labels is not None:
        _check_classes(name, num_labels)
    if name == "entropy":
        return EntropyRule(layers, threshold, normalized=normalized, num_labels=num_labels)
    if name == "max_prob":
        return MaxProbRule(layers, threshold, num_labels=num_labels)
    if name == "margin":
        return MarginRule(layers, threshold, num_labels=num_labels)
    if name == "patience":
        return PatienceRule(layers, threshold, tolerance=tolerance)
    if name == "learned":
        if hidden_size is None:
            raise ValueError("the exit rule 'learned' reads hidden states: give hidden_size")
        return LearnedRule(layers, hidden_size, threshold)
    raise ValueError(f"rule={name!r} is no exit rule: choose one of {list(get_args(ExitRuleName))}")


def _check_classes(name: str, num_labels: int) -> None:
    if num_labels < 2:
        raise ValueError(
            f"the exit rule {name!r} compares classes, and the model gives one number: choose rule='patience' or "
            "rule='learned' for regression"
        )


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

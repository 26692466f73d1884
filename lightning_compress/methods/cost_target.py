"""Meeting a target of FLOPs or tokens: what passes cost, where the target is now, and how far off they are.

Policies differ in how they drop tokens; how a target is approached and measured does not. The next chapters are
:mod:`lightning_compress.methods.contribution_token_dropping` and
:mod:`lightning_compress.methods.bottleneck_token_dropping`.

Shape legend: B batch, L layers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.nn.kept_flops import DroppingCosts

__all__ = ["CostTarget"]

_REACHED_AT = 0.8
"""Share of the search after which the scheduled target is the user's."""
_TOLERANCE = 1.1
_MEMORY, _FADE = 0.9, 6.0
"""What a pass leaves of the sums before it, in a long run; how fast sums fade over a whole short one."""
_NEWTON, _HURRY = (0.2, 0.5), 8.0
"""Share of a Newton step that is taken, in a long run and at most: a batch is not the data. How it grows with steps."""
_COUNTS_COSTS = 50
"""How often in a training costs are read off the model, since other methods may shrink it."""
_TINY = 1e-6


class CostTarget:
    """A share of the dense cost, approached from 1 and then held.

    Args:
        target: The share, in (0, 1]; None where there is nothing to meet, only to measure.
        unit: What it is a share of: FLOPs of the encoder if no token left, as slim as other methods make it, or tokens
            that enter its layers.
        start: Progress at which the target begins to fall.
        end: Progress at which the search is over; the target stands still for its last fifth.

    Example:
        >>> goal = CostTarget(0.25, "flops", start=0.0, end=1.0)
        >>> goal.scheduled(0.0), goal.scheduled(0.4), goal.scheduled(0.9)
        (1.0, 0.5, 0.25)
    """

    def __init__(
        self, target: float | None, unit: Literal["flops", "tokens"], start: float, end: float
    ) -> None:
        self.target, self.unit, self.start, self.end = target, unit, start, end
        self.latest: list[float] = []
        """Of the latest pass: cost, dense cost, tokens in the layers, tokens times layers, by how many tokens fewer
        they would be if the threshold rose by one, how many were expected, and one per process."""
        self.totals: list[float] = []
        """Fading sums of the same over passes; batches differ much in length."""
        self._pending: Tensor | None = None
        self._costs: tuple[DroppingCosts, DroppingCosts] | None = None
        self._counted: list[int] = []
        self._progress, self._step = 0.0, 0.0

    @property
    def ratio(self) -> float:
        """Cost over dense cost in recent passes."""
        return self.totals[0] / self.totals[1] if self.totals else 1.0

    @property
    def tokens_kept(self) -> float:
        """Share of tokens that entered the layers in recent passes."""
        return self.totals[2] / self.totals[3] if self.totals else 1.0

    @property
    def elasticity(self) -> float:
        """Share of tokens that would leave if the threshold rose by one; of the latest or recent passes, the larger."""
        sums = [sums for sums in (self.latest, self.totals) if sums]
        return max((fewer / expected for *_, fewer, expected, _ in sums), default=0.0)

    @property
    def is_met(self) -> bool:
        """Whether recent passes cost no more than a tenth above the user's target."""
        return self.target is None or self.ratio <= _TOLERANCE * self.target

    def scheduled(self, progress: float) -> float:
        """Return the target of this moment: from 1 down to the user's, geometric, there at 80 % of the search."""
        assert self.target is not None, "where there is no target, nothing is scheduled"
        share = (progress - self.start) / (_REACHED_AT * (self.end - self.start))
        return self.target ** min(max(share, 0.0), 1.0)

    def advance(self, progress: float) -> None:
        """Say where training is, at the start of a step; sums fade by how long steps are."""
        if progress > self._progress:
            self._step = progress - self._progress
        self._progress = progress

    def measure(
        self,
        model: nn.Module,
        progress: float,
        counts_BL: Tensor,
        lengths_B: Tensor,
        sensitivity: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return cost over dense cost of a pass, a scalar that is differentiable in the counts, and note it.

        Args:
            model: The model, whose policy says what it costs itself.
            progress: Where training is; advances there.
            counts_BL: Tokens that entered each layer; whole or expected numbers.
            lengths_B: Tokens of each text.
            sensitivity: By how many tokens fewer they would be if the threshold rose by one, and how many were
                expected, where that is known.
        """
        self.advance(progress)
        tokens, all_tokens = counts_BL.sum(), lengths_B.sum() * counts_BL.shape[1]
        cost, dense = tokens, all_tokens
        if self.unit == "flops":
            with_policy, without = self._costs_of(model, progress)
            cost = with_policy.flops(counts_BL, lengths_B).sum()
            dense = without.flops(lengths_B[:, None].expand_as(counts_BL), lengths_B).sum()
        fewer, expected = (0.0 * tokens, tokens) if sensitivity is None else sensitivity
        parts = (cost, dense, tokens, all_tokens, fewer, expected, torch.ones_like(cost))
        exact = torch.float32 if cost.device.type == "mps" else torch.float64
        self._pending = torch.stack([part.detach().to(exact) for part in parts])
        return (cost / dense).float()

    def _costs_of(self, model: nn.Module, progress: float) -> tuple[DroppingCosts, DroppingCosts]:
        now = [int(progress >= self.start), int(progress >= self.end), int(progress * _COUNTS_COSTS)]
        if self._costs is None or self._counted != now:
            self._costs = (DroppingCosts.of(model), DroppingCosts.of(model, policy_flops_per_token=0))
            self._counted = now
        return self._costs

    def end_pass(self) -> None:
        """Read what the latest pass cost from the device; processes pool theirs."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pending)
        self.latest = pending.tolist()
        before, memory = (
            self.totals or [0.0] * len(self.latest),
            min(_MEMORY, max(1.0 - _FADE * self._step, 0.0)),
        )
        self.totals = [memory * old + new for old, new in zip(before, self.latest, strict=True)]

    def excess(self, progress: float) -> float:
        """Return by how much recent passes were above the target of this moment, as a share of it; 0 without one."""
        return 0.0 if self.target is None else self.ratio / self.scheduled(progress) - 1.0

    def correction(self, progress: float, largest: float) -> float:
        """Return by how much to move the threshold: a damped Newton step on what the latest pass cost too much.

        Of the latest pass, not of recent ones: what lags cannot be steered by in long steps. Its excess counts in units
        of the mean cost of passes, so that in the sum over steps a pass over long texts weighs more.

        Args:
            progress: Where training is.
            largest: No step is longer; where the cost does not react at all, every step is as long.
        """
        if self.target is None or not self.latest:
            return 0.0
        target = self.scheduled(progress)
        cost, dense, *_, passes = self.latest
        off = (cost - target * dense) / passes / (target * self.totals[1] / self.totals[6])
        low, high = _NEWTON
        share = min(max(_HURRY * self._step, low), high)
        return min(max(share * off / max(self.elasticity, _TINY), -largest), largest)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        costs = None if self._costs is None else [asdict(costs) for costs in self._costs]
        sums = {"latest": self.latest, "totals": self.totals, "costs": costs, "counted": self._counted}
        return {**sums, "progress": self._progress, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self.latest, self.totals, self._counted = state["latest"], state["totals"], state["counted"]
        self._progress, self._step, costs = state["progress"], state["step"], state["costs"]
        self._costs = None if costs is None else (DroppingCosts(**costs[0]), DroppingCosts(**costs[1]))
        self._pending = None

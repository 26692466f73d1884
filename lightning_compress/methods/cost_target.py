"""Meeting a target of FLOPs or tokens: what a pass cost, where the target is now, and how far off.

Policies differ in how they drop tokens; how a target is approached and met does not. The next chapter is
:mod:`lightning_compress.methods.bottleneck_token_dropping`.

Shape legend: B batch, L layers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.nn.kept_flops import DroppingCosts

__all__ = ["CostTarget"]

_REACHED_AT = 0.8
"""Share of the search after which the scheduled target is the user's."""
_TOLERANCE = 1.1
_NEWTON = 0.3
"""Share of a Newton step that is taken: the cost of a batch is noisy."""
_TINY = 1e-6


class CostTarget:
    """A share of the dense cost, approached from 1 and then held.

    Args:
        target: The share, in (0, 1]; None where there is nothing to meet, only to measure.
        unit: What it is a share of: FLOPs of the dense encoder, or tokens that enter its layers.
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
        self.ratio = 1.0
        """Cost over dense cost in the latest pass that was read."""
        self.tokens_kept = 1.0
        """Share of tokens that entered the layers in it."""
        self.elasticity = 0.0
        """By which share tokens fall when the threshold rises by one, in it."""
        self._latest: Tensor | None = None

    def scheduled(self, progress: float) -> float:
        """Return the target of this moment: from 1 down to the user's, geometric, there at 80 % of the search."""
        assert self.target is not None, "where there is no target, nothing is scheduled"
        share = (progress - self.start) / (_REACHED_AT * (self.end - self.start))
        return self.target ** min(max(share, 0.0), 1.0)

    def excess(self, progress: float) -> float:
        """Return by how much the latest pass was above the target of this moment, as a share of it; 0 without one."""
        return 0.0 if self.target is None else self.ratio / self.scheduled(progress) - 1.0

    @property
    def is_met(self) -> bool:
        """Whether the latest pass cost no more than a tenth above the user's target."""
        return self.target is None or self.ratio <= _TOLERANCE * self.target

    def measure(
        self, model: nn.Module, counts_BL: Tensor, lengths_B: Tensor, elasticity: Tensor | None = None
    ) -> Tensor:
        """Return cost over dense cost of a pass, a scalar that is differentiable in the counts, and note it.

        Args:
            model: The model, whose policy says what it costs itself.
            counts_BL: Tokens that entered each layer; whole or expected numbers.
            lengths_B: Tokens of each text.
            elasticity: By which share tokens would fall if the threshold rose by one, where that is known.
        """
        tokens = counts_BL.sum() / (lengths_B.sum() * counts_BL.shape[1])
        ratio = tokens
        if self.unit == "flops":
            dense_BL = lengths_B[:, None].expand_as(counts_BL)
            dense = DroppingCosts.of(model, policy_flops_per_token=0).flops(dense_BL, lengths_B)
            ratio = (DroppingCosts.of(model).flops(counts_BL, lengths_B).sum() / dense.sum()).float()
        elasticity = torch.zeros_like(ratio) if elasticity is None else elasticity
        self._latest = torch.stack([part.detach().float() for part in (ratio, tokens, elasticity)])
        return ratio

    def end_pass(self) -> None:
        """Read what the latest pass cost from the device; processes average it."""
        if self._latest is None:
            return
        latest, self._latest = self._latest, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(latest)
            latest = latest / dist.get_world_size()
        self.ratio, self.tokens_kept, self.elasticity = latest.tolist()

    def correction(self, progress: float, largest: float) -> float:
        """Return by how much to move the threshold, a damped Newton step on the logarithm of the cost.

        Args:
            progress: Where training is.
            largest: No step is longer; where the cost does not react at all, every step is as long.
        """
        if self.target is None:
            return 0.0
        off = math.log(max(self.ratio, _TINY) / self.scheduled(progress))
        return min(max(_NEWTON * off / max(self.elasticity, _TINY), -largest), largest)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {name: getattr(self, name) for name in ("ratio", "tokens_kept", "elasticity")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        for name in ("ratio", "tokens_kept", "elasticity"):
            setattr(self, name, state[name])
        self._latest = None

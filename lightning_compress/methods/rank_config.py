"""What the user may choose of SoftThresholdRank.

The next chapter is :mod:`lightning_compress.methods.rank_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_compress.methods.base import MethodConfig, check, check_kinds

__all__ = ["SoftThresholdRankConfig"]


@dataclass(frozen=True, kw_only=True)
class SoftThresholdRankConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields."""

    stem: ClassVar[str] = "soft_threshold_rank"

    target_params: float = 0.5
    """Share of the parameters of ``scope`` to keep, in (0, 1]."""
    scope: Literal["linear", "encoder", "total"] = "linear"
    """What ``target_params`` is a share of: the weights of the factorised linears, the layers, or the whole model."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over module paths: which of the family's linears to factorise."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over module paths: which of them to leave dense."""
    regularizer: Literal["target", "exp"] = "target"
    """``"target"``: log of size over a shrinking budget; ``"exp"``: sum of exp(-alpha), stopped at the target."""
    regularizer_weight: float | None = None
    """Weight of the regularizer beside the task loss; by default 1 for ``"target"`` and 0.1 for ``"exp"``."""
    allocation: Literal["learned", "uniform"] = "learned"
    """``"learned"``: thresholds decide each layer's rank; ``"uniform"``: every layer gets the same share, no search."""
    init: Literal["svd", "whitened"] = "whitened"
    """Decomposition at the end of the warm-up: plain, or whitened by the inputs seen during the warm-up."""
    warmup: float = 0.1
    """Share of training before the thresholds move, in [0, 1)."""
    search_end: float = 0.3
    """Share of training after which ranks are pinned at the latest, in (warmup, 1]."""
    sharpness: float = 50.0
    """Slope s of the gate, positive."""
    relative: bool = True
    """Whether thresholds are in units of each layer's root-mean-square singular value, or absolute."""
    threshold_lr: float | None = None
    """Learning rate of the thresholds; by default such that they can cross twice the distance they have to."""
    rank_multiple: int = 16
    """Kept ranks are rounded up to a multiple of this (matrix units like 16 or 32), at least 1."""
    dense_above: float = 0.75
    """A layer stays dense where its two factors would hold more than this share of the dense weights, in (0, 1]."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check(0.0 < self.target_params <= 1.0, f"target_params={self.target_params} is outside (0, 1]")
        check(
            self.scope in ("linear", "encoder", "total"),
            f"scope={self.scope!r} is not linear, encoder or total",
        )
        check(
            self.regularizer in ("target", "exp"),
            f"regularizer={self.regularizer!r} is not 'target' or 'exp'",
        )
        check(
            self.allocation in ("learned", "uniform"),
            f"allocation={self.allocation!r} is not learned or uniform",
        )
        check(self.init in ("svd", "whitened"), f"init={self.init!r} is not 'svd' or 'whitened'")
        check(0.0 <= self.warmup < 1.0, f"warmup={self.warmup} is outside [0, 1)")
        check(
            self.warmup < self.search_end <= 1.0,
            f"search_end={self.search_end} is outside (warmup={self.warmup}, 1]: ranks are searched between the two",
        )
        check(self.sharpness > 0, f"sharpness={self.sharpness} is not positive")
        check(
            self.threshold_lr is None or self.threshold_lr > 0,
            f"threshold_lr={self.threshold_lr} is not positive",
        )
        weight = self.regularizer_weight
        check(weight is None or weight >= 0, f"regularizer_weight={weight} is negative")
        check(self.rank_multiple >= 1, f"rank_multiple={self.rank_multiple} is below 1")
        check(0.0 < self.dense_above <= 1.0, f"dense_above={self.dense_above} is outside (0, 1]")
        object.__setattr__(self, "include", _patterns(self.include))
        object.__setattr__(self, "exclude", _patterns(self.exclude))


def _patterns(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)

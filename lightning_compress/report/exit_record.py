"""What a run with exits leaves behind for its report: who left where, and what other thresholds would give.

A part of `record`; `callbacks/exit_report.py` fills it, `exit_sections` reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.report.fields import (
    count_field,
    list_field,
    mapping_field,
    number_field,
    optional_field,
    text_field,
)
from lightning_compress.runtime.exit_trial import ExitPoint, ExitTrial

__all__ = ["ExitPointRecord", "ExitsRecord"]

_CURVE = 20
"""Thresholds of the curve, beside the deployed one."""


@dataclass(frozen=True, kw_only=True)
class ExitPointRecord:
    """Where the model stands at one threshold of its exits, without training."""

    threshold: float | None
    """In the unit of the rule; None lets nobody leave early."""
    score: float
    """The metric of `ExitsRecord.metric`."""
    flops_ratio: float
    """FLOPs over dense."""
    mean_depth: float
    """Layers that a text runs, on average."""

    @classmethod
    def of(cls, point: ExitPoint, off: float, dense_flops: float) -> "ExitPointRecord":
        """Take over a point that has a score; see `ExitsRecord.of`."""
        assert point.score is not None, "a curve is of scores"
        return cls(
            threshold=_told(point, off),
            score=point.score,
            flops_ratio=point.flops / dense_flops,
            mean_depth=point.mean_depth,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ExitPointRecord":
        """Rebuild a point; raises ValueError naming the field that is wrong."""
        return cls(
            threshold=optional_field(data, "threshold"),
            score=number_field(data, "score", lower=-math.inf),
            flops_ratio=number_field(data, "flops_ratio"),
            mean_depth=number_field(data, "mean_depth"),
        )


@dataclass(frozen=True, kw_only=True)
class ExitsRecord:
    """By which exits validation texts left, measured on the converted model."""

    num_texts: int
    """How many texts the numbers are from."""
    leaves: tuple[float, ...]
    """Share of the texts that leaves after each layer, in [0, 1]; at the last, of those that ran all layers."""
    asked: tuple[int, ...]
    """Layers whose exits are asked, from 0; none where nobody leaves early."""
    rule: str
    """When a text leaves, such as `"entropy"`."""
    threshold: float | None
    """What the rule's measure is compared with; None where nobody leaves early."""
    metric: str = "accuracy"
    """What the scores of the curve are."""
    curve: tuple[ExitPointRecord, ...] = ()
    """From nobody leaving early to as many as can; empty where it was not measured."""

    def __post_init__(self) -> None:
        if not self.leaves:
            raise ValueError("field 'leaves' is empty: expected the share that leaves after each layer")
        if not math.isclose(sum(self.leaves), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"field 'leaves' sums to {sum(self.leaves):g}: expected shares of all texts, 1 in total"
            )
        if any(layer >= len(self.leaves) - 1 for layer in self.asked):
            raise ValueError(f"exits {list(self.asked)} are asked in a model of {len(self.leaves)} layers")

    @property
    def mean_depth(self) -> float:
        """Layers that a text runs, on average."""
        return sum(share * (layer + 1) for layer, share in enumerate(self.leaves))

    @classmethod
    def of(cls, trial: ExitTrial, metric: str, dense_flops: float) -> "ExitsRecord":
        """Read off a trial what the model's own threshold gives, and, where texts have labels, a curve of others.

        Args:
            trial: Of the converted model, over the texts.
            metric: What its scores are.
            dense_flops: FLOPs of a text without compression, on average.
        """
        deployed, off = trial.deployed(), trial.rule.off
        scored = [point for point in trial.curve(_CURVE) if point.score is not None]
        return cls(
            num_texts=len(trial.lengths_B),
            leaves=deployed.leaves_L,
            asked=deployed.exits,
            rule=trial.rule.name,
            threshold=_told(deployed, off),
            metric=metric,
            curve=tuple(ExitPointRecord.of(point, off, dense_flops) for point in scored),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ExitsRecord":
        """Rebuild the part; raises ValueError naming the field that is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"field 'exits' is {data!r}: expected a mapping")
        curve = list_field(data, "curve")
        return cls(
            num_texts=count_field(data, "num_texts"),
            leaves=tuple(
                number_field({"leaves": share}, "leaves", upper=1.0) for share in list_field(data, "leaves")
            ),
            asked=tuple(count_field({"asked": layer}, "asked") for layer in list_field(data, "asked")),
            rule=text_field(data, "rule"),
            threshold=optional_field(data, "threshold"),
            metric=text_field(data, "metric"),
            curve=tuple(
                ExitPointRecord.from_dict(mapping_field({"curve": point}, "curve")) for point in curve
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in the shape of the file."""
        return vars(self) | {
            "leaves": list(self.leaves),
            "asked": list(self.asked),
            "curve": [dict(vars(point)) for point in self.curve],
        }


def _told(point: ExitPoint, off: float) -> float | None:
    return None if point.threshold == off else point.threshold

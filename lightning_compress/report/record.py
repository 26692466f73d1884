"""What a compression run leaves behind for its report: plain numbers, validated, JSON in and out.

`callbacks/report.py` fills a `RunRecord` while training; `page` and `figures` only read one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_compress.report.bits_record import BitsRecord
from lightning_compress.report.dropping_record import DroppingRecord
from lightning_compress.report.exit_record import ExitsRecord
from lightning_compress.report.fields import (
    count_field,
    mapping_field,
    number_field,
    optional_field,
    text_field,
)
from lightning_compress.report.latency_table import LatencyTable
from lightning_compress.report.width_record import WidthsRecord

__all__ = ["RECORD_SCHEMA", "FinalRecord", "LayerRank", "RunRecord", "ScopeCounts", "StepRecord"]

RECORD_SCHEMA = 1

_OF_TOKENS = ("tokens_kept", "ratio", "target", "threshold")
"""Fields of a step that are written only where tokens leave."""
_PARTS = ("dropping", "exits", "widths", "bits")
"""Fields of a run that are written only where there is something to say."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Where the compression stood at one step of training."""

    step: int
    """Optimizer steps done."""
    progress: float
    """Share of the run done, in [0, 1]."""
    phase: str
    """Name of the phase, such as `"search"` or `"recovery"`; a change of name is drawn as a boundary."""
    size_ratio: float
    """Parameters kept over dense, in the scope of the target."""
    flops_ratio: float
    """FLOPs left over dense."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of each factored linear, by dotted path."""
    loss: dict[str, float] = field(default_factory=dict)
    """Loss terms by name; values that are not finite are kept as NaN."""
    tokens_kept: float | None = None
    """Share of tokens that entered the layers in this step's pass; None where tokens do not leave."""
    ratio: float | None = None
    """What the target is of (FLOPs or tokens) over dense, in this step's pass."""
    target: float | None = None
    """The ratio that was scheduled for this step."""
    threshold: float | None = None
    """Threshold, a mean over the layers that drop; of any sign, as methods have it."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StepRecord":
        """Rebuild a step; raises ValueError naming the field that is wrong."""
        losses = mapping_field(data, "loss", default={})
        return cls(
            step=count_field(data, "step"),
            progress=number_field(data, "progress", upper=1.0),
            phase=text_field(data, "phase"),
            size_ratio=number_field(data, "size_ratio"),
            flops_ratio=number_field(data, "flops_ratio"),
            ranks={
                path: count_field(ranks, path)
                for ranks in [mapping_field(data, "ranks", default={})]
                for path in ranks
            },
            loss={name: math.nan if value is None else float(value) for name, value in losses.items()},
            tokens_kept=optional_field(data, "tokens_kept"),
            ratio=optional_field(data, "ratio"),
            target=optional_field(data, "target"),
            threshold=optional_field(data, "threshold", lower=-math.inf),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        plain = vars(self) | {"ranks": dict(self.ranks), "loss": dict(self.loss)}
        return {name: value for name, value in plain.items() if name not in _OF_TOKENS or value is not None}


@dataclass(frozen=True, kw_only=True)
class ScopeCounts:
    """Numbers of parameters: weights of the linears, everything in the layers, the whole model."""

    linear: int
    encoder: int
    total: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ScopeCounts":
        """Rebuild the counts; raises ValueError naming the field that is wrong."""
        return cls(
            linear=count_field(data, "linear"),
            encoder=count_field(data, "encoder"),
            total=count_field(data, "total"),
        )


@dataclass(frozen=True)
class LayerRank:
    """What became of one linear: its rank, the rank of the dense matrix, and which form was kept."""

    rank: int
    full_rank: int
    kept: Literal["low_rank", "dense"]

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= self.full_rank or self.full_rank < 1:
            raise ValueError(
                f"rank {self.rank} of {self.full_rank} is impossible: expected 0 <= rank <= full rank"
            )
        if self.kept not in ("low_rank", "dense"):
            raise ValueError(f"kept={self.kept!r} is unknown: expected 'low_rank' or 'dense'")

    @property
    def share(self) -> float:
        """Rank over full rank, in [0, 1]."""
        return self.rank / self.full_rank


@dataclass(frozen=True, kw_only=True)
class FinalRecord:
    """What the converted model is, beside the dense one."""

    dense: ScopeCounts
    compressed: ScopeCounts
    dense_flops: float
    """FLOPs of the dense model over the lengths that were counted."""
    compressed_flops: float
    bytes_on_disk: dict[str, int] | None = None
    """Bytes that the weights take in a file, under `"dense"` and `"compressed"`; None where unknown."""
    ranks: dict[str, LayerRank] = field(default_factory=dict)
    """By dotted path of the linear."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "FinalRecord":
        """Rebuild the result; raises ValueError naming the field that is wrong."""
        parameters, flops = mapping_field(data, "parameters"), mapping_field(data, "flops")
        sizes = data.get("bytes_on_disk")
        ranks = mapping_field(data, "ranks", default={})
        malformed = [
            path for path, row in ranks.items() if not isinstance(row, list | tuple) or len(row) != 3
        ]
        if malformed:
            raise ValueError(
                f"ranks of {malformed[0]!r} are {ranks[malformed[0]]!r}: expected [rank, full rank, kept]"
            )
        return cls(
            dense=ScopeCounts.from_dict(mapping_field(parameters, "dense")),
            compressed=ScopeCounts.from_dict(mapping_field(parameters, "compressed")),
            dense_flops=number_field(flops, "dense"),
            compressed_flops=number_field(flops, "compressed"),
            bytes_on_disk=None if sizes is None else {name: count_field(sizes, name) for name in sizes},
            ranks={path: LayerRank(*row) for path, row in ranks.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in the shape of the file."""
        return {
            "parameters": {"dense": dict(vars(self.dense)), "compressed": dict(vars(self.compressed))},
            "flops": {"dense": self.dense_flops, "compressed": self.compressed_flops},
            "bytes_on_disk": None if self.bytes_on_disk is None else dict(self.bytes_on_disk),
            "ranks": {path: [row.rank, row.full_rank, row.kept] for path, row in self.ranks.items()},
        }


@dataclass(kw_only=True)
class RunRecord:
    """One run, from its target to its measurements. Only `model_type` must be known at the start."""

    model_type: str
    methods: list[dict[str, Any]] = field(default_factory=list)
    """`{"method": stem, "config": {...}}` in the order of composition."""
    target: dict[str, Any] = field(default_factory=dict)
    """What was asked for; `target_params` and `target_flops` (shares of dense) are drawn as lines."""
    steps: list[StepRecord] = field(default_factory=list)
    final: FinalRecord | None = None
    """None while the model is not converted."""
    metrics: dict[str, dict[str, float] | None] = field(default_factory=dict)
    """Test metrics under `"dense"` and `"compressed"`; None where not measured."""
    latency: LatencyTable | None = None
    dropping: DroppingRecord | None = None
    """Which tokens left where; None where tokens do not leave, or no text was seen."""
    exits: ExitsRecord | None = None
    """Who left by which exit; None where there are none, or no text was seen."""
    widths: WidthsRecord | None = None
    """How wide each layer is; None where heads and neurons were left alone."""
    bits: BitsRecord | None = None
    """Which operators are integers, of how many bits; None where nothing was quantised."""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunRecord":
        """Rebuild a record.

        Raises:
            ValueError: If the schema is not this version's, or a field is unknown, missing or impossible.
        """
        if data.get("schema") != RECORD_SCHEMA:
            raise ValueError(
                f"the record has schema {data.get('schema')!r}, this version reads {RECORD_SCHEMA}: "
                "render it with the version that wrote it, or run again"
            )
        unknown = sorted(set(data) - {"schema", *cls.__dataclass_fields__})
        if unknown:
            raise ValueError(
                f"the record has unknown fields {unknown}: known are {sorted(cls.__dataclass_fields__)}"
            )
        final, latency = data.get("final"), data.get("latency")
        dropping, exits, widths, bits = (data.get(name) for name in _PARTS)
        return cls(
            model_type=text_field(data, "model_type"),
            methods=[dict(method) for method in data.get("methods", [])],
            target=dict(mapping_field(data, "target", default={})),
            steps=[StepRecord.from_dict(step) for step in data.get("steps", [])],
            final=None if final is None else FinalRecord.from_dict(final),
            metrics={name: m and dict(m) for name, m in mapping_field(data, "metrics", default={}).items()},
            latency=None if latency is None else LatencyTable.from_dict(latency),
            dropping=None if dropping is None else DroppingRecord.from_dict(dropping),
            exits=None if exits is None else ExitsRecord.from_dict(exits),
            widths=None if widths is None else WidthsRecord.from_dict(widths),
            bits=None if bits is None else BitsRecord.from_dict(bits),
            machine=dict(mapping_field(data, "machine", default={})),
            versions=dict(mapping_field(data, "versions", default={})),
            warnings=[str(warning) for warning in data.get("warnings", [])],
        )

    @property
    def target_flops(self) -> float | None:
        """Share of dense FLOPs that was asked for; None where none was."""
        value = self.target.get("target_flops")
        return float(value) if isinstance(value, int | float) else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data, with the schema version; numbers that are not finite become None."""
        plain = {"schema": RECORD_SCHEMA, **vars(self)} | {
            "steps": [step.to_dict() for step in self.steps],
            "final": None if self.final is None else self.final.to_dict(),
            "latency": None if self.latency is None else self.latency.to_dict(),
        }
        parts = {name: plain.pop(name) for name in _PARTS}
        return _jsonable(plain | {name: part.to_dict() for name, part in parts.items() if part is not None})

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    """Copy containers, and replace NaN and infinities, for which JSON has no word, by None."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

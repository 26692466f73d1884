"""What a run with narrower layers leaves behind for its report: kept heads, neurons and parameters of each layer.

A part of `record`; `callbacks/width_report.py` fills it, `width_sections` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_parameters
from lightning_compress.report.fields import (
    count_field,
    list_field,
    mapping_field,
    number_field,
    optional_field,
    text_field,
)

__all__ = ["KeptOf", "LayerWidth", "WidthsRecord"]


@dataclass(frozen=True)
class KeptOf:
    """How many are left, of how many."""

    kept: int
    dense: int

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.dense or self.dense < 1:
            raise ValueError(f"{self.kept} of {self.dense} is impossible: expected 0 <= kept <= dense")

    @property
    def share(self) -> float:
        """What is left over what there was, in [0, 1]."""
        return self.kept / self.dense

    @classmethod
    def from_list(cls, data: Any, name: str) -> "KeptOf":
        """Rebuild a pair; raises ValueError naming the field that is wrong."""
        if not isinstance(data, list | tuple) or len(data) != 2:
            raise ValueError(f"field {name!r} is {data!r}: expected [kept, dense]")
        kept, dense = (count_field({name: number}, name) for number in data)
        return cls(kept, dense)

    def to_list(self) -> list[int]:
        """Return plain data."""
        return [self.kept, self.dense]


@dataclass(frozen=True, kw_only=True)
class LayerWidth:
    """What is left of one layer."""

    heads: KeptOf
    """Attention heads, of queries."""
    neurons: KeptOf
    """Neurons of the FFN."""
    parameters: KeptOf
    """All parameters of the layer, whoever took them; of few bits or of many."""

    @classmethod
    def of_layers(cls, model: nn.Module, dense: nn.Module) -> "tuple[LayerWidth, ...]":
        """Count what is left of each layer of a model; either may be on the meta device."""
        layers = zip(describe(model).layers, describe(dense).layers, strict=True)
        sizes = zip(count_parameters(model).layers, count_parameters(dense).layers, strict=True)
        return tuple(
            cls(
                heads=KeptOf(ours.num_heads, theirs.num_heads),
                neurons=KeptOf(ours.intermediate_size, theirs.intermediate_size),
                parameters=KeptOf(*size),
            )
            for (ours, theirs), size in zip(layers, sizes, strict=True)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerWidth":
        """Rebuild a layer; raises ValueError naming the field that is wrong."""
        return cls(**{name: KeptOf.from_list(data.get(name), name) for name in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, list[int]]:
        """Return plain data."""
        return {name: pair.to_list() for name, pair in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class WidthsRecord:
    """Widths of the converted model beside those of the dense one."""

    layers: tuple[LayerWidth, ...]
    criterion: str
    """What decided who stays, such as `"taylor"` or `"l0"`."""
    embedding_rank: KeptOf | None = None
    """Rank of the word embeddings; None where they are not factorised."""
    hidden: KeptOf | None = None
    """Width of the residual stream; None where all of it stayed."""
    calibration_seconds: float | None = None
    """Time of separate passes for importance; None where there were none."""
    calibration_share: float | None = None
    """The same, as a share of the time since training began or was resumed."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("field 'layers' is empty: expected one entry per layer")

    @property
    def parameters(self) -> KeptOf:
        """Parameters of all layers together."""
        pairs = [layer.parameters for layer in self.layers]
        return KeptOf(sum(pair.kept for pair in pairs), sum(pair.dense for pair in pairs))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "WidthsRecord":
        """Rebuild the part; raises ValueError naming the field that is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"field 'widths' is {data!r}: expected a mapping")
        share = data.get("calibration_share")
        pairs = {name: data.get(name) for name in ("embedding_rank", "hidden")}
        return cls(
            layers=tuple(
                LayerWidth.from_dict(mapping_field({"layers": layer}, "layers"))
                for layer in list_field(data, "layers")
            ),
            criterion=text_field(data, "criterion"),
            **{name: None if pair is None else KeptOf.from_list(pair, name) for name, pair in pairs.items()},
            calibration_seconds=optional_field(data, "calibration_seconds"),
            calibration_share=None if share is None else number_field(data, "calibration_share", upper=1.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in the shape of the file."""
        pairs = {"embedding_rank": self.embedding_rank, "hidden": self.hidden}
        return (
            vars(self)
            | {"layers": [layer.to_dict() for layer in self.layers]}
            | {name: None if pair is None else pair.to_list() for name, pair in pairs.items()}
        )

"""What a run that drops tokens leaves behind for its report: which tokens left where, and what that costs.

A part of `record`; `dropping_measurement` fills it, `dropping_sections` reads it.
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
    text_field,
)

__all__ = ["DialRecord", "DroppingRecord", "TokenText"]


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """One text, piece by piece, and how far each piece came."""

    tokens: tuple[str, ...]
    """Pieces as the tokenizer writes them, such as `"##ing"`; padding left out."""
    layers: tuple[int, ...]
    """How many layers each piece entered: 3 means that it left before layer 3, counted from 0."""
    label: str | None = None
    prediction: str | None = None

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.layers):
            raise ValueError(
                f"a text has {len(self.tokens)} tokens and {len(self.layers)} numbers of layers: "
                "expected one number for each of at least one token"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TokenText":
        """Rebuild a text; raises ValueError naming the field that is wrong."""
        return cls(
            tokens=tuple(str(token) for token in list_field(data, "tokens")),
            layers=tuple(count_field({"layers": count}, "layers") for count in list_field(data, "layers")),
            label=None if data.get("label") is None else text_field(data, "label"),
            prediction=None if data.get("prediction") is None else text_field(data, "prediction"),
        )


@dataclass(frozen=True, kw_only=True)
class DialRecord:
    """Where the model stands when all thresholds are multiplied by one number, without training."""

    scale: float
    """The number; 0 drops nothing."""
    score: float
    """The metric of `DroppingRecord.metric`."""
    flops_ratio: float
    """FLOPs over dense."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DialRecord":
        """Rebuild a point; raises ValueError naming the field that is wrong."""
        return cls(
            scale=number_field(data, "scale"),
            score=number_field(data, "score", lower=-math.inf),
            flops_ratio=number_field(data, "flops_ratio"),
        )


@dataclass(frozen=True, kw_only=True)
class DroppingRecord:
    """Which tokens of validation texts left where, measured on the converted model."""

    num_texts: int
    """How many texts the numbers are from."""
    layers: tuple[float, ...]
    """Share of the tokens that enter each layer's attention, in [0, 1]; a ratio of totals over the texts."""
    texts: tuple[TokenText, ...] = ()
    """Some of the texts."""
    scale: float = 1.0
    """Number by which the deployed model's thresholds are multiplied."""
    metric: str = "accuracy"
    """What the scores of the curve are."""
    curve: tuple[DialRecord, ...] = ()
    """By ascending scale; empty where it was not measured."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("field 'layers' is empty: expected the share that each layer keeps")
        most = max((max(text.layers) for text in self.texts), default=0)
        if most > len(self.layers):
            raise ValueError(f"a token entered {most} layers of a model that has {len(self.layers)}")

    @property
    def mean_kept(self) -> float:
        """Share of the tokens that enter a layer, averaged over the layers."""
        return sum(self.layers) / len(self.layers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DroppingRecord":
        """Rebuild the part; raises ValueError naming the field that is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"field 'dropping' is {data!r}: expected a mapping")
        texts, curve = list_field(data, "texts"), list_field(data, "curve")
        return cls(
            num_texts=count_field(data, "num_texts"),
            layers=tuple(
                number_field({"layers": share}, "layers", upper=1.0) for share in list_field(data, "layers")
            ),
            texts=tuple(TokenText.from_dict(mapping_field({"texts": text}, "texts")) for text in texts),
            scale=number_field(data, "scale"),
            metric=text_field(data, "metric"),
            curve=tuple(DialRecord.from_dict(mapping_field({"curve": point}, "curve")) for point in curve),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in the shape of the file."""
        texts = [
            vars(text) | {"tokens": list(text.tokens), "layers": list(text.layers)} for text in self.texts
        ]
        return vars(self) | {
            "layers": list(self.layers),
            "texts": texts,
            "curve": [dict(vars(point)) for point in self.curve],
        }

"""What a run that quantises leaves behind for its report: which operators are integers, of how many bits.

A part of `record`; `callbacks/report.py` fills it, `bits_sections` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.nn.operator_formats import OperatorUse, uses_of
from lightning_compress.plan import CompressionPlan
from lightning_compress.report.fields import count_field, list_field, text_field

__all__ = ["BitsRecord", "OperatorBits"]


@dataclass(frozen=True, kw_only=True)
class OperatorBits:
    """One kind of operator that is quantised."""

    operator: str
    """In words, such as `"linear weights"`."""
    places: int
    """How many there are of it in the model."""
    bits: int | None = None
    """Of an operand's integers; None where the operator is computed in integers and holds none."""
    block: str | None = None
    """What shares a factor, in words, such as `"32 × 32"`; None with the bits."""
    factor: str | None = None
    """`"scale"` or `"shift"`; None with the bits."""

    @classmethod
    def of(cls, use: OperatorUse) -> "OperatorBits":
        """Return the same of an operator in a model."""
        if use.form is None:
            return cls(operator=use.name, places=use.places)
        block, factor = use.form.block_in_words, use.form.factor
        return cls(operator=use.name, places=use.places, bits=use.form.bits, block=block, factor=factor)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "OperatorBits":
        """Rebuild an operator; raises ValueError naming the field that is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"an entry of field 'operators' is {data!r}: expected a mapping")
        operator, places = text_field(data, "operator"), count_field(data, "places")
        if data.get("bits") is None:
            return cls(operator=operator, places=places)
        bits, block, factor = count_field(data, "bits"), text_field(data, "block"), text_field(data, "factor")
        return cls(operator=operator, places=places, bits=bits, block=block, factor=factor)


@dataclass(frozen=True, kw_only=True)
class BitsRecord:
    """All that is quantised in the converted model."""

    operators: tuple[OperatorBits, ...]

    def __post_init__(self) -> None:
        if not self.operators:
            raise ValueError("field 'operators' is empty: expected one entry for each operator in integers")

    @classmethod
    def of_plan(cls, plan: CompressionPlan) -> "BitsRecord | None":
        """Return what a converted model's plan says; None where nothing was quantised."""
        found = next((record for record in plan.methods if record.method == "block_quantization"), None)
        if found is None:
            return None
        return cls(operators=tuple(OperatorBits.of(use) for use in uses_of(found.structure)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BitsRecord":
        """Rebuild the part; raises ValueError naming the field that is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"field 'bits' is {data!r}: expected a mapping")
        return cls(operators=tuple(OperatorBits.from_dict(row) for row in list_field(data, "operators")))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"operators": [dict(vars(row)) for row in self.operators]}

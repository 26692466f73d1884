"""The section about bits: which operators became integers, and in which blocks.

`page` puts it beside the others of `sections`.
"""

from lightning_compress.report.bits_record import OperatorBits
from lightning_compress.report.markup import element, section, table
from lightning_compress.report.record import RunRecord

__all__ = ["bits"]

_SUMMARY = (
    "What is listed holds integers, or is computed in them; numbers that share a block share a factor. Everything else "
    "stayed in floats. Fewer bits are memory first: for speed open the model with load(folder, backend='auto'), and "
    "time it with lightning-compress bench."
)


def bits(record: RunRecord) -> str:
    """Return the section; empty where nothing was quantised."""
    if record.bits is None:
        return ""
    rows = [_row(operator) for operator in record.bits.operators]
    listing = table(["Operator", "Places", "Bits", "Block", "Factor"], rows)
    return section("Bits", element("p", _SUMMARY), listing)


def _row(found: OperatorBits) -> list[str]:
    bits = "integers" if found.bits is None else str(found.bits)
    return [found.operator.capitalize(), f"{found.places:,}", bits, found.block or "–", found.factor or "–"]

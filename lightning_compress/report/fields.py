"""Fields of a record read back from JSON: each is checked, and an error names the field and its value.

Used by `record` and `dropping_record`.
"""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["count_field", "list_field", "mapping_field", "number_field", "optional_field", "text_field"]


def number_field(data: Mapping[str, Any], name: str, upper: float = math.inf, *, lower: float = 0.0) -> float:
    """Return a finite number from `lower` to `upper`; raises ValueError naming the field."""
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not lower <= value <= upper:
        raise ValueError(f"field {name!r} is {value!r}: expected a number in [{lower:g}, {upper:g}]")
    if not math.isfinite(value):
        raise ValueError(f"field {name!r} is {value!r}: expected a finite number")
    return float(value)


def count_field(data: Mapping[str, Any], name: str) -> int:
    """Return a whole number of at least 0; raises ValueError naming the field."""
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"field {name!r} is {value!r}: expected a whole number of at least 0")
    return value


def text_field(data: Mapping[str, Any], name: str) -> str:
    """Return a text that is not empty; raises ValueError naming the field."""
    value = data.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"field {name!r} is {value!r}: expected a text")
    return value


def mapping_field(
    data: Mapping[str, Any], name: str, default: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Return a mapping, the default where the field is absent; raises ValueError naming the field."""
    value = data.get(name, default)
    if not isinstance(value, Mapping):
        raise ValueError(f"field {name!r} is {value!r}: expected a mapping")
    return value


def optional_field(data: Mapping[str, Any], name: str, lower: float = 0.0) -> float | None:
    """Return a finite number of at least `lower`, None where it is absent; raises ValueError naming the field."""
    return None if data.get(name) is None else number_field(data, name, lower=lower)


def list_field(data: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list, empty where the field is absent; raises ValueError naming the field."""
    value = data.get(name, [])
    if not isinstance(value, list | tuple):
        raise ValueError(f"field {name!r} is {value!r}: expected a list")
    return list(value)

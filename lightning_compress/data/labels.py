"""What the labels of a data set are, and how they become numbers.

The next chapter is :mod:`lightning_compress.data.text_classification`, which infers the labels of the
training part and encodes those of the others by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LabelSpace", "infer_label_space"]


@dataclass(frozen=True)
class LabelSpace:
    """The set that labels come from.

    Example:
        >>> LabelSpace(num_labels=2, names=("ham", "spam"), is_named=True).encode(["spam", "ham"], "the file")
        [1, 0]
    """

    num_labels: int
    """Number of classes, or 1 for regression."""
    names: tuple[str, ...] | None = None
    """Readable names of the classes in the order of their numbers; None if they have none."""
    is_named: bool = False
    """Whether the data hold names rather than numbers."""
    is_regression: bool = False
    """Whether labels are real numbers."""

    def encode(self, values: Sequence[Any], where: str) -> list[int] | list[float]:
        """Turn labels as they were read into class numbers in [0, num_labels), or into floats for regression.

        Args:
            values: Labels: numbers, or strings that spell numbers or class names.
            where: What they were read from, for the message.

        Raises:
            ValueError: A label that is missing, not a number, an unknown name, or outside the range; the
                message names the row (1 is the first row of data).
        """
        return [self._encode_one(value, f"{where}, row {row}") for row, value in enumerate(values, start=1)]

    def _encode_one(self, value: Any, where: str) -> Any:
        if self.is_regression:
            return _as_float(value, where)
        if self.is_named and self.names is not None:
            name = str(value)
            if name not in self.names:
                raise ValueError(
                    f"{where}: label {name!r} is none of the training labels {list(self.names)}."
                )
            return self.names.index(name)
        number = _as_int(value)
        if number is None:
            raise ValueError(f"{where}: label {value!r} is not a whole number, as the training labels are.")
        if not 0 <= number < self.num_labels:
            raise ValueError(
                f"{where}: label {number} is outside the range 0..{self.num_labels - 1}. Correct the file,"
                " or set `num_classes` to the true number of classes."
            )
        return number


def infer_label_space(
    values: Sequence[Any],
    where: str,
    *,
    num_classes: int | None = None,
    regression: bool = False,
    names: Sequence[str] | None = None,
) -> LabelSpace:
    """Find out what the labels are from those of the training part.

    If every label is a whole number they are class numbers, and there are ``max + 1`` classes. If none is,
    they are class names, numbered in alphabetical order.

    Args:
        values: Labels of the training part as read.
        where: What they were read from, for the message.
        num_classes: Number of classes if it is known.
        regression: Take labels as real numbers.
        names: Readable names for class numbers, if the data set comes with them.

    Raises:
        ValueError: Labels missing or of mixed kinds, negative, or more classes than ``num_classes``.
    """
    if regression:
        return LabelSpace(1, is_regression=True)
    for row, value in enumerate(values, start=1):
        if value is None or str(value).strip() == "":
            raise ValueError(f"{where}, row {row}: the label is missing.")
    numbers = [_as_int(value) for value in values]
    known = [number for number in numbers if number is not None]
    if names is not None:
        return LabelSpace(len(names), tuple(names), is_named=not known)
    if not known:
        return _named_space(sorted({str(value) for value in values}), where, num_classes)
    if len(known) < len(numbers):
        row = numbers.index(None)
        raise ValueError(
            f"{where}, row {row + 1}: label {values[row]!r} is not a whole number while other labels are."
            " Labels must be all whole numbers or all names; for real numbers set `regression=True`."
        )
    return LabelSpace(num_classes if num_classes is not None else max(max(known) + 1, 2))


def _named_space(found: list[str], where: str, num_classes: int | None) -> LabelSpace:
    if num_classes is not None and len(found) != num_classes:
        raise ValueError(
            f"{where} holds {len(found)} different labels {found[:10]}, but `num_classes={num_classes}`. If"
            " they are real numbers set `regression=True`."
        )
    if all(_is_float(name) for name in found):
        raise ValueError(
            f"{where}: labels such as {found[0]!r} are real numbers; set `regression=True`, or give whole"
            " numbers."
        )
    if len(found) < 2:
        raise ValueError(f"{where}: every label is {found[0]!r}; at least two classes are needed.")
    return LabelSpace(len(found), tuple(found), is_named=True)


def _as_int(value: Any) -> int | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _as_float(value: Any, where: str) -> float:
    if not _is_float(value):
        raise ValueError(f"{where}: label {value!r} is not a finite number, as regression needs.")
    return float(value)


def _is_float(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False

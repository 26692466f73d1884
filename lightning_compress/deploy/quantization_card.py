"""What a model card says of a quantised model: which operators are integers, of how many bits, in which blocks.

Used by :mod:`lightning_compress.deploy.model_card`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.operator_formats import OperatorFormats

__all__ = ["describe_quantization"]


def describe_quantization(model: nn.Module, structure: Mapping[str, Any]) -> str:
    """Return a table with a row for each kind of operator.

    Args:
        model: The model; nothing of it is needed.
        structure: As :func:`~lightning_compress.nn.quantization_plan.quantize_model` returns it.

    Example:
        >>> formats = OperatorFormats(weight=BlockFormat(4, (1, 128)), norm=True).to_dict()
        >>> places = {"linears": ["a", "b"], "embeddings": [], "attention": [], "activations": {}, "norms": ["c"]}
        >>> print(describe_quantization(nn.Module(), {"formats": formats, **places}))
        | operator | places | bits | block | factor |
        | --- | --- | --- | --- | --- |
        | linear weights | 2 | 4 | 1 × 128 | scale |
        | norms | 1 | integers |  |  |
    """
    formats = OperatorFormats.from_dict(structure["formats"])
    count = {kind: len(paths) for kind, paths in structure.items() if kind not in ("formats", "merged")}
    held = [
        ("linear weights", count["linears"], formats.weight),
        ("inputs of linears", count["linears"], formats.input),
        ("tables", count["embeddings"], formats.embedding),
        ("query, key and value", count["attention"], formats.attention),
    ]
    computed = [
        ("softmax", count["attention"], formats.softmax),
        ("activations", count["activations"], formats.activation),
        ("norms", count["norms"], formats.norm),
    ]
    rows = [(name, str(places), *_words(form)) for name, places, form in held if form is not None]
    rows += [(name, str(places), "integers", "", "") for name, places, is_chosen in computed if is_chosen]
    head = [("operator", "places", "bits", "block", "factor"), ("---",) * 5]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def _words(form: BlockFormat) -> tuple[str, str, str]:
    sides = ["all" if side == 0 else str(side) for side in form.block]
    return str(form.bits), "row" if form.block == (1, 0) else " × ".join(sides), form.factor

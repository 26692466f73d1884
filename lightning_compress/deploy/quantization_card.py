"""What a model card says of a quantised model: which operators are integers, of how many bits, in which blocks.

Used by :mod:`lightning_compress.deploy.model_card`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.operator_formats import uses_of

__all__ = ["describe_quantization"]


def describe_quantization(model: nn.Module, structure: Mapping[str, Any]) -> str:
    """Return a table with a row for each kind of operator.

    Args:
        model: The model; nothing of it is needed.
        structure: As :func:`~lightning_compress.nn.quantization_plan.quantize_model` returns it.

    Example:
        >>> from lightning_compress.nn.operator_formats import OperatorFormats
        >>> formats = OperatorFormats(weight=BlockFormat(4, (1, 128)), norm=True).to_dict()
        >>> places = {"linears": ["a", "b"], "embeddings": [], "attention": [], "activations": {}, "norms": ["c"]}
        >>> print(describe_quantization(nn.Module(), {"formats": formats, **places}))
        | operator | places | bits | block | factor |
        | --- | --- | --- | --- | --- |
        | linear weights | 2 | 4 | 1 × 128 | scale |
        | norms | 1 | integers |  |  |
    """
    rows = [(use.name, str(use.places), *_words(use.form)) for use in uses_of(structure)]
    head = [("operator", "places", "bits", "block", "factor"), ("---",) * 5]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def _words(form: BlockFormat | None) -> tuple[str, str, str]:
    return ("integers", "", "") if form is None else (str(form.bits), form.block_in_words, form.factor)

"""Where training is to see rounding: the places that will be quantised, and which of their features width gates leave.

Places are asked of a copy without weights, in which layers in training form are what they will be, so that what cannot
be quantised is known before training. The next chapter is :mod:`lightning_compress.nn.block_quantization`.

Shape legend: K features of one kind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.operator_formats import OperatorFormats
from lightning_compress.nn.quantized_places import check_finite, find_places
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import replace_module
from lightning_compress.nn.width_gate import StructureGate
from lightning_compress.nn.width_slimming import WidthGates

__all__ = ["Features", "features_of", "left_out", "places_in_training"]

_READERS = ("query", "key", "value", "query_key_value", "ffn_in", "ffn_gate")
_WRITERS = ("attention_output", "ffn_out")


@dataclass
class Features:
    """Features that a gate leaves: each of its structures stands for some next to each other.

    Example:
        >>> gate = StructureGate(size=3, width=1)
        >>> features = Features(gate, width=2)
        >>> features.kept() is None
        True
        >>> gate.close(torch.tensor([1.0, 0.0, 1.0]))
        >>> features.kept()
        tensor([0, 1, 4, 5])
    """

    gate: StructureGate
    width: int = 1
    copies: int = 1
    """How often all of them follow each other, as query, key and value of one linear do."""
    _seen: tuple[int, Tensor] | None = field(default=None, repr=False)

    def kept(self) -> Tensor | None:
        """Return their indices ``[K]``, ascending; None if all are left, or gates are drawn and nothing is decided."""
        gate = self.gate
        if gate.is_open or gate.is_sampled:
            return None
        version = gate.gate_K._version
        if self._seen is None or self._seen[0] != version or self._seen[1].device != gate.gate_K.device:
            with torch.inference_mode(False):  # training may need the indices that validation asked for first
                kept_K = gate.gate_K.repeat_interleave(self.width).repeat(self.copies).nonzero().flatten()
            self._seen = version, kept_K
        return self._seen[1]


def places_in_training(
    model: nn.Module, formats: OperatorFormats, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what :func:`~lightning_compress.nn.quantized_places.find_places` would of the model as it was dense.

    Raises:
        ValueError: If an operator or a pattern of ``exclude`` finds nothing, or what is found cannot be quantised or
            has weights that are not finite.
    """
    memo: dict[int, Any] = {id(t): _empty(t) for t in [*model.parameters(), *model.buffers()]}
    skeleton = copy.deepcopy(model, memo)
    for path, module in list(skeleton.named_modules()):
        if isinstance(module, SoftThresholdLinear):
            replace_module(skeleton, path, module.dense_blank())
    places = find_places(skeleton, formats, exclude)
    check_finite(model, places)
    return places


def left_out(model: nn.Module, formats: OperatorFormats, places: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the paths of what could be quantised, but is not among these places or part of one of them.

    A place may have become several since: the two factors of a linear, or a narrow table and what widens it.
    """
    chosen = {path for paths in places.values() for path in paths}
    split = {*places["linears"], *places["embeddings"]}
    whole = [path for paths in find_places(model, formats).values() for path in paths]
    return [path for path in whole if path not in chosen and path.rpartition(".")[0] not in split]


def features_of(model: nn.Module, gates: WidthGates) -> dict[str, tuple[Features | None, Features | None]]:
    """Return for each path what gates leave of inputs and outputs of the module there; None for all."""
    anatomy = describe(model)
    found: dict[str, tuple[Features | None, Features | None]] = {}
    hidden = None if gates.hidden is None else Features(gates.hidden)
    for layer, heads, neurons in zip(anatomy.layers, gates.heads, gates.neurons, strict=True):
        of_neurons, of_queries = Features(neurons), Features(heads, heads.width)  # type: ignore[arg-type]
        of_keys = Features(heads, layer.head_dim)  # type: ignore[arg-type]
        inputs = {
            **dict.fromkeys(_READERS, hidden),
            "attention_output": of_queries,
            "ffn_out": of_neurons,
        }
        outputs = {
            **dict.fromkeys(_WRITERS, hidden),
            "query": of_queries,
            "key": of_keys,
            "value": of_keys,
            "query_key_value": Features(heads, heads.width, copies=3),  # type: ignore[arg-type]
            "ffn_in": of_neurons,
            "ffn_gate": of_neurons,
        }
        for slot in layer.linears:
            found[slot.path] = inputs.get(slot.role), outputs.get(slot.role)
        if layer.activation is not None:
            found[layer.activation] = None, of_neurons
    norms = [norm for layer in anatomy.layers for norm in layer.norms]
    return found | dict.fromkeys((*norms, *anatomy.residual_writers), (None, hidden))


def _empty(tensor: Tensor) -> Tensor:
    empty = tensor.to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

"""One post-norm layer over packed rows, built from the parts of the family's own layer.

The parts stay where they are: the block looks them up at each call, so linears that were replaced, quantised or
wrapped since run as what they are now. The next chapter is :mod:`lightning_compress.runtime.encoder`, which runs
one such block after the other.

Shape legend: B sequences, T padded length, N rows, Q rows that query, D hidden size, A width of all heads, H heads,
E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.nn.anatomy import LayerAnatomy
from lightning_compress.nn.quantized_attention import BlockAttention
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime.attention import packed_attention, padded_attention
from lightning_compress.runtime.fusion import FusedLinears, is_plain
from lightning_compress.runtime.joined_engine import joined_engine

__all__ = ["LeanLayer"]


class LeanLayer:
    """Runs a layer's modules without the layer's own code: equal to it up to rounding.

    ``y = norm(x + output(attention(x)))``, then ``z = norm(y + ffn_out(activation(ffn_in(y))))``. Query, key and
    value run as one product where they are plain linears, or quantised ones with an engine, whose gradients
    nobody wants. Not a module: it owns nothing, and registers nothing under a second name. Hooks on the parts run;
    hooks on the layer and on its inner containers do not.

    Args:
        layer: The family's own layer.
        anatomy: What is where in it, by paths from the model.

    Raises:
        ValueError: If the layer has another number of linears or norms, or its activation is no module.
    """

    def __init__(self, layer: nn.Module, anatomy: LayerAnatomy) -> None:
        if anatomy.activation is None or len(anatomy.norms) != 2:
            raise ValueError(
                f"layer {anatomy.path!r} cannot run packed: it needs two norms and an activation that is a module, "
                f"and has norms {list(anatomy.norms)} and activation {anatomy.activation}"
            )
        self.layer = layer
        self.head_dim = anatomy.head_dim
        self._attention = get_module(layer, (anatomy.attention or "").removeprefix(f"{anatomy.path}."))
        at = {slot.role: _Slot.find(layer, anatomy, slot.path) for slot in anatomy.linears}
        self._query, self._key, self._value = at["query"], at["key"], at["value"]
        self._output, self._ffn_in, self._ffn_out = at["attention_output"], at["ffn_in"], at["ffn_out"]
        self._activation = _Slot.find(layer, anatomy, anatomy.activation)
        self._attention_norm, self._ffn_norm = (_Slot.find(layer, anatomy, path) for path in anatomy.norms)
        self._attention_dropout, self._output_dropout, self._ffn_dropout = (
            None if path is None else _Slot.find(layer, anatomy, path)
            for path in (anatomy.attention_dropout, anatomy.output_dropout, anatomy.ffn_dropout)
        )
        self._fused = FusedLinears()

    def __call__(self, hidden_ND: Tensor, segments: Segments, queries_B: Tensor | None = None) -> Tensor:
        """Return the rows after the layer, ``[N, D]``.

        Args:
            hidden_ND: The rows before the layer. More than ``segments`` knows of may follow: they are carried along,
                and seen by nobody.
            segments: Which sequence each row belongs to.
            queries_B: One row of each sequence, in order: all rows serve as keys and values, and only these are
                computed and returned, ``[B, D]``. None computes all.
        """
        attended_QA = self._attend(hidden_ND, segments, queries_B)
        return self.after_attention(
            attended_QA, hidden_ND if queries_B is None else hidden_ND.index_select(0, queries_B)
        )

    def padded(self, hidden_BTD: Tensor, seen_BT: Tensor, *, first_only: bool = False) -> Tensor:
        """Return the states after the layer, ``[B, T, D]``, for shapes that must not depend on values; in evaluation.

        Args:
            hidden_BTD: The states before the layer.
            seen_BT: True for tokens that serve as keys; the others come out as they may.
            first_only: Compute and return the first token of each sequence only, ``[B, 1, D]``.
        """
        queries_BQD, attend = hidden_BTD[:, :1] if first_only else hidden_BTD, self.block_attention
        if hidden_BTD.shape[1] == 1 and attend is None:  # the only key gets all the attention
            return self.after_attention(_run(self._value.module, hidden_BTD), queries_BQD)
        query, key, value = (part.transpose(1, 2) for part in self._project_padded(hidden_BTD, first_only))
        seen_B11T = seen_BT[:, None, None, :]
        if attend is not None:
            attended, _ = attend(query, key, value, seen_B11T)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B11T)
        return self.after_attention(attended.transpose(1, 2).flatten(2), queries_BQD)

    def after_attention(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Return what the layer makes of attended values ``[..., A]`` and what went in, ``[..., D]``."""
        output = _dropped(self._output_dropout, _run(self._output.module, attended))
        hidden = _run(self._attention_norm.module, output + residual)
        inner = _run(self._activation.module, _run(self._ffn_in.module, hidden))
        output = _dropped(self._ffn_dropout, _run(self._ffn_out.module, inner))
        return _run(self._ffn_norm.module, output + hidden)

    @property
    def block_attention(self) -> BlockAttention | None:
        """How the layer attends in integers; None attends in floating point."""
        return getattr(self._attention, "block_attention", None)

    def _attend(self, hidden_ND: Tensor, segments: Segments, queries_B: Tensor | None) -> Tensor:
        attend = self.block_attention
        dropout = self._attention_dropout.module if self._attention_dropout is not None else None
        probability = float(getattr(dropout, "p", 0.0)) if dropout is not None and dropout.training else 0.0
        is_alone = segments.num_rows == segments.num_sequences and probability == 0.0 and attend is None
        if (
            is_alone and not torch.is_grad_enabled()
        ):  # DDP waits for gradients of query and key, if only zeros
            rows_QD = hidden_ND if queries_B is None else hidden_ND.index_select(0, queries_B)
            return _run(self._value.module, rows_QD)  # the only key gets all the attention
        query, key, value = (rows[: segments.num_rows] for rows in self._project(hidden_ND, queries_B))
        of_queries = segments if queries_B is None else _one_each(segments, queries_B)
        rows: Any = (query, key, value, of_queries, segments)
        if attend is None:
            attended_QA = packed_attention(*rows, dropout=probability).flatten(1)
        else:
            attended_QA = padded_attention(*rows, dropout=probability, attend=attend).flatten(1)
        spare = 0 if queries_B is not None else hidden_ND.shape[0] - segments.num_rows
        return F.pad(attended_QA, (0, 0, 0, spare)) if spare else attended_QA

    def _project(self, hidden_ND: Tensor, queries_B: Tensor | None) -> tuple[Tensor, ...]:
        """Return query ``[Q, H, E]``, key and value ``[N, H, E]``."""
        modules = (self._query.module, self._key.module, self._value.module)
        fused = self._fused.of(modules)
        joined = joined_engine(modules) if fused is None and queries_B is None else None
        if joined is not None:
            projected = joined(hidden_ND)
        elif fused is None:
            rows_QD = hidden_ND if queries_B is None else hidden_ND.index_select(0, queries_B)
            inputs = (rows_QD, hidden_ND, hidden_ND)
            projected = [_run(module, rows) for module, rows in zip(modules, inputs, strict=True)]
        elif queries_B is None:
            projected = F.linear(hidden_ND, fused.weight_SD, fused.bias_S).split(fused.sizes, dim=1)
        else:
            size, bias_S = fused.sizes[0], fused.bias_S
            both = F.linear(hidden_ND, fused.weight_SD[size:], None if bias_S is None else bias_S[size:])
            projected = (
                _run(modules[0], hidden_ND.index_select(0, queries_B)),
                *both.split(fused.sizes[1:], dim=1),
            )
        return tuple([rows.unflatten(1, (-1, self.head_dim)) for rows in projected])

    def _project_padded(self, hidden_BTD: Tensor, first_only: bool) -> tuple[Tensor, ...]:
        """Return query ``[B, Q, H, E]``, key and value ``[B, T, H, E]``."""
        modules = (self._query.module, self._key.module, self._value.module)
        fused = None if first_only else self._fused.of(modules)
        joined = joined_engine(modules) if fused is None and not first_only else None
        if joined is not None:
            projected = joined(hidden_BTD)
        elif fused is None:
            inputs = (hidden_BTD[:, :1] if first_only else hidden_BTD, hidden_BTD, hidden_BTD)
            projected = [_run(module, states) for module, states in zip(modules, inputs, strict=True)]
        else:
            projected = F.linear(hidden_BTD, fused.weight_SD, fused.bias_S).split(fused.sizes, dim=-1)
        return tuple([states.unflatten(-1, (-1, self.head_dim)) for states in projected])


class _Slot:
    """A place where a module sits, whatever has taken its place since."""

    def __init__(self, parent: nn.Module, name: str) -> None:
        self._siblings, self._name = parent._modules, name

    @classmethod
    def find(cls, layer: nn.Module, anatomy: LayerAnatomy, path: str) -> _Slot:
        """Return the slot at a path that starts from the model."""
        parent, _, name = path.removeprefix(f"{anatomy.path}.").rpartition(".")
        return cls(get_module(layer, parent), name)

    @property
    def module(self) -> nn.Module:
        """What sits there now."""
        return self._siblings[self._name]  # type: ignore[return-value]


def _run(module: nn.Module, rows: Tensor) -> Tensor:
    """Call a module; a plain linear without the module machinery, which costs as much as a small product."""
    if is_plain(module):
        return F.linear(rows, module._parameters["weight"], module._parameters["bias"])  # type: ignore[arg-type]
    return module(rows)


def _dropped(slot: _Slot | None, rows: Tensor) -> Tensor:
    return slot.module(rows) if slot is not None and slot.module.training else rows


def _one_each(segments: Segments, queries_B: Tensor) -> Segments:
    """Return the segments of one row of each sequence."""
    starts_B1 = torch.arange(
        segments.num_sequences + 1, device=queries_B.device, dtype=segments.cu_seqlens_B1.dtype
    )
    return Segments(starts_B1, segments.origin_N[queries_B])

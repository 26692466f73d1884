"""A static model as a function of tensors to one tensor, and that function as an ONNX graph.

:mod:`lightning_compress.deploy.export` calls this; the next chapter is :mod:`lightning_compress.deploy.onnx_int8`.

Shape legend: B sequences, T padded length, H heads, Q queries, K keys, E head width.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe, find_transformer

__all__ = ["OnnxProgram", "forget_sources", "to_onnx"]

_HIDDEN = -1e30
"""What is added to the product with a key that is not seen: finite, so that no row of a softmax can become NaN."""


class OnnxProgram(nn.Module):
    """A model as a function of ids, mask and, where the model tells segments apart, segment ids.

    Args:
        model: A model whose shapes do not depend on values, or a module that holds one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = find_transformer(model)[1]
        taken = inspect.signature(self.model.forward).parameters
        has_segments = "token_type_ids" in taken and getattr(self.model.config, "type_vocab_size", 0) > 1
        self.names = ("input_ids", "attention_mask", *(("token_type_ids",) if has_segments else ()))
        self.output = "last_hidden_state" if describe(self.model).head is None else "logits"

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output, from inputs ``[B, T]`` in the order of :attr:`names`."""
        return self.model(**dict(zip(self.names, inputs, strict=True)))[0]

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Return random texts, of which the first is of full length."""
        generator = torch.Generator().manual_seed(0)
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        ids_BT = torch.randint(0, self.model.config.vocab_size, (batch, length), generator=generator)
        lengths_B = torch.randint(2, length + 1, (batch,), generator=generator)
        lengths_B[0] = length
        mask_BT = (torch.arange(length) < lengths_B[:, None]).long()
        ids_BT = ids_BT.masked_fill(mask_BT == 0, padding)
        return (ids_BT, mask_BT, torch.zeros_like(ids_BT))[: len(self.names)]


def to_onnx(program: OnnxProgram, inputs: tuple[Tensor, ...], dynamic: dict[int, Any]) -> Any:
    """Return the program as an ``onnx.ModelProto`` in the dtype of its weights.

    Args:
        program: In evaluation mode.
        inputs: An example.
        dynamic: ``torch.export.Dim`` of those dimensions of all inputs that may differ from the example's.
    """
    sizes = ((dynamic,) * len(inputs),) if dynamic else None
    # not by TorchScript, which is deprecated, and warns that it takes branches over the mask for constants
    with torch.no_grad(), _quiet("torch.onnx"):
        exported = torch.export.export(program, inputs, dynamic_shapes=sizes)
        onnx_program = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=list(program.names),
            output_names=[program.output],
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
            verbose=False,
        )
    assert onnx_program is not None
    return onnx_program.model_proto


def forget_sources(graph_model: Any) -> None:
    """Drop the exporter's notes, which name files of the machine that exported, line by line."""
    for part in (graph_model, graph_model.graph, *graph_model.graph.node, *graph_model.graph.value_info):
        del part.metadata_props[:]


def _attention(
    query_BHQE: Any,
    key_BHKE: Any,
    value_BHKE: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Write attention down without what guards the exporter's own form against rows that see nothing.

    Here each text has its first token. The guards (IsNaN, Where) read and write ``[B, H, Q, K]`` in each layer.
    """
    assert not (is_causal or enable_gqa or dropout_p), "encoders attend in both directions"
    import onnxscript  # pyright: ignore[reportMissingImports]

    op: Any = onnxscript.opset20
    factor = op.Constant(value_float=query_BHQE.shape[-1] ** -0.5 if scale is None else float(scale))
    logits_BHQK = op.MatMul(op.Mul(query_BHQE, factor), op.Transpose(key_BHKE, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        zero, hidden = op.Constant(value_float=0.0), op.Constant(value_float=_HIDDEN)
        logits_BHQK = op.Add(logits_BHQK, op.Where(attn_mask, zero, hidden))
    return op.MatMul(op.Softmax(logits_BHQK, axis=-1), value_BHKE)


@contextmanager
def _quiet(name: str | None = None) -> Iterator[None]:
    """Keep advice that is about the exporter's own affairs from the user."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)
            yield
    finally:
        logger.setLevel(before)

"""Embeddings in few bits, and norms and activations that are computed in integers.

The next chapter is :mod:`lightning_compress.nn.quantized_attention`.

Shape legend: ... any leading sizes, V entries of a table, D width, G blocks over the width.

Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483) name these operators; their bodies were not readable:
BCT-style, our own design.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.nn.block_format import BlockFormat, unpack_payload
from lightning_compress.nn.integer_functional import (
    activation_of_integers,
    layernorm_of_integers,
    rmsnorm_of_integers,
)
from lightning_compress.nn.packed_matrix import PackedMatrix
from lightning_compress.ops.block_dequantize import block_dequantize

__all__ = ["QuantizedActivation", "QuantizedEmbedding", "QuantizedNorm", "activation_function", "is_norm"]

_EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class QuantizedEmbedding(PackedMatrix):
    """Looks integers up, and writes out only what was looked up.

    Args:
        num_embeddings: Entries V of the table.
        embedding_dim: Width D.
        weight_format: In which blocks of how many bits the table is held.
        padding_idx: Entry for padding, as the table that this one takes the place of has it.
        device: Where the uninitialised buffers are.
        dtype: Dtype of what comes out, changed by casts.

    Example:
        >>> table = nn.Embedding.from_pretrained(torch.tensor([[7.0, 1.2], [0.1, -0.7]]))
        >>> QuantizedEmbedding.from_embedding(table, BlockFormat(4))(torch.tensor([1, 0]))
        tensor([[ 0.1000, -0.7000],
                [ 7.0000,  1.0000]])
    """

    like: Tensor
    """Empty, and in no state: tells the dtype of what comes out."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        weight_format: BlockFormat,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, weight_format, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @classmethod
    def from_embedding(
        cls, table: nn.Embedding, weight_format: BlockFormat, *, fill: bool = True
    ) -> QuantizedEmbedding:
        """Quantise a table.

        Args:
            table: The table.
            weight_format: In which blocks of how many bits it is to be held.
            fill: Whether to take over the weight. Otherwise, and on the meta device, it is to be loaded next.

        Raises:
            ValueError: If the table limits norms when it is read, or holds infinities or NaN.
        """
        if table.max_norm is not None:
            raise ValueError(f"a table with max_norm={table.max_norm} changes when it is read: leave it out")
        weight_VD = table.weight.detach()
        like: Any = {"device": weight_VD.device, "dtype": weight_VD.dtype}
        new = cls(table.num_embeddings, table.embedding_dim, weight_format, table.padding_idx, **like)
        if fill and not weight_VD.is_meta:
            new.store(weight_VD)
        return new.train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings ``[..., D]`` of ids ``[...]``."""
        held, flat = self.weight_format, ids.flatten()
        payload = unpack_payload(self.weight_payload.index_select(0, flat), held.bits, self.embedding_dim)
        rows = held.block[0] or self.num_embeddings
        factors = self.weight_factors.index_select(0, flat if rows == 1 else flat // rows)
        looked_up = block_dequantize(payload, factors, (1, held.block[1]))
        return looked_up.to(self.like.dtype).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Show shape and format in the module's printed form."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.weight_format}"


class QuantizedNorm(nn.Module):
    """LayerNorm or RMSNorm in integers, with the parameters of the norm whose place it takes, under the same names.

    Args:
        norm: The norm, see :func:`is_norm`.

    Raises:
        TypeError: If it is another module.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        if not is_norm(norm):
            raise TypeError(
                f"a {type(norm).__name__} is no LayerNorm or RMSNorm over one dimension with a weight"
            )
        self.is_centred = isinstance(norm, nn.LayerNorm)
        self.eps = float(cast(Any, norm.eps if self.is_centred else norm.variance_epsilon))
        self.register_parameter("weight", cast(nn.Parameter, norm.weight))
        self.register_parameter("bias", cast(nn.Parameter | None, getattr(norm, "bias", None)))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., D]``."""
        if self.is_centred:
            return layernorm_of_integers(x, self.weight, self.bias, self.eps)
        return rmsnorm_of_integers(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Show the kind of norm in the module's printed form."""
        return f"{len(self.weight)}, eps={self.eps}, is_centred={self.is_centred}"


class QuantizedActivation(nn.Module):
    """An activation function in integers.

    Args:
        function: ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``, see :func:`activation_function`.

    Raises:
        ValueError: If it is another one.
    """

    FUNCTIONS: ClassVar[tuple[str, ...]] = tuple(_EXACT)

    def __init__(self, function: str) -> None:
        super().__init__()
        if function not in self.FUNCTIONS:
            raise ValueError(f"function={function!r} is not one of {list(self.FUNCTIONS)}")
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to every element."""
        return activation_of_integers(x, self.function)

    def extra_repr(self) -> str:
        """Show the function in the module's printed form."""
        return self.function


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a LayerNorm over one dimension, or a transformers RMSNorm, with a weight.

    Example:
        >>> is_norm(nn.LayerNorm(4)), is_norm(nn.LayerNorm((2, 2))), is_norm(nn.Identity())
        (True, False, False)
    """
    weight = getattr(module, "weight", None)
    is_known = isinstance(module, nn.LayerNorm) or (
        type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    )
    return is_known and isinstance(weight, nn.Parameter) and weight.dim() == 1


@torch.no_grad()
def activation_function(module: nn.Module) -> str | None:
    """Return the name of the function that a module computes, found by trying it; None if it is none of those known.

    Example:
        >>> activation_function(nn.GELU("tanh")), activation_function(nn.Tanh())
        ('gelu_tanh', None)
    """
    if any(True for _ in module.parameters()):
        return None
    x = torch.linspace(-6.0, 6.0, 97, device="cpu", dtype=torch.float32)
    y = module.forward(x)
    return next((name for name, exact in _EXACT.items() if torch.allclose(y, exact(x), atol=1e-6)), None)

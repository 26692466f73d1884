"""Embeddings as training sees them: only the rows that are looked up are rounded.

Where width gates narrow the word embeddings, training sees their rows rounded before they are projected. At full
strength and without gradients they are decomposed, and both factors rounded, as they will be.

Shape legend: ... any leading sizes, V entries, D width, E width that counts, U blocks looked up, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.factored_embedding import FactoredEmbedding
from lightning_compress.nn.fake_quantize import fake_quantize
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedEmbedding
from lightning_compress.nn.rounded_operators import Ramp, scattered
from lightning_compress.nn.width_gate import RankGate

__all__ = ["NarrowEmbedding", "rounded_embedding", "rounded_rows"]


def rounded_embedding(
    table: nn.Embedding,
    ids: Tensor,
    output: Tensor,
    ramp: Ramp,
    kept_D: Tensor | None,
    *,
    form: BlockFormat,
    narrow: NarrowEmbedding | None = None,
) -> Tensor:
    """Return the embeddings ``[..., D]`` of ids ``[...]`` from a rounded table; channels that do not count are zero.

    Args:
        table: The table.
        ids: What is looked up.
        output: What was looked up, exactly, and projected if ``narrow`` is given.
        ramp: How much of the rounding is seen.
        kept_D: Indices of the channels that count; None for all.
        form: Format of the table.
        narrow: What the table will be, where its rank is gated; None where it stays whole.
    """
    if narrow is not None and not narrow.gate.is_open:
        if ramp.is_as_deployed:
            return scattered(narrow.deployed(table, kept_D)(ids), kept_D, output.shape[-1])
        exact = F.embedding(ids, table.weight, table.padding_idx)
        return narrow.gate(_straight_through(exact, rounded_rows(table.weight, ids, form), ramp))
    exact = output if kept_D is None else output.index_select(-1, kept_D)
    held = rounded_rows(table.weight, ids, form, kept_D)
    return scattered(_straight_through(exact, held, ramp), kept_D, output.shape[-1])


@torch.no_grad()
def rounded_rows(weight_VD: Tensor, ids: Tensor, form: BlockFormat, kept_D: Tensor | None = None) -> Tensor:
    """Return rows ``[..., E]`` of a rounded table, of which no more blocks are rounded than are looked up.

    Example:
        >>> table = torch.tensor([[7.0, 1.2], [0.0, 1.0], [3.5, 0.6]])
        >>> rounded_rows(table, torch.tensor([2, 0]), BlockFormat(bits=4))
        tensor([[3.5000, 0.5000],
                [7.0000, 1.0000]])
    """
    num_rows, rows = len(weight_VD), min(form.block[0] or len(weight_VD), len(weight_VD))
    if rows == 1:
        looked_up = weight_VD.index_select(0, ids.flatten())
        looked_up = looked_up if kept_D is None else looked_up.index_select(1, kept_D)
        return fake_quantize(looked_up, form).unflatten(0, ids.shape)
    blocks_U, place = torch.unique(ids // rows, return_inverse=True)
    steps = torch.arange(rows, device=ids.device)
    wanted = (blocks_U.unsqueeze(1) * rows + steps).clamp_(
        max=num_rows - 1
    )  # the last row again decides no factor
    weight = weight_VD.index_select(0, wanted.flatten())
    weight = weight if kept_D is None else weight.index_select(1, kept_D)
    held = fake_quantize(weight, BlockFormat(form.bits, (rows, form.block[1]), form.factor))
    return F.embedding(place * rows + ids % rows, held)


class NarrowEmbedding:
    """What rank-gated word embeddings will be: a narrow table in few bits, and the linear that widens it.

    Args:
        gate: The gate.
        table: Format of the table.
        weight: Format of the linear; None leaves it as it is.
        inputs: Format of its inputs.
    """

    def __init__(
        self, gate: RankGate, table: BlockFormat, weight: BlockFormat | None, inputs: BlockFormat | None
    ) -> None:
        self.gate, self._table, self._weight, self._inputs = gate, table, weight, inputs
        self._built: tuple[Any, Tensor | None, nn.Module] | None = None

    @torch.no_grad()
    def deployed(self, table: nn.Embedding, kept_D: Tensor | None) -> nn.Module:
        """Return the module that the table will be, built anew where weights or gate have changed."""
        version = [(held.data_ptr(), held._version) for held in (table.weight, self.gate.projector_EE)]
        if self._built is None or self._built[0] != version or self._built[1] is not kept_D:
            self._built = version, kept_D, self._build(table, kept_D)
        return self._built[2]

    def _build(self, table: nn.Embedding, kept_D: Tensor | None) -> nn.Module:
        weight_VD = self.gate(table.weight)
        weight_VD = weight_VD if kept_D is None else weight_VD.index_select(1, kept_D)
        rank = min(int(self.gate.rank), weight_VD.shape[1])
        whole = nn.Embedding(*weight_VD.shape, padding_idx=table.padding_idx, _weight=weight_VD)
        if rank == weight_VD.shape[1]:
            return QuantizedEmbedding.from_embedding(whole, self._table)
        factored = FactoredEmbedding.of(whole, rank)
        narrow = QuantizedEmbedding.from_embedding(factored.table, self._table)
        projection: nn.Module = factored.projection
        if self._weight is not None:
            projection = QuantizedLinear.from_linear(projection, self._weight, self._inputs)
        return nn.Sequential(narrow, projection)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}


def _straight_through(exact: Tensor, held: Tensor, ramp: Ramp) -> Tensor:
    if not torch.is_grad_enabled() or not exact.requires_grad:
        return ramp.blend(exact, held)
    return exact + (ramp.blend(exact, held) - exact).detach()

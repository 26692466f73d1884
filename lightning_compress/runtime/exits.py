"""Examples that leave the packed engine early: their rows go, their states wait, and all come out in the user's order.

:mod:`lightning_compress.runtime.encoder` keeps one :class:`Departed` per forward pass. The next chapter is
:mod:`lightning_compress.runtime.packing`.

Shape legend: B sequences, T padded length, N rows, M rows that stay, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.nn.row_buckets import with_spare_rows
from lightning_compress.nn.segments import Segments
from lightning_compress.ops.compact import compact

__all__ = ["Departed"]


class Departed:
    """Examples of one pass that left early, with the states they left with.

    Args:
        first_only: Whether only the first token of each sequence is wanted in the end.
    """

    def __init__(self, first_only: bool) -> None:
        self._first_only = first_only
        self._states: list[Tensor] = []
        self._places: list[Tensor] = []

    def are_all(self, segments: Segments) -> bool:
        """Whether somebody left and nobody is there any more."""
        return bool(self._states) and segments.num_sequences == 0

    def let_leave(
        self, hidden_ND: Tensor, segments: Segments, stay_B: Tensor | None
    ) -> tuple[Tensor, Segments]:
        """Move the rows of the examples that stay together, and keep what is wanted of the others; None if all stay."""
        if stay_B is None:
            return hidden_ND, segments
        hidden_ND, keep_N = hidden_ND[: segments.num_rows], stay_B[segments.sequence_N]
        if self._first_only:
            left = (~stay_B).nonzero().squeeze(1)
            rows, places = segments.firsts_B[left], segments.examples_B[left]
        else:
            rows = (~keep_N).nonzero().squeeze(1)
            places = segments.origin_N[rows]
        self._states.append(hidden_ND[rows])
        self._places.append(places)
        hidden_MD, cu_seqlens_B1, index_M = compact(hidden_ND, keep_N, segments.cu_seqlens_B1)
        stayed = segments.select(index_M, cu_seqlens_B1).of_sequences(stay_B.nonzero().squeeze(1))
        return with_spare_rows(hidden_MD), stayed

    def put_back(self, hidden_ND: Tensor, segments: Segments, shape_BTD: torch.Size) -> Tensor:
        """Return the states after the last layer, and those of examples that left, in the caller's order."""
        if self._first_only and not self._states:
            return hidden_ND[:, None]
        places = segments.examples_B if self._first_only else segments.origin_N
        states = hidden_ND[: len(places)]
        num_places = shape_BTD[0] if self._first_only else shape_BTD[0] * shape_BTD[1]
        shape = (shape_BTD[0], 1 if self._first_only else shape_BTD[1], shape_BTD[2])
        if not self._states and len(places) == num_places:
            return states.view(shape)
        empty = states.new_zeros((num_places, shape_BTD[2]))
        return empty.index_copy(
            0, torch.cat([places, *self._places]), torch.cat([states, *self._states])
        ).view(shape)

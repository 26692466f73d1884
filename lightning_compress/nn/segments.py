"""Rows of a packed batch: the tokens of several sequences one after the other, without padding.

The next chapter is :mod:`lightning_compress.runtime`, which runs models over such rows.

Shape legend: B sequences, T padded length, N rows, M rows that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Segments", "segment_max", "segment_softmax", "segment_sum"]


@dataclass(frozen=True, eq=False)
class Segments:
    """Which sequence and which place each row came from; rows of a sequence lie together, in order.

    Example:
        >>> segments = Segments.of(torch.tensor([[True, True, False], [True, True, True]]))
        >>> segments.cu_seqlens_B1.tolist(), segments.origin_N.tolist()
        ([0, 2, 5], [0, 1, 3, 4, 5])
    """

    cu_seqlens_B1: Tensor
    """Where each sequence starts, and the number of rows at the end; integers ``[B + 1]``."""
    origin_N: Tensor
    """Place of each row in the padded batch, as an index into its flattened ``[B * T]``; integers ``[N]``."""
    protected_N: Tensor | None = None
    """Rows that never leave, bool ``[N]``; None where only the first of each sequence is protected."""
    example_B: Tensor | None = None
    """Which example of the batch each sequence is, ascending integers ``[B]``; None where every example is there."""

    @classmethod
    def of(cls, real_BT: Tensor, protected_BT: Tensor | None = None) -> Segments:
        """Return the segments of a padded batch.

        Args:
            real_BT: True for tokens, False for padding.
            protected_BT: True for tokens that never leave.

        Raises:
            ValueError: If a sequence has no token.
        """
        lengths_B = real_BT.sum(dim=1)
        if lengths_B.numel() and int(lengths_B.min()) < 1:
            empty = (lengths_B == 0).nonzero().flatten().tolist()
            raise ValueError(f"sequences {empty} of the batch hold no token, only padding: leave them out")
        origin_N = real_BT.flatten().nonzero().squeeze(1)
        protected_N = None if protected_BT is None else protected_BT.flatten()[origin_N]
        return cls(_offsets(lengths_B), origin_N, protected_N)

    @property
    def num_rows(self) -> int:
        """Number of rows N."""
        return self.origin_N.shape[0]

    @property
    def num_sequences(self) -> int:
        """Number of sequences B."""
        return self.cu_seqlens_B1.shape[0] - 1

    @cached_property
    def lengths_B(self) -> Tensor:
        """Rows of each sequence, integers ``[B]``."""
        return self.cu_seqlens_B1.diff()

    @property
    def firsts_B(self) -> Tensor:
        """Row of the first (classification) token of each sequence, integers ``[B]``."""
        return self.cu_seqlens_B1[:-1]

    @cached_property
    def offsets(self) -> list[int]:
        """``cu_seqlens_B1`` on the host; waits for the device once."""
        return self.cu_seqlens_B1.tolist()

    @cached_property
    def sequence_N(self) -> Tensor:
        """Sequence of each row, integers ``[N]``."""
        numbers_B = torch.arange(self.num_sequences, device=self.cu_seqlens_B1.device)
        return torch.repeat_interleave(numbers_B, self.lengths_B, output_size=self.num_rows)

    def select(self, index_M: Tensor, cu_seqlens_B1: Tensor) -> Segments:
        """Return the segments of the rows that stay.

        Args:
            index_M: Which rows stay, ascending.
            cu_seqlens_B1: Where each sequence starts among them.
        """
        protected_M = None if self.protected_N is None else self.protected_N[index_M]
        return Segments(cu_seqlens_B1, self.origin_N[index_M], protected_M, self.example_B)

    @property
    def examples_B(self) -> Tensor:
        """Which example of the batch each sequence is, integers ``[B]``."""
        if self.example_B is not None:
            return self.example_B
        return torch.arange(self.num_sequences, device=self.cu_seqlens_B1.device)

    def of_sequences(self, index_S: Tensor) -> Segments:
        """Return the same rows as those of some sequences only, when all others have no row left.

        Args:
            index_S: The sequences that have rows, ascending.

        Example:
            >>> segments = Segments(torch.tensor([0, 0, 2, 2]), torch.tensor([3, 4])).of_sequences(torch.tensor([1]))
            >>> segments.cu_seqlens_B1.tolist(), segments.examples_B.tolist()
            ([0, 2], [1])
        """
        ends_S = self.cu_seqlens_B1[1:].index_select(0, index_S)
        starts = torch.cat([ends_S.new_zeros((1,)), ends_S])
        return Segments(starts, self.origin_N, self.protected_N, self.examples_B.index_select(0, index_S))

    def of_batch(self, num_examples: int) -> Segments:
        """Return the same rows as those of every example of the batch; examples that left have none.

        Example:
            >>> segments = Segments(torch.tensor([0, 2]), torch.tensor([3, 4]), example_B=torch.tensor([1]))
            >>> segments.of_batch(3).lengths_B.tolist()
            [0, 2, 0]
        """
        if self.example_B is None:
            return self
        lengths_B = self.lengths_B.new_zeros((num_examples,)).index_copy(0, self.example_B, self.lengths_B)
        return Segments(_offsets(lengths_B), self.origin_N, self.protected_N)


def segment_max(values_N: Tensor, segments: Segments) -> Tensor:
    """Return the largest value of each sequence, ``[B]``."""
    if segments.num_sequences == 1:
        return values_N.amax(dim=0, keepdim=True)
    lowest_B = values_N.new_full((segments.num_sequences,), -torch.inf)
    return lowest_B.scatter_reduce(0, segments.sequence_N, values_N, "amax")


def segment_sum(values_N: Tensor, segments: Segments) -> Tensor:
    """Return the sum over each sequence, ``[B]``.

    Example:
        >>> segments = Segments.of(torch.tensor([[True, False], [True, True]]))
        >>> segment_sum(torch.tensor([1.0, 2.0, 3.0]), segments)
        tensor([1., 5.])
    """
    if segments.num_sequences == 1:
        return values_N.sum(dim=0, keepdim=True)
    zero_B = values_N.new_zeros((segments.num_sequences,))
    return zero_B.index_add(0, segments.sequence_N, values_N)


def segment_softmax(logits_N: Tensor, segments: Segments) -> Tensor:
    """Return a distribution over the rows of each sequence, ``[N]``; computed in at least fp32.

    Example:
        >>> segments = Segments.of(torch.tensor([[True, False], [True, True]]))
        >>> segment_softmax(torch.tensor([7.0, 1.0, 1.0]), segments)
        tensor([1.0000, 0.5000, 0.5000])
    """
    logits_N = logits_N.float() if logits_N.dtype in (torch.bfloat16, torch.float16) else logits_N
    if segments.num_sequences == 1:
        return logits_N.softmax(dim=0)
    shifted_N = (logits_N - segment_max(logits_N, segments)[segments.sequence_N]).exp()
    return shifted_N / segment_sum(shifted_N, segments)[segments.sequence_N]


def _offsets(lengths_B: Tensor) -> Tensor:
    zero = lengths_B.new_zeros((1,))
    return torch.cat([zero, lengths_B.cumsum(0)])

"""The order in which examples are drawn: batches of similar length, the same number on every rank.

The next chapter is :mod:`lightning_compress.data.resumable`, the loader that can go on in mid-epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from torch.utils.data import DistributedSampler

__all__ = ["LengthBucketedSampler"]

_BATCHES_PER_POOL = 50


class LengthBucketedSampler(DistributedSampler):
    """Draw indices so that consecutive runs of ``batch_size`` have similar lengths.

    Use it as ``DataLoader(..., batch_size=batch_size, sampler=sampler)``. Examples are shuffled, cut into
    pools of 50 batches, sorted by length within a pool, cut into batches, and the batches are shuffled; the
    incomplete batch comes last and holds random examples. Every epoch has its own order, fixed by ``seed``
    and the epoch number that Lightning (or your loop) sets by ``set_epoch``.

    It is aware of ranks: the ranks share batches of similar length, so that no rank waits for another, and
    each gets the same number of batches (a few examples are repeated where they do not divide evenly). Being
    a ``DistributedSampler`` it is left in place by Lightning, with ``use_distributed_sampler`` on or off.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Examples per batch and rank, at least 1.
        shuffle: Draw in a new order each epoch. Otherwise the order is fixed (but still bucketed).
        bucket: Group by length. Otherwise shuffle only.
        seed: Decides the order.
        num_replicas: Number of ranks.
        rank: This process, in [0, num_replicas).

    Example:
        >>> sampler = LengthBucketedSampler([3, 9, 4, 8], batch_size=2, seed=1)
        >>> order = list(sampler)
        >>> sorted(order[:2]) in ([0, 2], [1, 3])
        True
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        bucket: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        super().__init__(cast(Any, lengths), num_replicas, rank, shuffle=shuffle, seed=seed)
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.bucket = bucket

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices of the current epoch."""
        generator = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        count = len(self.lengths)
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        order = np.resize(order, self.total_size)  # repeats from the start where ranks do not divide evenly
        if self.bucket:
            order = self._bucketed(order, generator)
        return iter(order[self.rank :: self.num_replicas].tolist())

    def _bucketed(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        group = self.batch_size * self.num_replicas
        whole = len(order) - len(order) % group
        pool = group * _BATCHES_PER_POOL if self.shuffle else max(whole, 1)
        pools = [order[start : min(start + pool, whole)] for start in range(0, whole, pool)]
        batches = [
            indices[start : start + group]
            for indices in (part[np.argsort(self.lengths[part], kind="stable")] for part in pools)
            for start in range(0, len(indices), group)
        ]
        shuffled = [batches[index] for index in generator.permutation(len(batches))]
        return np.concatenate([*shuffled, order[whole:]])

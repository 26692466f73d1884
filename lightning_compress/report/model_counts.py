"""Counts of a model against those of the dense one: parameters, FLOPs and bytes.

`callbacks/report.py` asks while training and at the end; `record` is what the answers become.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lightning_compress.nn.flops import count_bytes, count_flops, count_parameters
from lightning_compress.nn.surgery import get_module, linear_shape
from lightning_compress.report.record import FinalRecord, LayerRank, ScopeCounts

__all__ = ["DenseCounts", "ranks_of"]


class DenseCounts(NamedTuple):
    """What the dense model has, and what another one has of it."""

    scopes: ScopeCounts
    flops: float
    """Over the lengths."""
    bytes: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, dense: nn.Module, lengths: Sequence[int]) -> "DenseCounts":
        """Count the dense model, maybe on the meta device."""
        return cls(_scopes(dense), count_flops(dense, lengths).total, count_bytes(dense), tuple(lengths))

    def size_ratio(self, model: nn.Module) -> float:
        """Return the share of the linears' weights that a model has, as it would be deployed."""
        return count_parameters(model).linear / self.scopes.linear

    def flops_ratio(self, model: nn.Module, kept: float = 1.0) -> float:
        """Return the share of the FLOPs that a model spends, as it would be deployed.

        Args:
            model: The model.
            kept: What it spends of its own FLOPs, where tokens leave.
        """
        return kept * count_flops(model, self.lengths).total / self.flops

    def spent(self, ratio: float) -> tuple[float, float]:
        """Return the FLOPs of the dense model, and those of one that spends this share of them."""
        return self.flops, ratio * self.flops

    def against(
        self, model: nn.Module, dense: nn.Module, spent: tuple[float, float] | None = None
    ) -> FinalRecord:
        """Return what became of the dense model.

        Args:
            model: Converted.
            dense: What it was, maybe on the meta device.
            spent: FLOPs of the dense model and of this one where they were measured; by default those over the lengths.
        """
        dense_flops, flops = spent or (self.flops, count_flops(model, self.lengths).total)
        return FinalRecord(
            dense=self.scopes,
            compressed=_scopes(model),
            dense_flops=dense_flops,
            compressed_flops=flops,
            bytes_on_disk={"dense": self.bytes, "compressed": count_bytes(model)},
            ranks={
                path: LayerRank(rank, min(linear_shape(get_module(dense, path))), "low_rank")
                for path, rank in ranks_of(model).items()
            },
        )


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the rank of each linear of low rank, by path; word embeddings may be factorised too, and are none."""
    found = {
        path: getattr(part, "rank", None)
        for path, part in model.named_modules()
        if hasattr(part, "in_features")
    }
    return {path: rank for path, rank in found.items() if isinstance(rank, int)}


def _scopes(model: nn.Module) -> ScopeCounts:
    counted = count_parameters(model)
    return ScopeCounts(linear=counted.linear, encoder=counted.encoder, total=counted.total)

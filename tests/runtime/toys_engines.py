"""Weights and inputs that engines are tried with."""

import torch
from torch import Tensor

__all__ = ["inputs", "weight"]


def weight(rows: int = 48, columns: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of a weight, their scales, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales_N = torch.rand(rows, generator=generator) / 100 + 0.001
    return weight_NK, scales_N, torch.randn(rows, generator=generator)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 30, shape[-1])

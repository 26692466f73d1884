"""Gates that are exactly 0 or 1 with some probability and still have a gradient: the hard concrete distribution.

The next chapter is :mod:`lightning_compress.nn.width_gate`, whose gates they are under the L0 criterion.

Shape legend: K gates.

Paper: CoFi (ACL 2022), specification §8; the distribution is that of Louizos et al. (ICLR 2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["expected_gate", "open_probability", "sample_gate"]

_BETA = 2.0 / 3.0
_LOW, _HIGH = -0.1, 1.1
_EPSILON = 1e-6


def sample_gate(log_alpha_K: Tensor, noise_K: Tensor | None = None) -> Tensor:
    """Draw gates in [0, 1], both ends included with positive probability, differentiable in ``log_alpha_K``.

    Args:
        log_alpha_K: Location of each gate; large means open.
        noise_K: Uniform random numbers in (0, 1); drawn by default.

    Example:
        >>> sample_gate(torch.tensor([-9.0, 0.0, 9.0]), noise_K=torch.tensor([0.5, 0.5, 0.5]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if noise_K is None:
        noise_K = torch.rand_like(log_alpha_K)
    noise_K = noise_K.clamp(_EPSILON, 1.0 - _EPSILON)
    soft_K = torch.sigmoid((torch.logit(noise_K) + log_alpha_K) / _BETA)
    return (_LOW + (_HIGH - _LOW) * soft_K).clamp(0.0, 1.0)


def open_probability(log_alpha_K: Tensor) -> Tensor:
    """Return the probability that a gate is not 0.

    Example:
        >>> round(open_probability(torch.tensor(0.0)).item(), 4)  # 1 / (1 + (1 / 11)^(2/3))
        0.8318
    """
    return torch.sigmoid(log_alpha_K - _BETA * math.log(-_LOW / _HIGH))


def expected_gate(log_alpha_K: Tensor) -> Tensor:
    """Return what stands for a gate in evaluation: the stretched sigmoid of its location, cut to [0, 1].

    Example:
        >>> expected_gate(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (_LOW + (_HIGH - _LOW) * torch.sigmoid(log_alpha_K)).clamp(0.0, 1.0)

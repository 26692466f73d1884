"""Single gates: a head, a neuron, a rank of the embeddings or a hidden dimension that is closed counts as zero.

The next chapter is :mod:`lightning_compress.nn.width_slimming`, which puts them into a model.

Shape legend: B any leading dimensions, D hidden size, E width of the word embeddings, V vocabulary, R rank, K
structures of one kind in one layer, I = K times their width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.nn.factored_embedding import leading_basis
from lightning_compress.nn.hard_concrete import expected_gate, open_probability, sample_gate

__all__ = ["HiddenGate", "RankGate", "StructureGate", "WidthGate", "masked_norm"]

_START = 3.0
"""Location at which learned gates start: open, but within reach."""


class WidthGate(nn.Module, ABC):
    """Knows whether everything is open, so that inputs can then go through as they are."""

    is_open: bool

    def __init__(self) -> None:
        super().__init__()
        self.is_open = True

    @abstractmethod
    def _look(self) -> None:
        """Look once, not in ``forward``, which would wait for the device and break compiled graphs."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look()


class StructureGate(WidthGate):
    """Multiplies each structure (a head, a neuron) of a linear's input by its gate.

    Args:
        size: Structures there are.
        width: Features of each, next to each other.
        learned: Whether gates are drawn from a learned distribution while :attr:`is_sampled`.
    """

    gate_K: Tensor
    log_alpha_K: nn.Parameter | None

    def __init__(self, size: int, width: int, *, learned: bool = False) -> None:
        super().__init__()
        self.width, self.is_sampled = width, False
        self.register_buffer("gate_K", torch.ones(size))
        self.log_alpha_K = nn.Parameter(torch.full((size,), _START)) if learned else None
        self._idle: tuple[nn.Parameter, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the structures that are not closed, ascending."""
        value_K = self.gate_K
        if self.is_sampled and self.log_alpha_K is not None:
            value_K = expected_gate(self.log_alpha_K.detach())
        return tuple(value_K.nonzero().flatten().tolist())

    @property
    def open_probability_K(self) -> Tensor:
        """Probability that each gate is open, without gradient; 1 where gates are not learned."""
        location_K = self.log_alpha_K
        return torch.ones_like(self.gate_K) if location_K is None else open_probability(location_K.detach())

    @torch.no_grad()
    def close(self, mask_K: Tensor) -> None:
        """Keep what ``mask_K`` has 1 for, at full magnitude."""
        self.gate_K.copy_(mask_K)
        self._look()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Gate an input; it goes through as it is while everything is open."""
        if self.log_alpha_K is None or not (self.is_sampled or self.training):
            if self.is_open:
                return x_BI
            gate_K = self.gate_K
        elif self.is_sampled:
            gate_K = (sample_gate if self.training else expected_gate)(self.log_alpha_K)
        else:
            gate_K = self.gate_K + 0.0 * self.log_alpha_K
        if self.training:  # idle parameters stay in the graph: DDP expects every one it was given
            gate_K = gate_K + sum(0.0 * parameter.sum() for parameter in self._idle)
        return x_BI * gate_K.to(x_BI.dtype).repeat_interleave(self.width)

    def _look(self) -> None:
        self.is_open = self.gate_K.is_meta or bool((self.gate_K == 1).all())


class RankGate(WidthGate):
    """Projects word embeddings on a subspace: ``E P`` with ``P = V_R V_R^T``, which has the rank of what is kept.

    Args:
        width: Width of the embeddings.
    """

    projector_EE: Tensor
    rank: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("projector_EE", torch.eye(width))
        self.register_buffer("rank", torch.tensor(width))

    @torch.no_grad()
    def close(self, weight_VE: Tensor, rank: int) -> None:
        """Keep the ``rank`` directions in which the embeddings, as projected now, are largest; rank 0 decides for all.

        Paper: COST-EFF, specification §3.2: unweighted truncated SVD, again at each step.
        """
        basis_ER = leading_basis(weight_VE.detach() @ self.projector_EE.to(weight_VE.dtype), rank)
        self.projector_EE.copy_(basis_ER @ basis_ER.T)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.projector_EE, src=0)
        self.rank.fill_(rank)
        self._look()

    def forward(self, x_BE: Tensor) -> Tensor:
        """Project embeddings, or what is compared with them."""
        return x_BE if self.is_open else x_BE @ self.projector_EE.to(x_BE.dtype)

    def _look(self) -> None:
        self.is_open = self.rank.is_meta or int(self.rank) == len(self.projector_EE)


class HiddenGate(StructureGate):
    """Hidden dimensions: closed ones are zero in what norms put out, and norms do not count them.

    Args:
        size: Hidden size.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, 1)


def masked_norm(norm: nn.Module, x_BD: Tensor, keep_D: Tensor) -> Tensor:
    """Return what ``norm`` would put out over the kept dimensions alone, and zero for the others.

    Args:
        norm: A LayerNorm, or a norm by the root mean square.
        x_BD: Its input.
        keep_D: 1 for kept dimensions, 0 for others.

    Example:
        >>> masked_norm(nn.LayerNorm(3), torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])).detach().round()
        tensor([-1.,  1.,  0.])
    """
    keep_D = keep_D.to(torch.float32)
    count, wide_BD = keep_D.sum(), x_BD.to(torch.float32)
    weight_D: Any = norm.weight
    bias_D: Any = getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm):
        wide_BD = wide_BD - (wide_BD * keep_D).sum(-1, keepdim=True) / count
        epsilon = norm.eps
    else:
        epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None) or 0.0))
    variance_B1 = (wide_BD.square() * keep_D).sum(-1, keepdim=True) / count
    normed_BD = (wide_BD * torch.rsqrt(variance_B1 + epsilon)).to(x_BD.dtype) * weight_D
    normed_BD = normed_BD if bias_D is None else normed_BD + bias_D
    return normed_BD * keep_D.to(normed_BD.dtype)

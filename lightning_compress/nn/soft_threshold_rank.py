"""Layers whose rank is learned: U f(sigma - alpha) V while training, two thin linears afterwards.

Shape legend: B any leading dimensions, I in features, O out features, M = min(I, O) full rank, R kept rank,
N tokens sampled for calibration. The next chapter is :mod:`lightning_compress.losses.soft_threshold_rank`.

Paper: SoftLMs (arXiv 2411.10543). The paper's equations could not be read; the gate and its constants follow the
code of its direct successor STAR-KV (arXiv 2606.08382).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.surgery import dense_weight, linear_shape

__all__ = ["LowRankLinear", "SoftThresholdLinear", "shrink_singular_values"]

_CALIBRATION_TOKENS = 256
_GOLDEN_RATIO = 0.6180339887

Mode = Literal["open", "gated", "pinned"]


def shrink_singular_values(
    sigma_M: Tensor, alpha: Tensor, sharpness: float, scale: Tensor | float = 1.0
) -> Tensor:
    """Return the gated singular values ``sigma * tanh(s * (sigma / scale - alpha))``, exactly 0 at or below alpha.

    A gate, not a proximal operator: values well above the threshold keep their full size. Autograd gives the true
    derivative; a clipped value gets no gradient and returns only if ``alpha`` falls.

    Args:
        sigma_M: Singular values, any order, shape ``[M]``.
        alpha: Threshold in units of ``scale``, scalar.
        sharpness: Slope ``s`` of the gate, per unit of ``scale``.
        scale: Unit in which ``alpha`` is expressed.

    Paper: STAR-KV official code (``soft_thres_layer.py``) with c = 0, see SoftLMs (arXiv 2411.10543), abstract.

    Example:
        >>> shrink_singular_values(torch.tensor([2.0, 0.5]), torch.tensor(1.0), sharpness=50.0)
        tensor([2., 0.])
    """
    margin_M = sigma_M / scale - alpha
    return torch.where(margin_M > 0, sigma_M * torch.tanh(sharpness * margin_M), torch.zeros_like(sigma_M))


class SoftThresholdLinear(nn.Module):
    """A linear layer in training form: ``y = U f(sigma) V x + b`` with a learned threshold on sigma.

    All shapes stay constant during training. In mode ``"open"`` every direction lives (and inputs are gathered if
    ``is_calibrating``), in ``"gated"`` the threshold decides, in ``"pinned"`` a fixed mask does, at full magnitude,
    and dead directions are left out of the products.

    Args:
        linear: The dense layer (``nn.Linear`` or ``Conv1D``) to factorise. Its bias parameter is kept as it is.
        sharpness: Slope of the gate.
        relative: Whether thresholds are in units of the layer's root-mean-square singular value.
    """

    keep_mask_M: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, *, sharpness: float = 50.0, relative: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_shape(linear)
        self.sharpness, self.relative = sharpness, relative
        self.is_transposed = isinstance(linear, Conv1D)
        weight_OI = dense_weight(linear).detach()
        rank, device = min(self.in_features, self.out_features), weight_OI.device
        trainable = bool(linear.weight.requires_grad)
        self.u_OM = nn.Parameter(weight_OI.new_empty(self.out_features, rank), requires_grad=trainable)
        self.sigma_M = nn.Parameter(
            torch.empty(rank, dtype=torch.float32, device=device), requires_grad=trainable
        )
        self.v_MI = nn.Parameter(weight_OI.new_empty(rank, self.in_features), requires_grad=trainable)
        self.alpha = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))
        self.bias = linear.bias  # type: ignore[assignment]
        self.register_buffer("keep_mask_M", torch.ones(rank, dtype=torch.bool, device=device))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
        self.settled_moment_II: Tensor | None = None
        self._recent: list[Tensor] = []
        self.mode: Mode = "open"
        self.is_calibrating = False
        self._kept_R: Tensor | None = None
        if not weight_OI.is_meta:
            self.factorise(weight_OI)

    @torch.no_grad()
    def factorise(self, weight_OI: Tensor | None = None) -> None:
        """Set U, sigma, V (in place) to the decomposition of a weight, by default of the current one.

        With second moments C of the inputs gathered while ``is_calibrating`` (and released here) the
        decomposition is activation-whitened: with C = L L^T, ``svd(W L) = U sigma V'`` and ``V = V' L^-1``, so
        that cutting small sigmas costs least output energy.
        C is normalised to mean diagonal 1, which keeps sigma on the scale of the plain singular values.

        Raises:
            ValueError: If weight or moments hold infinities or NaN.

        Paper: SVD-LLM (ICLR 2025), truncation-aware data whitening.
        """
        weight_OI = self.weight if weight_OI is None else weight_OI
        worker = "cpu" if weight_OI.device.type == "mps" else weight_OI.device  # MPS has no float64
        matrix_OI = weight_OI.to(worker, torch.float64)
        self.settle()
        moment_II = self.settled_moment_II
        seen = [matrix_OI] if moment_II is None else [matrix_OI, moment_II]
        if not all(bool(tensor.isfinite().all()) for tensor in seen):
            raise ValueError(
                "the weights or inputs of a linear layer are not finite, so it cannot be decomposed: training has "
                "diverged. Lower the learning rate, clip gradients, or use bf16 in place of fp16"
            )
        if moment_II is None:
            u_OM, sigma_M, v_MI = torch.linalg.svd(matrix_OI, full_matrices=False)
        else:
            root_II = _cholesky_root(moment_II.to(worker, torch.float64))
            u_OM, sigma_M, white_MI = torch.linalg.svd(matrix_OI @ root_II, full_matrices=False)
            v_MI = torch.linalg.solve_triangular(root_II, white_MI, upper=False, left=False)
        self.u_OM.copy_(u_OM)
        self.sigma_M.copy_(sigma_M)
        self.v_MI.copy_(v_MI)
        self.settled_moment_II = None
        self.alpha.zero_()
        self.scale.fill_(sigma_M.square().mean().sqrt().clamp_min(1e-12) if self.relative else 1.0)

    @torch.no_grad()
    def settle(self) -> None:
        """Count the recently gathered inputs in the second moments.

        Until then they are not part of the state: a run that stops inside a batch does that batch again.
        """
        for x_NI in self._recent:
            if self.settled_moment_II is None:
                self.settled_moment_II = x_NI.new_zeros(self.in_features, self.in_features)
            self.settled_moment_II.addmm_(x_NI.T, x_NI)
        self._recent = []

    @property
    def moment_II(self) -> Tensor | None:
        """Sum of x x^T over the gathered inputs, shape ``[I, I]``."""
        self.settle()
        return self.settled_moment_II

    @property
    def margin_M(self) -> Tensor:
        """How far each direction is above its threshold, in units of the threshold (shape ``[M]``)."""
        return (self.sigma_M / self.scale - self.alpha).detach()

    @property
    def rank(self) -> int:
        """Directions that live now."""
        return int(self.count_live())

    def count_live(self) -> Tensor:
        """Return the rank as a scalar tensor, without waiting for the device."""
        if self.mode == "open":
            return torch.full_like(self.alpha, self.full_rank, dtype=torch.int64, requires_grad=False)
        return self.keep_mask_M.sum() if self.mode == "pinned" else (self.margin_M > 0).sum()

    @property
    def full_rank(self) -> int:
        """Directions of the dense layer, min(in, out)."""
        return self.sigma_M.numel()

    @property
    def weight(self) -> Tensor:
        """The effective dense weight, shape ``[O, I]``."""
        u_OR, scaled_RI = self._factors()
        return u_OR @ scaled_RI

    @property
    def kept_parameters(self) -> int:
        """Weights this layer would have if converted now, biases aside: ``min(R (I + O), O I)``."""
        return min(self.rank * (self.in_features + self.out_features), self.in_features * self.out_features)

    @property
    def flops_per_token(self) -> int:
        """FLOPs (2 MACs) per token if converted now."""
        return 2 * self.kept_parameters

    @torch.no_grad()
    def pin(self, keep_mask_M: Tensor) -> None:
        """Fix which directions live; from now on they count at full magnitude and the threshold is idle."""
        self.keep_mask_M.copy_(keep_mask_M)
        self.enter("pinned")

    def enter(self, mode: Mode, *, calibrate: bool = False) -> None:
        """Switch the mode; ``calibrate`` gathers inputs in mode ``"open"``."""
        self.mode, self.is_calibrating = mode, calibrate and mode == "open"
        self._index_kept()

    @torch.no_grad()
    def keep_features(
        self, inputs: Sequence[int] | Tensor | None = None, outputs: Sequence[int] | Tensor | None = None
    ) -> None:
        """Keep these inputs and outputs only (None keeps all), in place; the gate stays as it is.

        The directions are no singular vectors of the smaller weight any more. While all of them live the weight is
        decomposed anew; afterwards they stay, and there may be more of them than ``min(I, O)``. The factors stay the
        parameters they are: whoever converts the layer knows by them what took the place of what.
        """
        self.settle()
        if inputs is not None:
            index_K = torch.as_tensor(inputs, dtype=torch.int64, device=self.v_MI.device)
            _shrink(self.v_MI, self.v_MI.index_select(1, index_K))
            if self.settled_moment_II is not None:
                self.settled_moment_II = self.settled_moment_II[index_K][:, index_K]
        if outputs is not None:
            index_K = torch.as_tensor(outputs, dtype=torch.int64, device=self.u_OM.device)
            _shrink(self.u_OM, self.u_OM.index_select(0, index_K))
            if self.bias is not None:
                index_K = torch.as_tensor(outputs, dtype=torch.int64, device=self.bias.device)
                kept = self.bias.index_select(0, index_K)
                self.bias = nn.Parameter(kept, requires_grad=self.bias.requires_grad)
        self.in_features, self.out_features = self.v_MI.shape[1], self.u_OM.shape[0]
        if self.mode == "open" and self.full_rank > min(self.in_features, self.out_features):
            self._decompose_smaller()

    def _decompose_smaller(self) -> None:
        """Take as many directions as the smaller weight has, and keep their product."""
        weight_OI = None if self.u_OM.is_meta else self.weight
        rank = min(self.in_features, self.out_features)
        _shrink(self.u_OM, self.u_OM[:, :rank])
        _shrink(self.v_MI, self.v_MI[:rank])
        _shrink(self.sigma_M, self.sigma_M[:rank])
        self.keep_mask_M = self.keep_mask_M[:rank].clone()
        if weight_OI is not None:
            moment_II, self.settled_moment_II = self.settled_moment_II, None
            self.factorise(weight_OI)
            self.settled_moment_II = moment_II

    def dense_blank(self) -> nn.Module:
        """Return the layer that this one took the place of, on the meta device."""
        sizes, dtype = (self.in_features, self.out_features), self.u_OM.dtype
        if self.is_transposed:
            with torch.device("meta"):
                blank: nn.Module = Conv1D(self.out_features, self.in_features).to(dtype)
        else:
            blank = nn.Linear(*sizes, bias=self.bias is not None, device="meta", dtype=dtype)
        return blank.requires_grad_(self.u_OM.requires_grad).train(self.training)

    def _index_kept(self) -> None:
        """Look the living directions up once, not in ``forward``: their number would break compiled graphs."""
        is_pinned = self.mode == "pinned" and not self.keep_mask_M.is_meta
        self._kept_R = self.keep_mask_M.nonzero().flatten() if is_pinned else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._index_kept()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftThresholdLinear:
        """Move or cast the layer, but keep singular values and threshold in float32."""
        exact = {name: getattr(self, name).detach() for name in ("sigma_M", "alpha", "scale")}
        super()._apply(fn, recurse)
        self._index_kept()
        self.settle()
        if self.settled_moment_II is not None:
            self.settled_moment_II = self.settled_moment_II.to(self.u_OM.device)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = tensor.to(moved.device)
        return self

    def forward(self, x_BI: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``, by two products or by one with the product of the factors."""
        if self.is_calibrating and self.training:
            self._gather(x_BI)
        u_OR, scaled_RI = self._factors()
        tokens, rank = x_BI.numel() // self.in_features, u_OR.shape[1]
        dense_macs = self.in_features * self.out_features
        if tokens * rank * (self.in_features + self.out_features) > (tokens + rank) * dense_macs:
            return F.linear(x_BI, u_OR @ scaled_RI, self.bias)
        return F.linear(F.linear(x_BI, scaled_RI), u_OR, self.bias)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return U ``[O, R]`` and diag(f) V ``[R, I]``.

        An idle threshold stays in the graph with a zero gradient: DDP expects every parameter it was given.
        """
        if self.mode != "pinned":
            gate_M = self.sigma_M + 0.0 * self.alpha
            if self.mode == "gated":
                gate_M = shrink_singular_values(self.sigma_M, self.alpha, self.sharpness, self.scale)
            return self.u_OM, gate_M.to(self.v_MI.dtype).unsqueeze(1) * self.v_MI
        assert self._kept_R is not None, "pinned layers know which directions live"
        sigma_R = self.sigma_M.index_select(0, self._kept_R) + 0.0 * self.alpha
        v_RI = self.v_MI.index_select(0, self._kept_R)
        return self.u_OM.index_select(1, self._kept_R), sigma_R.to(v_RI.dtype).unsqueeze(1) * v_RI

    @torch.no_grad()
    def _gather(self, x_BI: Tensor) -> None:
        x_NI = x_BI.detach().reshape(-1, self.in_features)
        if x_NI.shape[0] > _CALIBRATION_TOKENS:
            # Steps of the golden ratio spread over sequences and positions alike, whatever the shape of the batch.
            places = torch.arange(_CALIBRATION_TOKENS, device=x_NI.device) * _GOLDEN_RATIO % 1.0
            x_NI = x_NI.index_select(0, (places * x_NI.shape[0]).long())
        self._recent.append(x_NI.to(torch.float32, copy=True))

    def extra_repr(self) -> str:
        """Show shape, rank and state in the module's printed form."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {self.mode}"
        )


class LowRankLinear(nn.Sequential):
    """A converted layer: two plain linears, ``down`` (I to R, no bias) and ``up`` (R to O).

    Args:
        down: ``Linear(I, R, bias=False)`` holding diag(f) V.
        up: ``Linear(R, O)`` holding U and the bias.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.in_features, self.out_features, self.rank = down.in_features, up.out_features, down.out_features

    @property
    def weight(self) -> Tensor:
        """The dense product, shape ``[O, I]``, for host code that reads weights directly."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, shape ``[O]``."""
        return self.up.bias

    @property
    def kept_parameters(self) -> int:
        """Weights of both factors, bias aside."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def flops_per_token(self) -> int:
        """FLOPs (2 MACs) per token."""
        return 2 * self.kept_parameters


def _shrink(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.grad = None
    parameter.data = values.detach().clone()


def _cholesky_root(moment_II: Tensor) -> Tensor:
    """Lower Cholesky factor of the second moments, normalised and lifted to be positive definite."""
    moment_II = moment_II / moment_II.diagonal().mean()
    lowest = torch.linalg.eigvalsh(moment_II)[0]
    lift = (-lowest).clamp_min(0.0) + 1e-6
    return torch.linalg.cholesky(moment_II + lift * torch.eye(len(moment_II)).to(moment_II))

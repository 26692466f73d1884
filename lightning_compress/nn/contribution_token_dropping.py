"""The cast of ContributionTokenDropping: a predictor per layer, learned thresholds, and the soft removal.

:class:`ContributionPolicy` is what is deployed; :class:`SoftContributionPolicy` trains it inside a
:class:`~lightning_compress.nn.dropping.DroppingEncoder`. The next chapter is
:mod:`lightning_compress.losses.contribution_token_dropping`.

Shape legend: B batch, T padded length, N packed rows, D hidden size, K layers that decide.

Paper: AdapLeR (arXiv 2203.08991); equations after its official code, specification §1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.nn.row_buckets import with_spare_rows
from lightning_compress.nn.segments import Segments, segment_softmax
from lightning_compress.nn.tape import Tape, TokensKept
from lightning_compress.nn.token_policy import TokenPolicy, at_least_float

__all__ = [
    "ContributionPolicy",
    "ContributionPredictor",
    "ContributionShares",
    "ExpectedTokens",
    "KeyBias",
    "SoftContributionPolicy",
    "masked_shares",
    "soft_removal",
]

_INIT_STD = 0.02
_SOFTNESS = 0.1
"""Beta: how much a token above the threshold is still disfavoured while training."""
_HIDDEN = -1e4
"""Bias of a key that nobody sees; finite, and in the range of fp16."""
_GONE = 1e-6
"""A token with less than this survival is out."""


@dataclass(frozen=True, eq=False)
class ContributionShares:
    """What the predictor before a layer says of the tokens that got there."""

    layer: int
    """Index of the layer, from 0."""
    share_BT: Tensor
    """Predicted contribution; sums to 1 over the survivors. Gradients reach the predictor; the encoder if wanted."""
    survival_BT: Tensor
    """How much of each token got to this layer, in [0, 1]; a constant."""


@dataclass(frozen=True, eq=False)
class KeyBias:
    """By how much a layer's attention disfavours each key."""

    layer: int
    """Index of the layer, from 0."""
    bias_BT: Tensor
    """The bias as it is run, with gradients."""
    threshold_bias_BT: Tensor
    """The same value as a function of the thresholds alone."""


@dataclass(frozen=True, eq=False)
class ExpectedTokens:
    """How many tokens enter a layer's attention, as a function of the thresholds alone."""

    layer: int
    """Index of the layer, from 0."""
    count_B: Tensor
    """Sum of survivals, the first token included."""


class ContributionPredictor(nn.Sequential):
    """A small MLP that scores each token, ``D -> width -> 1``.

    Paper: AdapLeR's contribution predictor, specification §1.1.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        linears = nn.Linear(hidden_size, width), nn.Linear(width, 1)
        super().__init__(linears[0], nn.GELU(), linears[1])
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
            nn.init.zeros_(linear.bias)

    @property
    def flops_per_token(self) -> int:
        """FLOPs (2 MACs) per token."""
        return 2 * sum(module.weight.numel() for module in self if isinstance(module, nn.Linear))


class ContributionPolicy(TokenPolicy):
    """Keeps a token if its predicted share is at least ``scale * eta / n`` of ``n`` survivors.

    Args:
        hidden_size: Width D of the hidden states.
        layers: Indices of the layers before which tokens may leave, from 0, ascending.
        width: Neurons of each predictor.
        protect_first: How many tokens at the start never leave, at least 1.

    Paper: AdapLeR's hard rule, specification §1.3.
    """

    eta_K: Tensor

    def __init__(self, hidden_size: int, layers: Sequence[int], width: int, protect_first: int = 1) -> None:
        super().__init__(layers, protect_first)
        self.register_buffer("eta_K", torch.ones(len(self.layers)))
        self.predictors = nn.ModuleDict({str(i): ContributionPredictor(hidden_size, width) for i in layers})

    def flops_per_token_of(self, layer: int) -> int:
        """FLOPs per token that arrives before ``layer``, for scoring it."""
        return self._predictor(layer).flops_per_token if layer in self.layers else 0

    def decide(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        """Score the rows, and keep those whose share reaches the threshold of their sequence."""
        if layer not in self.layers:
            return None
        logits_N = self._predictor(layer)(with_spare_rows(hidden_ND))[: segments.num_rows].squeeze(-1)
        threshold_B = self._eta(layer) / segments.lengths_B
        share_N = segment_softmax(logits_N, segments)
        if segments.num_sequences == 1:
            keep_N = share_N >= threshold_B
        else:
            keep_N = share_N >= threshold_B[segments.sequence_N]
        return self.with_protected(keep_N, segments)

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return logits of the shares, one for each token of ``[..., D]``; None if the layer does not decide."""
        return self._predictor(layer)(hidden).squeeze(-1) if layer in self.layers else None

    def _eta(self, layer: int) -> Tensor:
        """Return the threshold of a layer in units of the mean share, in at least fp32."""
        return at_least_float(self.eta_K[self.layers.index(layer)] * self.scale)

    def _predictor(self, layer: int) -> ContributionPredictor:
        predictor = self.predictors[str(layer)]
        assert isinstance(predictor, ContributionPredictor)
        return predictor


@dataclass
class _Pass:
    """One forward pass, layer by layer; the same numbers twice, once as functions of the thresholds alone."""

    real_BT: Tensor
    fixed_BT: Tensor
    survival_BT: Tensor
    bias_BT: Tensor
    threshold_survival_BT: Tensor
    threshold_bias_BT: Tensor


class SoftContributionPolicy(ContributionPolicy):
    """The trainable policy: soft while training, hard in evaluation.

    Gradients of the task reach the encoder and the predictors through the predicted shares, and the thresholds
    ``eta`` (and ``theta``) with shares held still, so that in a single backward pass nothing that is a function of the
    thresholds alone reaches the encoder.

    Args:
        hidden_size: Width D of the hidden states.
        layers: Indices of the layers before which tokens may leave.
        width: Neurons of each predictor.
        protect_first: How many tokens at the start never leave.
        threshold: Where ``eta`` starts.
        tape: Where records go.
        shares_reach_encoder: Whether gradients of the recorded shares reach the encoder.

    Paper: AdapLeR, specification §1.2; ``theta`` scales the first token's saliency and learns like a factor of
    its share.
    """

    exact_tensors: ClassVar[tuple[str, ...]] = ("eta_K", "theta_K", "scale")
    eta_K: nn.Parameter  # type: ignore[assignment]

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        width: int,
        protect_first: int,
        *,
        threshold: float,
        tape: Tape,
        shares_reach_encoder: bool,
    ) -> None:
        super().__init__(hidden_size, layers, width, protect_first)
        del self.eta_K  # a buffer, where it does not learn
        self.eta_K = nn.Parameter(torch.full((len(self.layers),), threshold))
        self.theta_K = nn.Parameter(torch.ones(len(self.layers)))
        self.tape = tape
        self.shares_reach_encoder = shares_reach_encoder
        self.is_active = False
        self.slope = 1.0

    @property
    def deployed_eta_K(self) -> Tensor:
        """The thresholds as they are deployed: with the common scale, in the dtype in which all is saved."""
        return (self.eta_K * self.scale).detach().to(next(self.predictors.parameters()).dtype)

    @property
    def kept_parameters(self) -> int:
        """Weights that are deployed, without biases: the predictors'."""
        return sum(p.numel() for name, p in self.predictors.named_parameters() if name.endswith("weight"))

    def begin(self, real_BT: Tensor) -> _Pass:
        """Start with every real token alive."""
        alive_BT = real_BT.float()
        bias_BT = torch.zeros_like(alive_BT).masked_fill(~real_BT, _HIDDEN)
        return _Pass(real_BT, self.protected(real_BT), alive_BT, bias_BT, alive_BT, bias_BT)

    def remove(self, layer: int, hidden_BTD: Tensor, state: _Pass) -> Tensor:
        """Decide before ``layer``, write what losses need to know, and return the bias of each key."""
        if layer in self.layers:
            (self._remove_softly if self.training else self._remove_hard)(layer, hidden_BTD, state)
        bias_BT = state.bias_BT + (state.threshold_bias_BT - state.threshold_bias_BT.detach())
        self.tape.write(KeyBias(layer, bias_BT, state.threshold_bias_BT))
        self.tape.write(ExpectedTokens(layer, state.threshold_survival_BT.sum(dim=1)))
        self.tape.write(TokensKept(layer, state.survival_BT.detach()))
        return bias_BT

    def _eta(self, layer: int) -> Tensor:
        """Return the threshold of a layer: while training as it learns, in evaluation as it will be deployed."""
        if self.training:
            return super()._eta(layer)
        return at_least_float(self.deployed_eta_K[self.layers.index(layer)])

    def _remove_hard(self, layer: int, hidden_BTD: Tensor, state: _Pass) -> None:
        logits_BT = at_least_float(self._predictor(layer)(hidden_BTD).squeeze(-1))
        share_BT = masked_shares(logits_BT, state.survival_BT)
        threshold_B1 = self._eta(layer) / state.survival_BT.sum(dim=1, keepdim=True)
        keep_BT = (share_BT >= threshold_B1) | state.fixed_BT
        state.survival_BT = state.threshold_survival_BT = state.survival_BT * keep_BT
        state.bias_BT = torch.zeros_like(state.bias_BT).masked_fill(state.survival_BT == 0, -torch.inf)
        state.threshold_bias_BT = state.bias_BT.new_zeros(())

    def _remove_softly(self, layer: int, hidden_BTD: Tensor, state: _Pass) -> None:
        predictor = self._predictor(layer)
        logits_BT = at_least_float(predictor(hidden_BTD).squeeze(-1))
        share_BT = masked_shares(logits_BT, state.survival_BT)
        shown_BT = logits_BT
        if not self.shares_reach_encoder:
            shown_BT = at_least_float(predictor(hidden_BTD.detach()).squeeze(-1))
        reached_BT, eta = state.survival_BT.detach(), self._eta(layer)
        state.survival_BT, state.bias_BT = self._soften(
            share_BT, eta.detach(), state.survival_BT, state.bias_BT, state
        )
        theta = self.theta_K[self.layers.index(layer)]
        factor = theta / theta.detach() if layer > 0 else None
        scaled_BT = _scale_first(share_BT.detach(), factor, state.real_BT)
        state.threshold_survival_BT, state.threshold_bias_BT = self._soften(
            scaled_BT, eta, state.threshold_survival_BT, state.threshold_bias_BT, state
        )
        self.tape.write(ContributionShares(layer, masked_shares(shown_BT, reached_BT), reached_BT))

    def _soften(
        self, share_BT: Tensor, eta: Tensor, survival_BT: Tensor, bias_BT: Tensor, state: _Pass
    ) -> tuple[Tensor, Tensor]:
        """Return survival and bias after one soft removal."""
        threshold_B1 = eta / survival_BT.sum(dim=1, keepdim=True)
        edit_BT = soft_removal(share_BT, threshold_B1, self.slope) * survival_BT
        edit_BT = edit_BT.masked_fill(state.fixed_BT | ~state.real_BT, 0.0)
        factor_BT = torch.where(survival_BT > _GONE, edit_BT, torch.zeros_like(edit_BT)).exp()
        return survival_BT * factor_BT, (bias_BT + edit_BT).clamp_min(_HIDDEN)


def masked_shares(logits_BT: Tensor, survival_BT: Tensor) -> Tensor:
    """Return each token's share of the survivors' softmax, weighted by how much of it survives; sums to 1.

    Padding and tokens that left are exactly 0, whatever their logits.

    Example:
        >>> masked_shares(torch.tensor([[0.0, 0.0, 99.0]]), torch.tensor([[1.0, 0.5, 0.0]]))
        tensor([[0.6667, 0.3333, 0.0000]])

    Departs from the paper: the official code runs the softmax over padding too, and underflows where a removed
    token's logit dominates (specification §1.7, 7).
    """
    alive_BT = survival_BT > _GONE
    shifted_BT = logits_BT.masked_fill(~alive_BT, -torch.inf)
    weights_BT = (shifted_BT - shifted_BT.detach().amax(dim=1, keepdim=True)).exp() * survival_BT
    return weights_BT / weights_BT.sum(dim=1, keepdim=True)


def soft_removal(share: Tensor, threshold: Tensor, slope: float) -> Tensor:
    """Return the key bias ``g(p; delta, lambda)``, at most 0: near 0 above the threshold, steep below it.

    ``(lambda / delta) (p - delta) - beta / lambda`` below the threshold, ``(p - 1) beta / (lambda (1 - delta))`` from
    it on, with ``beta = 0.1``; not below -10000.

    Args:
        share: Shares p, any shape.
        threshold: Thresholds delta in (0, 1], of a shape that fits.
        slope: Lambda, positive.

    Paper: AdapLeR, specification §1.2 step 4.

    Example:
        >>> soft_removal(torch.tensor([0.0, 0.00625]), torch.tensor(0.0125), slope=10.0)
        tensor([-10.0100,  -5.0100])
    """
    below = (slope / threshold) * (share - threshold) - _SOFTNESS / slope
    above = (share - 1.0) * _SOFTNESS / (slope * (1.0 - threshold).clamp_min(_GONE))
    return torch.where(share < threshold, below, above).clamp(_HIDDEN, 0.0)


def _scale_first(share_BT: Tensor, factor: Tensor | None, real_BT: Tensor) -> Tensor:
    """Scale the first token's share by a factor whose value is 1, and renormalise."""
    if factor is None:
        return share_BT
    first_BT = real_BT & (real_BT.cumsum(dim=1) == 1)
    scaled_BT = torch.where(first_BT, share_BT * factor, share_BT)
    return scaled_BT / scaled_BT.sum(dim=1, keepdim=True)

"""The cast of BottleneckTokenDropping: a sampler before each layer that decides for each token on its own.

:class:`BottleneckPolicy` is what is deployed; :class:`SoftBottleneckPolicy` trains it inside a
:class:`~lightning_compress.nn.dropping.DroppingEncoder`. The next chapter is
:mod:`lightning_compress.losses.bottleneck_token_dropping`.

Shape legend: B batch, T padded length, N packed rows, D hidden size.

Paper: Infor-Coef (arXiv 2305.12458); equations after its official code, specification §2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compress.nn.dropping import compute_dtype
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.tape import Tape, TokensKept
from lightning_compress.nn.token_policy import TokenPolicy, at_least_float

__all__ = [
    "BottleneckPolicy",
    "ExpectedSurvival",
    "SampledTokens",
    "SoftBottleneckPolicy",
    "TokenSampler",
    "keep_gate",
    "mask_bias",
]

_INIT_STD = 0.02
_INIT_KEEP = 5.0
"""Bias of the two outputs at the start, + for keep and - for drop: keep with probability sigmoid(10) = 0.99995."""
_DROP, _KEEP = 0, 1
_PADDING = -1e4
"""Bias of keys that are padding; finite, and in the range of fp16."""
_DROPPED = -30.0
"""Bias of a dropped key while training: a weight of 1e-13 of what it would have, from which gradients come back."""
_DROPPED_FP16 = -9.0
_NARROW = 0.1
"""Log odds over which the effect of the threshold is taken where decisions have no noise."""
_DIAL = 4.0
"""Log odds by which one e-fold of the dial moves the threshold."""


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """What the sampler before a layer decides on, and how."""

    layer: int
    """Index of the layer, from 0."""
    hidden_BTD: Tensor
    """What enters the layer."""
    keep_BT: Tensor
    """Probability, or noisy sample, of each token's staying; 1 for protected tokens, 0 for those that left before."""
    real_BT: Tensor
    """True for tokens, False for padding."""


@dataclass(frozen=True, eq=False)
class ExpectedSurvival:
    """How many tokens get to a layer on average over the noise, and how that depends on the threshold."""

    layer: int
    """Index of the layer, from 0."""
    count_B: Tensor
    """Each text's expected number of tokens."""
    slope_B: Tensor
    """Its derivative by the threshold, at most 0."""


class TokenSampler(nn.Sequential):
    """Scores each token on its own, ``LN -> D x width -> LN -> GELU -> width x 2``: drop and keep.

    Args:
        hidden_size: Width D of the hidden states.
        width: Neurons of the inner layer; D in the paper.

    Paper: Infor-Coef's sampler, specification §2.1.

    Example:
        >>> TokenSampler(8, width=4).flops_per_token
        80
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        first, last = nn.Linear(hidden_size, width), nn.Linear(width, 2)
        super().__init__(nn.LayerNorm(hidden_size), first, nn.LayerNorm(width), nn.GELU(), last)
        self.flops_per_token = 2 * (hidden_size * width + width * 2)
        """FLOPs (2 MACs) per token."""
        nn.init.normal_(last.weight, std=_INIT_STD)
        nn.init.normal_(last.bias, std=_INIT_STD)
        with torch.no_grad():
            last.bias.add_(torch.tensor([-_INIT_KEEP, _INIT_KEEP]).to(last.bias))

    def log_odds(self, hidden: Tensor) -> Tensor:
        """Return the log odds of keeping each token, ``[..., D] -> [...]``, in at least fp32.

        The last layer is run as the difference of its two outputs, in fp32: the outputs themselves are around 5 and
        more, where bf16 has steps of 1/32, and tokens differ by little more at first.
        """
        *inner, last = self
        assert isinstance(last, nn.Linear)
        for module in inner:
            hidden = module(hidden)
        weight, bias = (p[_KEEP] - p[_DROP] for p in map(at_least_float, (last.weight, last.bias)))
        return (at_least_float(hidden) * weight).sum(dim=-1) + bias


class BottleneckPolicy(TokenPolicy):
    """Keeps a token if its log odds of being kept are at least ``threshold + 4 log(scale)``.

    ``threshold`` is learned, near 0, where keep and drop are equally probable. ``scale`` is the dial: 1 is as trained,
    0 drops nothing, larger values drop more.

    Args:
        hidden_size: Width D of the hidden states.
        layers: Indices of the layers before which tokens may leave, from 0, ascending.
        width: Neurons of each sampler.
        protect_first: How many tokens at the start never leave, at least 1.

    Departs from the paper: the official code draws noise in evaluation too (specification §2.3); here the decision is
    that of the sampler without noise.
    """

    threshold: Tensor

    def __init__(self, hidden_size: int, layers: Sequence[int], width: int, protect_first: int = 1) -> None:
        super().__init__(layers, protect_first)
        self.register_buffer("threshold", torch.zeros(()))
        self.samplers = nn.ModuleDict({str(i): TokenSampler(hidden_size, width) for i in layers})

    def flops_per_token_of(self, layer: int) -> int:
        """FLOPs per token that arrives before ``layer``, for scoring it."""
        return self._sampler(layer).flops_per_token if layer in self.layers else 0

    def decide(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        """Score the rows, each on its own, and keep those whose log odds reach the threshold."""
        if layer not in self.layers:
            return None
        return self.with_protected(self._margin(layer, hidden_ND) >= 0, segments)

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return log odds of keeping, one for each token of ``[..., D]``; None if the layer does not decide."""
        return self._sampler(layer).log_odds(hidden) if layer in self.layers else None

    def _margin(self, layer: int, hidden: Tensor) -> Tensor:
        """Return how far each token's log odds are above those asked for."""
        log_odds = self._sampler(layer).log_odds(hidden)
        dial = _DIAL * at_least_float(self.scale).log()
        return log_odds - (at_least_float(self._asked()) + dial).to(log_odds.dtype)

    def _asked(self) -> Tensor:
        """Return the log odds asked for where the dial is at 1."""
        return self.threshold

    def _sampler(self, layer: int) -> TokenSampler:
        sampler = self.samplers[str(layer)]
        assert isinstance(sampler, TokenSampler)
        return sampler


@dataclass
class _Pass:
    """One forward pass, layer by layer."""

    real_BT: Tensor
    fixed_BT: Tensor
    mask_BT: Tensor
    """1 where a token is still there, with the gradients of straight-through samples."""
    sample_BT: Tensor
    """The soft samples, multiplied up."""
    survival_BT: Tensor
    """The probabilities, multiplied up; a constant."""
    slope_BT: Tensor
    """Its derivative by the threshold."""


class SoftBottleneckPolicy(BottleneckPolicy):
    """The trainable policy: decisions are sampled while training, and those of deployment in evaluation.

    Args:
        hidden_size: Width D of the hidden states.
        layers: Indices of the layers before which tokens may leave.
        width: Neurons of each sampler.
        protect_first: How many tokens at the start never leave.
        tape: Where records go.
        penalize: What losses see of a decision: its probability, or the noisy sample, multiplied up over layers.

    Paper: specification §2.1; straight-through Gumbel-softmax at temperature 1, masks multiplied up over layers.
    Departs from the paper: padding is never scored, and losses see probabilities by default (§2.7, 2 and 6).
    """

    exact_tensors: ClassVar[tuple[str, ...]] = ("threshold", "scale")

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        width: int,
        protect_first: int,
        *,
        tape: Tape,
        penalize: Literal["probabilities", "samples"] = "probabilities",
    ) -> None:
        super().__init__(hidden_size, layers, width, protect_first)
        self.tape = tape
        self.penalize = penalize
        self.is_active = True
        self.noise = 1.0
        """How noisy decisions are while training: 1 draws by probability, 0 decides as in deployment."""

    @property
    def kept_parameters(self) -> int:
        """Weights that are deployed, without biases: the samplers'."""
        return sum(p.numel() for name, p in self.samplers.named_parameters() if name.endswith("weight"))

    @property
    def deployed_threshold(self) -> Tensor:
        """The threshold as it is deployed, in the dtype in which all is saved."""
        return self.threshold.to(next(self.samplers.parameters()).dtype)

    def _asked(self) -> Tensor:
        """Return the log odds asked for: while training as they move, in evaluation as they will be deployed."""
        return self.threshold if self.training else self.deployed_threshold

    def begin(self, real_BT: Tensor) -> _Pass:
        """Start with every real token there, and forget the pass before, also if only the base model is called."""
        self.tape.clear()
        there_BT = real_BT.float()
        return _Pass(
            real_BT, self.protected(real_BT), there_BT, there_BT, there_BT, torch.zeros_like(there_BT)
        )

    def remove(self, layer: int, hidden_BTD: Tensor, state: _Pass) -> Tensor:
        """Decide before ``layer``, write what losses need to know, and return the bias of each key."""
        if layer in self.layers:
            margin_BT = self._margin(layer, hidden_BTD)
            if self.training:
                self._sample(layer, hidden_BTD, margin_BT, state)
            else:
                state.mask_BT = state.mask_BT * ((margin_BT >= 0) | state.fixed_BT)
        self.tape.write(TokensKept(layer, state.mask_BT.detach()))
        if not self.training:
            return torch.zeros_like(state.mask_BT).masked_fill(state.mask_BT == 0, -torch.inf)
        self.tape.write(ExpectedSurvival(layer, state.survival_BT.sum(dim=1), state.slope_BT.sum(dim=1)))
        is_fp16 = compute_dtype(hidden_BTD) == torch.float16
        bias_BT = mask_bias(state.mask_BT, _DROPPED_FP16 if is_fp16 else _DROPPED)
        return bias_BT.masked_fill(~state.real_BT, _PADDING)

    def _sample(self, layer: int, hidden_BTD: Tensor, margin_BT: Tensor, state: _Pass) -> None:
        gate_BT, sample_BT = keep_gate(margin_BT, self.noise)
        reached_BT = state.mask_BT.detach()
        state.mask_BT = state.mask_BT * gate_BT.masked_fill(state.fixed_BT, 1.0)
        state.sample_BT = state.sample_BT * sample_BT.masked_fill(state.fixed_BT, 1.0)
        probability_BT = margin_BT.sigmoid().masked_fill(state.fixed_BT, 1.0)
        keep_BT = state.sample_BT if self.penalize == "samples" else probability_BT * reached_BT
        self.tape.write(SampledTokens(layer, hidden_BTD, keep_BT, state.real_BT))
        width = max(self.noise, _NARROW)
        drawn_BT = (margin_BT.detach() / width).sigmoid().masked_fill(state.fixed_BT, 1.0)
        slope_BT = state.slope_BT - state.survival_BT * (1.0 - drawn_BT) / width
        state.survival_BT, state.slope_BT = state.survival_BT * drawn_BT, slope_BT * drawn_BT


def keep_gate(log_odds: Tensor, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return straight-through decisions, 1 or 0 with the gradient of a soft sample, and that sample.

    A Gumbel-softmax over two classes at temperature 1 is a sigmoid whose argument has logistic noise. A decision is 1
    with probability ``sigmoid(log_odds)``; without noise it is 1 where that is at least a half.

    Args:
        log_odds: Log odds of keeping, any shape.
        noise: Factor of the noise, in [0, 1].

    Paper: specification §2.1, mask.

    Example:
        >>> gate, sample = keep_gate(torch.tensor([0.5, -0.5]), noise=0.0)
        >>> gate, sample
        (tensor([1., 0.]), tensor([0.6225, 0.3775]))
    """
    if noise > 0:
        tiny = torch.finfo(log_odds.dtype).eps
        uniform = torch.rand_like(log_odds).clamp(tiny, 1.0 - tiny)
        log_odds = log_odds + noise * (uniform.log() - (-uniform).log1p())
    sample = log_odds.sigmoid()
    return (log_odds >= 0).to(sample.dtype) + (sample - sample.detach()), sample


def mask_bias(mask: Tensor, dropped: float = _DROPPED) -> Tensor:
    """Return the bias of keys under which attention is a masked softmax, in value and in gradient.

    The masked softmax ``alpha_j = z_j e^c_j / sum_k z_k e^c_k`` has a finite derivative at ``z_k = 0``, where
    ``log z_k`` has none. A bias of ``dropped`` leaves a key ``e^dropped`` of its weight, too little to see, and the
    slope ``e^-dropped`` multiplies what comes back through it: the derivative is that of the masked softmax.

    Args:
        mask: 1 for keys that are there and 0 for dropped ones, any shape.
        dropped: Bias of a dropped key, below 0; ``e^dropped`` must not underflow in the dtype of the attention.

    Paper: specification §2.1, masked softmax whose rows sum to one.

    Example:
        >>> mask_bias(torch.tensor([1.0, 0.0]))
        tensor([  0., -30.])
    """
    return torch.where(mask > 0.5, mask - 1.0, dropped + math.exp(-dropped) * mask)

"""What ContributionTokenDropping minimises beside the task loss: distance to saliency, and length.

Shape legend: B batch, T padded length, L layers. The next chapter is
:mod:`lightning_compress.callbacks.contribution_token_dropping`.

Paper: AdapLeR (arXiv 2203.08991), specification §1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.losses.base import LossMixin, is_validating
from lightning_compress.nn.contribution_token_dropping import ContributionShares, ExpectedTokens, KeyBias

__all__ = [
    "ContributionTokenDroppingLossMixin",
    "cost_pressure",
    "expected_length",
    "saliency_divergence",
    "saliency_target",
    "terms",
]

_FLOOR = 1e-7
_DAMPING = 5.0
"""Weight c of the present excess beside the multiplier, which adds up past ones."""


def saliency_target(saliency_BT: Tensor, survival_BT: Tensor, theta: Tensor | float = 1.0) -> Tensor:
    """Return what a predictor should say: saliencies of the survivors, the first token's times ``theta``, summing to 1.

    Args:
        saliency_BT: Saliencies of the teacher, at least 0.
        survival_BT: How much of each token got to the layer; the first token is fully there.
        theta: Factor of the first token's share.

    Example:
        >>> saliency_target(torch.tensor([[1.0, 3.0, 4.0]]), torch.tensor([[1.0, 1.0, 0.0]]), theta=3.0)
        tensor([[0.5000, 0.5000, 0.0000]])

    Departs from the paper: the official code lets gradients through the target, which then lowers its distance by
    moving masks (specification §1.7, 4); here it is a constant.
    """
    share_BT = _normalised((saliency_BT * survival_BT).detach())
    factor = theta.detach() if isinstance(theta, Tensor) else theta
    return _normalised(torch.where(_is_first(survival_BT), share_BT * factor, share_BT))


def saliency_divergence(target_BT: Tensor, share_BT: Tensor, survival_BT: Tensor) -> Tensor:
    """Return ``mean_b w_b KL(q_b || p_b)``; a text of which only the first token is left weighs nothing.

    Args:
        target_BT: Distribution q over the survivors.
        share_BT: Predicted distribution p.
        survival_BT: How much of each token got to the layer; ``w`` is its largest value beside the first token.

    Paper: specification §1.2, KL with both sides clipped to [1e-7, 1].
    """
    q_BT, p_BT = target_BT.clamp(_FLOOR, 1.0), share_BT.clamp(_FLOOR, 1.0)
    terms_BT = torch.where(survival_BT > 0, q_BT * (q_BT.log() - p_BT.log()), torch.zeros_like(q_BT))
    weight_B = survival_BT.masked_fill(_is_first(survival_BT), 0.0).amax(dim=1).detach()
    return (weight_B * terms_BT.sum(dim=1)).mean()


def expected_length(counts: Sequence[Tensor]) -> Tensor:
    """Return ``mean_b sum_l n_l``, raw token counts over all layers.

    Args:
        counts: Tokens that enter each layer, each ``[B]``.

    Example:
        >>> expected_length([torch.tensor([4.0, 2.0]), torch.tensor([2.0, 2.0])])
        tensor(5.)

    Departs from the paper: the official code counts the last layer by another rule than it drops by, which flatters the
    result (specification §1.7, 3); all layers are counted alike here.
    """
    return torch.stack(list(counts)).sum(dim=0).mean()


def cost_pressure(ratio: Tensor, target: float, multiplier: float, excess: float) -> Tensor:
    """Return ``(mu + c e_+) (ratio / target - 1)``: an augmented Lagrangian whose strength follows many batches.

    Args:
        ratio: Expected cost over dense cost of this batch, a scalar.
        target: The ratio of this moment.
        multiplier: ``mu``, found by dual ascent.
        excess: ``e``, by how much recent batches together exceeded the target; single batches vary too much.

    Example:
        >>> cost_pressure(torch.tensor(0.75), target=0.5, multiplier=2.0, excess=0.0)
        tensor(1.)
    """
    return (multiplier + _DAMPING * max(excess, 0.0)) * (ratio / target - 1.0)


def terms(handle: Any) -> dict[str, Tensor]:
    """Return the weighted terms of a prepared ContributionTokenDropping handle; none in warm-up and validation."""
    if handle.phase == "warmup" or is_validating(handle.policy):
        return {}
    config, policy = handle.config, handle.policy
    saliency_BT = handle.look_up_saliency()
    shares = handle.tape.read(ContributionShares)
    weighted = []
    for place, record in enumerate(shares):
        theta = policy.theta_K[place] if record.layer > 0 else 1.0
        target_BT = saliency_target(saliency_BT, record.survival_BT, theta)
        divergence = saliency_divergence(target_BT, record.share_BT, record.survival_BT)
        weighted.append((handle.num_layers - record.layer) * divergence)
    distance = config.saliency_weight * torch.stack(weighted).sum()
    if config.saliency_to_encoder:
        distance = distance - _leak(distance, handle.tape.read(KeyBias))
    lengths_B = shares[0].survival_BT.sum(dim=1)  # all tokens are there before the first layer that decides
    return {"saliency": distance, "length": _length(handle, lengths_B)}


def _length(handle: Any, lengths_B: Tensor) -> Tensor:
    counts = [record.count_B for record in handle.tape.read(ExpectedTokens)]
    ratio = handle.goal.measure(handle.model, handle.progress, torch.stack(counts, dim=1), lengths_B)
    if handle.phase == "recovery":
        return 0.0 * ratio
    if handle.config.length_weight is not None:
        return handle.config.length_weight * expected_length(counts)
    target, excess = handle.goal.scheduled(handle.progress), handle.goal.excess(handle.progress)
    return cost_pressure(ratio, target, handle.multiplier, excess)


def _leak(distance: Tensor, biases: Sequence[KeyBias]) -> Tensor:
    """Return a term of value 0 with the gradient by which ``distance`` would reach thresholds through hidden states.

    A predictor reads what earlier, thresholded attention made; the paper gives the thresholds no gradient of this
    term. What flows into each layer's key bias is found first, then taken off where the bias is a function of
    thresholds alone.
    """
    reached = [record for record in biases if record.bias_BT.requires_grad]
    gradients = torch.autograd.grad(
        distance, [record.bias_BT for record in reached], retain_graph=True, allow_unused=True
    )
    zero = distance.new_zeros(())
    parts = [
        (gradient_BT.detach() * (r.threshold_bias_BT - r.threshold_bias_BT.detach())).sum()
        for r, gradient_BT in zip(reached, gradients, strict=True)
        if gradient_BT is not None
    ]
    return torch.stack([zero, *parts]).sum()


def _is_first(survival_BT: Tensor) -> Tensor:
    """Return where the first token is, which always survives; padding may be on either side."""
    alive_BT = survival_BT > 0
    return alive_BT & (alive_BT.cumsum(dim=1) == 1)


def _normalised(share_BT: Tensor) -> Tensor:
    return share_BT / share_BT.sum(dim=1, keepdim=True).clamp_min(_FLOOR**2)


class ContributionTokenDroppingLossMixin(LossMixin):
    """For modules with an objective of their own that want to place the terms themselves."""

    def contribution_loss(self) -> Tensor | float:
        """Return the weighted distance to saliency and length for this step; 0 before dropping begins."""
        return sum(self.compression_terms("contribution_token_dropping").values(), start=0.0)

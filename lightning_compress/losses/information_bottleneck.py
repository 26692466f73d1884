"""The variational information bottleneck of masked hidden states: a norm term and an entropy term.

``I(Z; X)`` of states ``Z = m * H`` with ``m_i ~ Bernoulli(s_i)`` is bounded by a divergence to a Gaussian prior, which
falls into the two terms below; the card of BottleneckTokenDropping has the derivation. The next chapter is
:mod:`lightning_compress.losses.bottleneck_token_dropping`.

Shape legend: B batch, T padded length, D hidden size.

Paper: Infor-Coef (arXiv 2305.12458), specification §2.2 and §2.7.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.losses.base import LossMixin

__all__ = [
    "ENTROPY_WEIGHT",
    "NORM_WEIGHTS",
    "InformationBottleneckLossMixin",
    "NormForm",
    "information_bound",
    "kept_ratio",
    "masked_norm",
    "negative_entropy",
    "norm_weight_per_text",
]

NormForm = Literal["rms", "kl", "batch_fro"]
"""How the norm of masked states is taken; see :func:`masked_norm`."""

_PUBLISHED_WEIGHT, _PUBLISHED_TOKENS, _PUBLISHED_NORM = 4e-4, 2176, 15.0
"""The official script's weight, the tokens in its batch (32 of 68), and the norm of a token's state there."""
_CLIP = 1e-6
"""Probabilities keep this distance from 0 and 1, as in the official code."""


def norm_weight_per_text(batch_weight: float, tokens_per_batch: float) -> float:
    """Return the weight of the ``rms`` form that equals a weight of the ``batch_fro`` form: ``w * sqrt(tokens)``.

    Args:
        batch_weight: Weight of the Frobenius norm of a whole batch, as in the official code.
        tokens_per_batch: Tokens in the batches it was chosen for, padding included.

    Example:
        >>> round(norm_weight_per_text(4e-4, 2176), 4)
        0.0187
    """
    return batch_weight * math.sqrt(tokens_per_batch)


_RMS_WEIGHT = norm_weight_per_text(_PUBLISHED_WEIGHT, _PUBLISHED_TOKENS)
NORM_WEIGHTS: dict[NormForm, float] = {
    "rms": _RMS_WEIGHT,
    "kl": 2.0 * _RMS_WEIGHT / _PUBLISHED_NORM,
    "batch_fro": _PUBLISHED_WEIGHT,
}
"""The published weight of the norm term, converted so that each form starts with the same penalty."""
ENTROPY_WEIGHT = 4e-4
"""The published weight of the entropy term."""


def masked_norm(hidden_BTD: Tensor, keep_BT: Tensor, real_BT: Tensor, form: NormForm = "rms") -> Tensor:
    """Return how large the states are that are let through, a scalar; this is the term that drops tokens.

    With ``s`` in the place of ``keep_BT``, each form over real tokens only:

    * ``"rms"``: the mean over texts of ``sqrt(mean_i s_i^2 ||h_i||^2)``; independent of batch size and padding;
    * ``"kl"``: the mean over texts of ``mean_i s_i ||h_i||^2 / 2``, what the Gaussian prior with unit variance gives;
    * ``"batch_fro"``: ``sqrt(sum_bi s_bi^2 ||h_bi||^2)`` of the whole batch, which grows with the batch.

    Args:
        hidden_BTD: States before they are masked; pass them detached where the mask alone is to shrink.
        keep_BT: Probability (or sample) of each token's staying, in [0, 1].
        real_BT: True for tokens, False for padding; at least one token in each text.
        form: See above.

    Raises:
        ValueError: If ``form`` is unknown.

    Paper: ``"batch_fro"`` is the official code's, specification §2.2.
    Departs from the paper: padding is left out, and the default does not depend on the batch (§2.7, 2 and 4).

    Example:
        >>> hidden_BTD = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]]])
        >>> keep_BT, real_BT = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[True, True, False]])
        >>> round(float(masked_norm(hidden_BTD, keep_BT, real_BT)), 4)  # sqrt(25 / 2)
        3.5355
    """
    square_BT = hidden_BTD.float().square().sum(dim=2)
    keep_BT = keep_BT.float()
    if form == "kl":
        return 0.5 * _mean_over_text(keep_BT * square_BT, real_BT).mean()
    energy_BT = keep_BT.square() * square_BT
    if form == "rms":
        return _root(_mean_over_text(energy_BT, real_BT)).mean()
    if form == "batch_fro":
        return _root(energy_BT.masked_fill(~real_BT.bool(), 0.0).sum())
    raise ValueError(f"form={form!r} is not 'rms', 'kl' or 'batch_fro'")


def negative_entropy(keep_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return the mean of ``s ln s + (1 - s) ln(1 - s)`` over the real tokens of a text, and over texts.

    At least ``-ln 2``, where every decision is open, and 0 where all are certain: to minimise it keeps decisions soft.

    Args:
        keep_BT: Probability (or sample) of each token's staying, in [0, 1].
        real_BT: True for tokens, False for padding.

    Paper: specification §2.2, the entropy term, clipped to [1e-6, 1 - 1e-6].
    Departs from the paper: element by element; the official code takes ``ln(1 - s)`` from the first text of the batch
    for all of them (§2.7, 3).

    Example:
        >>> round(float(negative_entropy(torch.tensor([[0.5, 1.0]]), torch.tensor([[True, True]]))), 4)
        -0.3466
    """
    keep_BT = keep_BT.float().clamp(_CLIP, 1.0 - _CLIP)
    terms_BT = keep_BT * keep_BT.log() + (1.0 - keep_BT) * (-keep_BT).log1p()
    return _mean_over_text(terms_BT, real_BT).mean()


def information_bound(
    hidden_BTD: Tensor, keep_BT: Tensor, real_BT: Tensor, *, variance: float = 1.0
) -> Tensor:
    """Return the bound of ``I(Z; X)`` in nats per token, up to a constant: both terms at their true weights.

    ``mean_i [s_i ln s_i + (1 - s_i) ln(1 - s_i) + s_i ||h_i||^2 / (2 variance)]``; the published objective weighs the
    two parts freely.

    Args:
        hidden_BTD: States before they are masked.
        keep_BT: Probability of each token's staying.
        real_BT: True for tokens, False for padding.
        variance: Of the Gaussian prior, above 0.

    Raises:
        ValueError: If ``variance`` is not positive.
    """
    if variance <= 0:
        raise ValueError(f"variance={variance} is not positive")
    return negative_entropy(keep_BT, real_BT) + masked_norm(hidden_BTD, keep_BT, real_BT, "kl") / variance


def kept_ratio(keep_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return the mean share of real tokens that stay, over texts: the skim loss, which knows nothing of the states.

    Paper: Transkimmer's skim loss, specification §3.

    Example:
        >>> kept_ratio(torch.tensor([[1.0, 0.5, 1.0]]), torch.tensor([[True, True, False]]))
        tensor(0.7500)
    """
    return _mean_over_text(keep_BT.float(), real_BT).mean()


def _mean_over_text(values_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return the mean over the real tokens of each text, ``[B]``; what padding holds does not matter."""
    real_BT = real_BT.bool()
    return values_BT.masked_fill(~real_BT, 0.0).sum(dim=1) / real_BT.sum(dim=1)


def _root(values: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 is 0."""
    is_zero = values == 0
    return torch.where(is_zero, 0.0, values.masked_fill(is_zero, 1.0).sqrt())


class InformationBottleneckLossMixin(LossMixin):
    """For modules with an objective of their own: the bottleneck of any hidden states under any soft mask.

    The masks may come from samplers of this library or from anywhere else; no callback needs to be active.

    Example:
        >>> mixin = InformationBottleneckLossMixin()
        >>> hidden_BTD, keep_BT = torch.ones(2, 3, 4), torch.full((2, 3), 0.5)
        >>> round(float(mixin.information_bottleneck_loss(hidden_BTD, keep_BT, norm_weight=1.0, entropy_weight=0.0)), 4)
        1.0
    """

    def information_bottleneck_loss(
        self,
        hidden_BTD: Tensor,
        keep_BT: Tensor,
        real_BT: Tensor | None = None,
        *,
        norm_weight: float | None = None,
        entropy_weight: float = ENTROPY_WEIGHT,
        form: NormForm = "rms",
    ) -> Tensor:
        """Return the weighted sum of the norm and the entropy term.

        Args:
            hidden_BTD: States before they are masked.
            keep_BT: Probability (or soft sample) of each token's staying, in [0, 1].
            real_BT: True for tokens, False for padding; None where there is no padding.
            norm_weight: Weight of the norm term, at least 0; None takes the published one for ``form``.
            entropy_weight: Weight of the entropy term, at least 0.
            form: How the norm is taken, see :func:`masked_norm`.

        Raises:
            ValueError: If ``form`` is unknown.
        """
        real_BT = torch.ones_like(keep_BT, dtype=torch.bool) if real_BT is None else real_BT
        norm = masked_norm(hidden_BTD, keep_BT, real_BT, form)
        weight = NORM_WEIGHTS[form] if norm_weight is None else norm_weight
        return weight * norm + entropy_weight * negative_entropy(keep_BT, real_BT)

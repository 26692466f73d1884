"""How well tokens agree with human rationales, example by example.

Formulas of the ERASER benchmark, written over padded batches. The next chapter is
:mod:`lightning_compress.metrics.rationale_agreement`, which adds them up.

Shape legend: B examples, T padded length, P spans of kept tokens, R spans of rationale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CurveAreas", "SpanMatches", "areas_under_curve", "span_matches", "token_f1"]


class CurveAreas(NamedTuple):
    """Two readings of the area under a precision-recall curve."""

    average_precision_B: Tensor
    """Step function, sum of (R_k - R_{k-1}) P_k; float ``[B]``."""
    auprc_B: Tensor
    """Straight lines between the points, from precision 1 at recall 0; float ``[B]``."""


class SpanMatches(NamedTuple):
    """Runs of tokens, and how many of them match; integers ``[B]``."""

    kept_B: Tensor
    """Runs of kept tokens."""
    rationale_B: Tensor
    """Runs of rationale tokens."""
    matched_B: Tensor
    """Runs of kept tokens that overlap a run of rationale tokens by enough."""


def token_f1(keep_BT: Tensor, rationale_BT: Tensor) -> Tensor:
    """Return the harmonic mean of token precision and recall of each example, ``[B]``.

    Not a number where nothing is kept and nothing is a rationale.

    Paper: ERASER (DeYoung et al. 2020), token-level F1 of one instance.

    Example:
        >>> token_f1(torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]]))
        tensor([0.5000])
    """
    hits_B = (keep_BT & rationale_BT).sum(dim=1)
    return 2 * hits_B / (keep_BT.sum(dim=1) + rationale_BT.sum(dim=1))


def areas_under_curve(scores_BT: Tensor, rationale_BT: Tensor, valid_BT: Tensor) -> CurveAreas:
    """Return the areas under the precision-recall curve of each example.

    Tokens of equal score enter together, as one point of the curve. Not a number where no valid token is a
    rationale.

    Args:
        scores_BT: Higher means more likely a rationale, finite; what stands at invalid tokens is not read.
        rationale_BT: True for tokens that humans marked.
        valid_BT: True for tokens that count; padding and special tokens do not.

    Paper: ERASER (DeYoung et al. 2020), AUPRC; the average precision is the reading without interpolation.

    Example:
        >>> scores_BT = torch.tensor([[3.0, 2.0, 1.0]])
        >>> rationale_BT = torch.tensor([[True, False, True]])
        >>> areas_under_curve(scores_BT, rationale_BT, torch.ones(1, 3, dtype=torch.bool)).average_precision_B
        tensor([0.8333])
    """
    scores_BT = scores_BT if scores_BT.dtype == torch.float64 else scores_BT.float()
    order_BT = scores_BT.masked_fill(~valid_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sorted_BT, counts_BT = scores_BT.gather(1, order_BT), valid_BT.gather(1, order_BT)
    hits_BT = (rationale_BT & valid_BT).gather(1, order_BT).cumsum(dim=1)
    # a point of the curve stands where the next token has another score, and at the last valid token
    goes_on_BT = counts_BT[:, 1:] & (sorted_BT[:, 1:] == sorted_BT[:, :-1])
    ends_BT = counts_BT & ~torch.nn.functional.pad(goes_on_BT, (0, 1), value=False)
    ranks_T = torch.arange(1, order_BT.shape[1] + 1, device=order_BT.device)
    recall_BT = hits_BT / hits_BT[:, -1:]
    precision_BT = hits_BT / ranks_T
    step_BT, before_BT = _previous(recall_BT, ends_BT, 0.0), _previous(precision_BT, ends_BT, 1.0)
    step_BT = (recall_BT - step_BT) * ends_BT
    return CurveAreas(
        average_precision_B=(step_BT * precision_BT).sum(dim=1),
        auprc_B=(step_BT * (precision_BT + before_BT) / 2).sum(dim=1),
    )


def span_matches(keep_BT: Tensor, rationale_BT: Tensor, threshold: float = 0.5) -> SpanMatches:
    """Count the runs of kept tokens whose intersection over union with a run of rationale is large enough.

    At a threshold of 0.5 or more a run matches at most one other, because runs are at least a token apart.

    Paper: ERASER (DeYoung et al. 2020), IOU at 0.5.

    Example:
        >>> keep_BT = torch.tensor([[True, True, False, True]])
        >>> span_matches(keep_BT, torch.tensor([[True, False, False, False]]))
        SpanMatches(kept_B=tensor([2]), rationale_B=tensor([1]), matched_B=tensor([1]))
    """
    kept_starts_BT, rationale_starts_BT = _starts(keep_BT), _starts(rationale_BT)
    kept_run_BT, kept_size_P = _runs(keep_BT, kept_starts_BT)
    rationale_run_BT, rationale_size_R = _runs(rationale_BT, rationale_starts_BT)
    both_BT = keep_BT & rationale_BT
    pairs = torch.stack([kept_run_BT[both_BT], rationale_run_BT[both_BT]])
    (kept_run, rationale_run), shared = torch.unique(pairs, dim=1, return_counts=True)
    union = kept_size_P[kept_run] + rationale_size_R[rationale_run] - shared
    sequence_P = kept_starts_BT.nonzero()[:, 0]
    matched = sequence_P[kept_run[shared >= threshold * union]]
    return SpanMatches(
        kept_B=kept_starts_BT.sum(dim=1),
        rationale_B=rationale_starts_BT.sum(dim=1),
        matched_B=torch.bincount(matched, minlength=keep_BT.shape[0]),
    )


def _previous(values_BT: Tensor, ends_BT: Tensor, first: float) -> Tensor:
    """Return for each place the value at the last marked place before it; ``first`` where there is none."""
    places_T = torch.arange(1, values_BT.shape[1] + 1, device=values_BT.device)
    last_BT = (places_T * ends_BT).cummax(dim=1).values
    before_BT = torch.nn.functional.pad(last_BT, (1, 0))[:, :-1]
    return torch.nn.functional.pad(values_BT, (1, 0), value=first).gather(1, before_BT)


def _starts(inside_BT: Tensor) -> Tensor:
    return inside_BT & ~torch.nn.functional.pad(inside_BT, (1, 0), value=False)[:, :-1]


def _runs(inside_BT: Tensor, starts_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each place's run, counted through the batch, and the size of each run."""
    run_BT = (starts_BT.flatten().cumsum(0) - 1).view_as(starts_BT)
    return run_BT, torch.bincount(run_BT[inside_BT], minlength=int(starts_BT.sum()))

"""Agreement of kept tokens with the tokens that humans marked as their reasons, over a data set.

The formulas of one example are in :mod:`lightning_compress.metrics.rationale_formulas`.

Shape legend: B examples, T padded length.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_compress.metrics.rationale_formulas import areas_under_curve, span_matches, token_f1

__all__ = ["RationaleAgreement"]

_COUNTS = ("true_positives", "false_positives", "false_negatives", "true_negatives")
_EXAMPLES = ("examples", "examples_with_spans", "examples_with_scores")
_SUMS = ("f1_sum", "average_precision_sum", "auprc_sum", "span_precision_sum", "span_recall_sum")


class RationaleAgreement(Metric):
    """How well the tokens that a model keeps, or its scores, agree with human rationales.

    ``compute()`` returns a dictionary of scalars in [0, 1]:

    * ``false_positive_rate``, ``precision``, ``recall``: of all tokens together, e.g. FP / (FP + TN).
    * ``token_f1``: per example, then the mean.
    * ``iou_f1``: runs of kept tokens match runs of rationale tokens at an intersection over union of 0.5;
      precision over the examples that keep something, recall over all, and the F1 of these two means.
    * ``average_precision``, ``auprc``: from scores, per example, then the mean; as a step function, and by the
      trapezoids that ERASER draws. Not a number where no update had scores.

    Everything is per example but the first three; examples in which no valid token is a rationale count there
    only, since nothing could be found in them. What has no example yet is not a number.

    Paper: AdapLeR, comparison with rationales; ERASER (DeYoung et al. 2020), its token-F1, IOU-F1 and AUPRC.
    Departs from the paper: ERASER gives examples without rationale an F1 of 0, and average precision leaves out
    examples that are all rationale.

    Example:
        >>> metric = RationaleAgreement()
        >>> rationale_BT = torch.tensor([[False, True, True, False, False]])
        >>> valid_BT = torch.tensor([[False, True, True, True, True]])
        >>> metric.update(torch.tensor([[True, True, False, True, False]]), rationale_BT, valid_BT)
        >>> values = metric.compute()
        >>> values["false_positive_rate"].item(), values["token_f1"].item()
        (0.5, 0.5)
    """

    is_differentiable: ClassVar[bool] = False
    higher_is_better: ClassVar[bool | None] = None
    full_state_update: ClassVar[bool] = False

    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor
    true_negatives: Tensor
    examples: Tensor
    examples_with_spans: Tensor
    examples_with_scores: Tensor
    f1_sum: Tensor
    average_precision_sum: Tensor
    auprc_sum: Tensor
    span_precision_sum: Tensor
    span_recall_sum: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in _COUNTS + _EXAMPLES:
            self.add_state(name, default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in _SUMS:
            self.add_state(name, default=torch.zeros(()), dist_reduce_fx="sum")

    def update(
        self, keep_BT: Tensor, rationale_BT: Tensor, valid_BT: Tensor, scores_BT: Tensor | None = None
    ) -> None:
        """Add some examples.

        Args:
            keep_BT: True for tokens that the model keeps.
            rationale_BT: True for tokens that humans marked.
            valid_BT: True for tokens that count; padding and special tokens do not.
            scores_BT: Higher means more likely kept; needed for the two areas only.

        Raises:
            TypeError: If one of the first three is not boolean.
            ValueError: If shapes differ, or a score of a valid token is not finite.
        """
        _check(keep_BT, rationale_BT, valid_BT, scores_BT)
        keep_BT, rationale_BT = keep_BT & valid_BT, rationale_BT & valid_BT
        self.true_positives += (keep_BT & rationale_BT).sum()
        self.false_positives += (keep_BT & ~rationale_BT).sum()
        self.false_negatives += (rationale_BT & ~keep_BT).sum()
        self.true_negatives += (valid_BT & ~keep_BT & ~rationale_BT).sum()
        marked_B = rationale_BT.any(dim=1)
        keep_BT, rationale_BT, valid_BT = keep_BT[marked_B], rationale_BT[marked_B], valid_BT[marked_B]
        self.examples += marked_B.sum()
        self.f1_sum += token_f1(keep_BT, rationale_BT).sum()
        self._add_spans(keep_BT, rationale_BT)
        if scores_BT is not None:
            areas = areas_under_curve(scores_BT[marked_B], rationale_BT, valid_BT)
            self.average_precision_sum += areas.average_precision_B.sum()
            self.auprc_sum += areas.auprc_B.sum()
            self.examples_with_scores += marked_B.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the agreement over all examples and processes."""
        span_precision = self.span_precision_sum / self.examples_with_spans
        span_recall = self.span_recall_sum / self.examples
        return {
            "false_positive_rate": self.false_positives / (self.false_positives + self.true_negatives),
            "precision": self.true_positives / (self.true_positives + self.false_positives),
            "recall": self.true_positives / (self.true_positives + self.false_negatives),
            "token_f1": self.f1_sum / self.examples,
            "iou_f1": _f1(span_precision.nan_to_num(0.0), span_recall),
            "average_precision": self.average_precision_sum / self.examples_with_scores,
            "auprc": self.auprc_sum / self.examples_with_scores,
        }

    def _add_spans(self, keep_BT: Tensor, rationale_BT: Tensor) -> None:
        spans = span_matches(keep_BT, rationale_BT)
        self.examples_with_spans += (spans.kept_B > 0).sum()
        self.span_precision_sum += (spans.matched_B / spans.kept_B.clamp(min=1)).sum()
        self.span_recall_sum += (spans.matched_B / spans.rationale_B).sum()


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    """Return the harmonic mean, 0 where both are 0."""
    return 2 * precision * recall / (precision + recall).where(precision + recall != 0, 1.0)


def _check(keep_BT: Tensor, rationale_BT: Tensor, valid_BT: Tensor, scores_BT: Tensor | None) -> None:
    named = {"keep_BT": keep_BT, "rationale_BT": rationale_BT, "valid_BT": valid_BT}
    for name, mask_BT in named.items():
        if mask_BT.dtype != torch.bool:
            raise TypeError(f"{name} must be boolean, got {mask_BT.dtype}; scores go into scores_BT")
    tensors = [*named.values()] + ([] if scores_BT is None else [scores_BT])
    if keep_BT.dim() != 2 or any(tensor.shape != keep_BT.shape for tensor in tensors):
        raise ValueError(
            f"all tensors must be [B, T] (examples, tokens); got {[list(tensor.shape) for tensor in tensors]}"
        )
    if scores_BT is not None and not bool(scores_BT[valid_BT].isfinite().all()):
        raise ValueError("scores_BT must be finite at valid tokens; give removed tokens a low score")

"""What an answer costs against labels: one class or number per text, or the next token at each place.

Computed in fp32, whatever the logits come in. Exits learn by it (:mod:`lightning_compress.losses.multi_exit`), and
widths are judged by it (:mod:`lightning_compress.methods.width_calibration`).

Shape legend: B batch, T padded length, C classes, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "label_loss", "next_token_loss"]

IGNORED = -100
"""Class of what has no label."""


def label_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean cross-entropy of classes; of numbers (one logit) the mean squared error.

    Args:
        logits_BC: What an exit says.
        labels_B: Classes, -100 where there is none; or numbers, ``[B]`` or ``[B, 1]``.

    Raises:
        ValueError: If there are several logits and labels are no class indices.

    Paper: COST-EFF (arXiv 2210.15523), specification §2.1, ``CE(z_l, y)``.
    Departs from the paper: exits of a regression learn nothing in the official code.

    Example:
        >>> import torch
        >>> label_loss(torch.zeros(1, 2), torch.tensor([1]))  # ln 2
        tensor(0.6931)
    """
    if logits_BC.shape[-1] == 1:
        return F.mse_loss(logits_BC.float().flatten(), labels_B.float().flatten())
    if labels_B.dtype.is_floating_point or labels_B.dim() != 1:
        raise ValueError(
            f"labels of type {labels_B.dtype} and shape {list(labels_B.shape)} are no class indices [B]: exits are for "
            "one class or one number per text, so give whole numbers of shape [B]; where texts have several labels at "
            'once, set config.problem_type = "multi_label_classification" and train without exits'
        )
    return F.cross_entropy(logits_BC.float(), labels_B, ignore_index=IGNORED)


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token over places with one; labels of -100 do not count.

    Example:
        >>> import torch
        >>> next_token_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))  # ln 4
        tensor(1.3863)
    """
    said, next_BT = logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten()
    return F.cross_entropy(said, next_BT, ignore_index=IGNORED)

"""The usual recipe for fine-tuning: AdamW without decay on biases and norms, linear warm-up and decay.

The next chapter is :mod:`lightning_compress.tasks.base`, which uses it.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

__all__ = ["parameter_groups", "warmup_then_decay"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the trainable parameters into those that decay and those that do not.

    Biases and the parameters of norms, which are the ones with fewer than two dimensions, do not decay, nor
    do parameters that their model marks with ``_no_weight_decay`` (Mamba does).

    Args:
        module: Where to look for parameters.
        weight_decay: Decay of the first group, 0 or more.

    Returns:
        One or two groups for an optimizer, none of them empty.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (spared if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_then_decay(optimizer: Optimizer, num_steps: int | float, warmup_ratio: float) -> LambdaLR:
    """Raise the learning rate linearly from 0, then lower it linearly to 0 at the last step.

    Args:
        optimizer: Its learning rate is the peak.
        num_steps: Optimizer steps of the whole training, finite.
        warmup_ratio: Share of the steps spent rising, in [0, 1).

    Raises:
        ValueError: The length of the training is not known.
    """
    if not math.isfinite(num_steps):
        raise ValueError(
            "The learning rate decays to zero at the last step, but the Trainer has no last step: set"
            " `max_epochs` or `max_steps`, or configure an optimizer and scheduler of your own."
        )
    return get_linear_schedule_with_warmup(optimizer, math.ceil(num_steps * warmup_ratio), int(num_steps))

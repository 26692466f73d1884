"""The methods, in the order in which they compose: slim, factorise, drop or exit, quantise; a teacher may look on."""

from __future__ import annotations

from torch import nn

from lightning_compress.methods import (
    block_quantization,
    bottleneck_token_dropping,
    contribution_token_dropping,
    distillation,
    multi_exit,
    soft_threshold_rank,
    width_slimming,
)
from lightning_compress.methods.base import (
    AuxiliaryGroup,
    Companion,
    GradientReader,
    MethodConfig,
    MethodHandle,
    MethodModule,
    config_from_dict,
    leaves_no_trace,
)
from lightning_compress.nn.surgery import Ledger
from lightning_compress.plan import CompressionPlan, PlanError

__all__ = [
    "METHODS",
    "AuxiliaryGroup",
    "Companion",
    "GradientReader",
    "MethodConfig",
    "MethodHandle",
    "MethodModule",
    "config_from_dict",
    "leaves_no_trace",
    "method_named",
    "restore",
]

METHODS: dict[str, MethodModule] = {
    "width_slimming": width_slimming,  # type: ignore[dict-item]
    "soft_threshold_rank": soft_threshold_rank,  # type: ignore[dict-item]
    "contribution_token_dropping": contribution_token_dropping,  # type: ignore[dict-item]
    "bottleneck_token_dropping": bottleneck_token_dropping,  # type: ignore[dict-item]
    "multi_exit": multi_exit,  # type: ignore[dict-item]
    "block_quantization": block_quantization,  # type: ignore[dict-item]
    "distillation": distillation,  # type: ignore[dict-item]
}


def method_named(stem: str) -> MethodModule:
    """Return a method by stem.

    Raises:
        PlanError: If this release does not know it.
    """
    if stem not in METHODS:
        raise PlanError(f"unknown method {stem!r}; this release knows {sorted(METHODS)}")
    return METHODS[stem]


def restore(model: nn.Module, plan: CompressionPlan) -> list[Ledger]:
    """Rebuild a converted plan's structure on a fresh, possibly meta-device model, without weights.

    Raises:
        PlanError: If the plan is for another family, names an unknown method, is still in training form, or does
            not fit the model; nothing has been allocated then.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if plan.model_type != model_type:
        raise PlanError(f"plan is for model_type {plan.model_type!r}, the model is {model_type!r}")
    for record in plan.methods:
        if record.stage != "converted":
            raise PlanError(
                f"plan holds {record.method} in training form: convert the model before saving it"
            )
    return [method_named(record.method).restore(model, record.structure) for record in plan.methods]

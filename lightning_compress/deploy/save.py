"""Save: one folder of safetensors and JSON that opens without Lightning and is never half written.

A converted model carries its plan, see :func:`attach_plan`; its own ``save_pretrained`` writes the same
``config.json`` and ``model.safetensors`` as :func:`save_pretrained` here, which adds the checks, the
tokenizer, the model card and the atomic exchange. The counterpart is :mod:`lightning_compress.deploy.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_compress.deploy.directory import check_target, replaced_directory
from lightning_compress.deploy.load import (
    QUANT_METHOD,
    CompressionConfig,
    CompressionQuantizer,
    mark_as_plain,
)
from lightning_compress.deploy.model_card import disk_bytes, model_card, read_measurements
from lightning_compress.deploy.skeleton import build_skeleton, root_of, tensor_shapes
from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.plan import CompressionPlan

__all__ = ["attach_plan", "detach_plan", "plan_of", "save_pretrained"]


def attach_plan(model: nn.Module, plan: CompressionPlan) -> None:
    """Let a model carry its plan, so that its own ``save_pretrained`` and ``push_to_hub`` write it.

    Sets ``config.quantization_config`` and ``hf_quantizer``; a plan attached before is replaced. A plan without methods
    stays out of the configuration: the model is a plain one, and opens without this library.

    Args:
        model: A transformers model, or any module that contains one.
        plan: The plan of this model, with paths from the transformers model on.
    """
    transformer = _transformer(model)
    config = CompressionConfig(plan.to_dict(), root_of(transformer))
    vars(transformer.config).pop("quantization_config", None)
    if plan.methods:
        transformer.config.quantization_config = config  # type: ignore[attr-defined]
    transformer.hf_quantizer = CompressionQuantizer(config)  # type: ignore[assignment]
    mark_as_plain(transformer)


def detach_plan(model: nn.Module) -> None:
    """Take the plan off a model whose structure is dense again; does nothing where there is none."""
    transformer = _transformer(model)
    if _quantizer(transformer) is not None:
        del transformer.hf_quantizer
        vars(transformer.config).pop("quantization_config", None)


def plan_of(model: nn.Module) -> CompressionPlan | None:
    """Return the plan that the transformers model in ``model`` carries; None for a dense one."""
    quantizer = _quantizer(_transformer(model))
    return None if quantizer is None else quantizer.compression_plan


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    measurements: Mapping[str, Any] | None = None,
) -> Path:
    """Write a converted model so that transformers opens it after ``import lightning_compress``.

    The folder holds ``config.json`` with the plan, ``model.safetensors``, the tokenizer's files if one is
    given, and a model card; nothing is pickled. It appears as a whole or not at all. In an existing model
    directory other files stay as they are.

    Args:
        model: A transformers model, or any module (a ``LightningModule``, a compiled model) that contains
            one.
        directory: Where to write; a new or empty folder, or a model directory to replace.
        tokenizer: The tokenizer or processor to save with the model.
        measurements: Measured numbers for the model card, see
            :func:`~lightning_compress.deploy.model_card.model_card`.

    Returns:
        The folder.

    Raises:
        ValueError: If the model carries no plan, is still in training form, has peft adapters, does not have
            the structure its plan describes, or the folder holds something else. Nothing has been written
            then.
    """
    transformer, target = _transformer(model), Path(directory)
    check_target(target)
    groups = read_measurements(measurements)
    plan = _deployable_plan(transformer)
    with replaced_directory(target) as folder:
        transformer.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        card = model_card(transformer, plan, weight_bytes=disk_bytes(folder), measurements=groups)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def _transformer(model: nn.Module) -> PreTrainedModel:
    found = find_transformer(model)[1]
    assert isinstance(found, PreTrainedModel)
    return found


def _quantizer(transformer: PreTrainedModel) -> CompressionQuantizer | None:
    # The configuration alone proves nothing: a dense teacher may have been built from a compressed model's.
    quantizer = getattr(transformer, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    return quantizer if method == QUANT_METHOD else None


def _deployable_plan(transformer: PreTrainedModel) -> CompressionPlan:
    """Return the plan after making sure that the model can be opened again with it."""
    adapted = [name for name, module in transformer.named_modules() if _is_adapter(module)]
    if adapted:
        raise ValueError(
            f"the model has peft adapters (e.g. at {adapted[0]!r}), which cannot be saved with it: merge "
            "them first, and save what peft_model.merge_and_unload() returns"
        )
    quantizer = _quantizer(transformer)
    if quantizer is None:
        raise ValueError(
            f"the {type(transformer).__name__} carries no compression plan: if it is still in training, call "
            "lightning_compress.convert(module) first; a dense model is saved by its own save_pretrained"
        )
    plan = quantizer.compression_plan
    _check_fits(transformer, plan, quantizer.quantization_config)
    return plan


def _check_fits(transformer: PreTrainedModel, plan: CompressionPlan, config: CompressionConfig) -> None:
    """Refuse a model that differs from what loading its plan would build."""
    wanted, have = tensor_shapes(build_skeleton(transformer, plan, config.root)), tensor_shapes(transformer)
    wrong = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors do not fit the model's plan, e.g. {name!r}: the plan says "
            f"{wanted.get(name)}, the model has {have.get(name)}. If it is still in training form, call "
            "lightning_compress.convert(module) first; otherwise do not change its structure after conversion"
        )


def _is_adapter(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)

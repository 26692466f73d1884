"""Skeletons: a model's structure without weights, rebuilt from a plan and checked before a weight is read.

A skeleton lives on the meta device: it has shapes and no storage, so an impossible plan costs nothing to
refuse. The next chapter is :mod:`lightning_compress.deploy.load`, which does this inside ``from_pretrained``.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from lightning_compress import methods
from lightning_compress.nn.quantized_attention import IMPLEMENTATION
from lightning_compress.plan import CompressionPlan, PlanError

__all__ = [
    "Root",
    "build_skeleton",
    "check_checkpoint",
    "require_converted",
    "restore_structure",
    "root_of",
    "spare_from_initialising",
    "tensor_shapes",
]

Root = Literal["model", "base_model"]
"""What the paths in a plan start from: the saved model, or its base model where only that was saved."""

Shapes = dict[str, tuple[int, ...]]


def root_of(model: PreTrainedModel) -> Root:
    """Say what the paths of a plan made for this model start from."""
    return "base_model" if model.base_model is model else "model"


def require_converted(plan: CompressionPlan) -> None:
    """Refuse a plan that is still in training form.

    Raises:
        ValueError: If a method of the plan has not been converted.
    """
    pending = [record.method for record in plan.methods if record.stage != "converted"]
    if pending:
        raise ValueError(
            f"the methods {pending} are still in training form (stage 'prepared'), which cannot be deployed: "
            "call lightning_compress.convert(module) first"
        )


def restore_structure(model: PreTrainedModel, plan: CompressionPlan, root: Root) -> None:
    """Give a fresh model the structure of a plan; weights are whatever the device of the model makes them.

    A plan that was saved with a head can be restored on the bare base model, and the other way round, as
    transformers allows for the weights themselves.

    Args:
        model: A model just built from its configuration, usually on the meta device.
        plan: The structure.
        root: What the paths in the plan start from.

    Raises:
        PlanError: If the plan was made for another family, or names a method, path or bound that does not
            fit.
        ValueError: If the plan is still in training form.
    """
    require_converted(plan)
    if plan.model_type != model.config.model_type:
        raise PlanError(
            f"the plan was made for model_type {plan.model_type!r}, the model has "
            f"{model.config.model_type!r}: config.json and plan must come from one save"
        )
    methods.restore(_paths_start(model, root), plan)


def _paths_start(model: PreTrainedModel, root: Root) -> nn.Module:
    if root == root_of(model):
        return model
    if root == "base_model":
        return model.base_model
    outside = nn.Module()  # stands where the head was, so that paths such as "bert.encoder" resolve
    outside.add_module(model.base_model_prefix, model)
    outside.config = model.config  # type: ignore[assignment]
    return outside


def build_skeleton(
    model: PreTrainedModel, plan: CompressionPlan | None, root: Root = "model"
) -> PreTrainedModel:
    """Build the model's class anew on the meta device, compressed by ``plan`` or dense without one."""
    config = copy.deepcopy(model.config)
    if config._attn_implementation == IMPLEMENTATION:  # which no file tells: the plan does
        config._attn_implementation = "sdpa"
    with torch.device("meta"):
        skeleton = type(model)(config)
        if plan is not None:
            restore_structure(skeleton, plan, root)
    return skeleton


def tensor_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every tensor of the state dict by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_checkpoint(model: PreTrainedModel, before: Shapes, files: Sequence[str] | None) -> None:
    """Compare what a plan made of a skeleton with what the weight files hold, reading their headers only.

    A tensor that the plan only makes smaller may be absent, as it may where a dense checkpoint is opened with another
    head.

    Args:
        model: The restored skeleton.
        before: :func:`tensor_shapes` of the skeleton before it was restored.
        files: Paths of the weight files; None where transformers was handed a state dict instead.

    Raises:
        PlanError: If a tensor that the plan asks for is absent or has another shape.
        ValueError: If a weight file is not safetensors.
    """
    if not files:
        return
    stored = _stored_shapes(files)
    asked = {name: shape for name, shape in tensor_shapes(model).items() if before.get(name) != shape}
    for name, shape in asked.items():
        found = _find(stored, name, model.base_model_prefix)
        if found is None and name in before:
            continue  # a head or pooler that the saved model did not have: transformers makes it new, and says so
        if found != shape:
            has = "no such tensor" if found is None else f"shape {list(found)}"
            raise PlanError(
                f"the plan asks for {name!r} of shape {list(shape)}, the weight files have {has}: "
                "config.json and weights do not belong together; save the model again"
            )


def spare_from_initialising(
    model: PreTrainedModel, before: Container[nn.Module], files: Sequence[str] | None
) -> None:
    """Keep transformers from initialising modules around what a plan put in place, whose own tensors the files hold.

    Some families initialise a weight from the module around it (GPT-2 that of ``c_proj``, Mamba that of ``out_proj``),
    also where all weights are read from files, and what a plan put there may have none. Modules below are still asked,
    each for itself, and so is one with buffers, which files need not hold.

    Args:
        model: The restored skeleton.
        before: The modules of the skeleton before it was restored.
        files: Paths of the weight files; None where transformers was handed a state dict instead.
    """
    stored = _stored_shapes(files or ())
    for path, module in model.named_modules():
        if all(child in before for child in module.children()) or list(module.buffers(recurse=False)):
            continue
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if all(_find(stored, name, model.base_model_prefix) is not None for name in own):
            module._is_hf_initialized = True  # type: ignore[assignment]


def _stored_shapes(files: Sequence[str]) -> Shapes:
    shapes: Shapes = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path} is not a safetensors file: compressed models are not read from pickles")
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
    return shapes


def _find(stored: Mapping[str, tuple[int, ...]], name: str, prefix: str) -> tuple[int, ...] | None:
    """Look a tensor up as transformers does: with the base model's prefix added or removed if need be."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in stored:
            return stored[candidate]
    return None

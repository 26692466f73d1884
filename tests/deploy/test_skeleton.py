from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from lightning_compress.deploy import plan_of
from lightning_compress.deploy.skeleton import (
    build_skeleton,
    check_checkpoint,
    restore_structure,
    root_of,
    spare_from_initialising,
    tensor_shapes,
)
from lightning_compress.plan import CompressionPlan, PlanError


def test_a_skeleton_has_the_shapes_of_the_model_and_no_storage(compressed: PreTrainedModel) -> None:
    skeleton = build_skeleton(compressed, plan_of(compressed))
    assert tensor_shapes(skeleton) == tensor_shapes(compressed)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_a_dense_skeleton_has_the_shapes_before_compression(
    build: dict[str, Callable[[], PreTrainedModel]], bert: PreTrainedModel
) -> None:
    assert tensor_shapes(build_skeleton(bert, None)) == tensor_shapes(build["bert"]())


def test_paths_start_from_the_model_that_was_given_a_plan(bert: PreTrainedModel) -> None:
    assert root_of(bert) == "model"
    assert root_of(bert.base_model) == "base_model"


def test_restoring_on_a_real_device_gives_modules_of_the_model_s_dtype(
    build: dict[str, Callable[[], PreTrainedModel]], bert: PreTrainedModel
) -> None:
    model, plan = build["bert"]().to(torch.bfloat16), plan_of(bert)
    assert plan is not None
    restore_structure(model, plan, "model")
    assert tensor_shapes(model) == tensor_shapes(bert)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_plan_for_another_family_does_not_fit(bert: PreTrainedModel) -> None:
    with pytest.raises(PlanError, match=r"'gpt2'.*'bert'"):
        restore_structure(bert, CompressionPlan("gpt2"), "model")


def test_a_state_dict_in_memory_needs_no_check_of_files(bert: PreTrainedModel) -> None:
    check_checkpoint(bert, {}, None)
    with pytest.raises(ValueError, match="not a safetensors file"):
        check_checkpoint(bert, {}, ["pytorch_model.bin"])


def fresh(model: Any) -> Any:
    """The model as it is before transformers has gone over it to initialise what no file holds."""
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    return model


@pytest.mark.parametrize("stored", [["A_log", "D"], ["A_log"], []])
def test_only_what_stands_around_something_new_and_is_in_the_files_is_spared(
    build: dict[str, Callable[[], PreTrainedModel]], stored: list[str], tmp_path: Path
) -> None:
    model = fresh(build["mamba"]())
    before, mixer = set(model.modules()), model.backbone.layers[1].mixer
    mixer.out_proj = nn.Identity()
    assert {name for name, _ in mixer.named_parameters(recurse=False)} == {"A_log", "D"}
    path = str(tmp_path / "model.safetensors")
    save_file({f"backbone.layers.1.mixer.{name}": torch.ones(1) for name in stored}, path)
    spare_from_initialising(model, before, [path])
    spared = [module for module in model.modules() if getattr(module, "_is_hf_initialized", False)]
    assert spared == ([mixer] if len(stored) == 2 else [])


def test_what_has_buffers_that_no_file_holds_is_initialised(
    build: dict[str, Callable[[], PreTrainedModel]],
) -> None:
    model = fresh(build["bert"]())
    before, embeddings = set(model.modules()), model.bert.embeddings
    embeddings.LayerNorm = nn.Identity()
    spare_from_initialising(model, before, None)
    assert "position_ids" in dict(embeddings.named_buffers(recurse=False))
    assert not getattr(embeddings, "_is_hf_initialized", False)

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lightning_compress.deploy import plan_of
from lightning_compress.deploy.skeleton import (
    build_skeleton,
    check_checkpoint,
    restore_structure,
    root_of,
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

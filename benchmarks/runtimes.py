"""Ways to run an encoder that users have instead, each as a function from a batch to logits.

A runtime that is not installed is absent: :func:`absent` names it, and nobody is timed in its place.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from latency_rounds import Batch, Runner
from torch import Tensor, nn

from lightning_compress.deploy.export import export_onnx

__all__ = [
    "OPTIONAL",
    "Answer",
    "absent",
    "compiled",
    "dynamic_onnx",
    "in_onnxruntime",
    "in_openvino",
    "in_torch",
    "in_torchao",
    "in_torch_int8",
    "over_all",
    "ours_onnx",
    "versions",
]

OPTIONAL = ("onnxruntime", "openvino", "nncf", "torchao")
"""nncf quantises for OpenVINO with calibration data."""

Answer = Callable[[Batch], Tensor]
"""Logits of a batch."""


def absent() -> list[str]:
    """Return which of the optional runtimes are not installed."""
    return [name for name in OPTIONAL if find_spec(name) is None]


def versions() -> dict[str, str]:
    """Return the versions of those that are."""
    found = {}
    for name in OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def over_all(answer: Answer) -> Runner:
    """Return what answers batch after batch."""

    def run(batches: list[Batch]) -> None:
        for batch in batches:
            answer(batch)

    return run


def in_torch(model: nn.Module) -> Answer:
    """Return a model as a function."""
    model.eval()

    def answer(batch: Batch) -> Tensor:
        with torch.inference_mode():
            return model(**batch).logits

    return answer


def in_torch_int8(model: nn.Module, engine: str) -> Answer:
    """Quantise a copy by ``torch.ao``, weights to int8 and inputs as they come.

    Args:
        model: In fp32.
        engine: ``"onednn"`` or ``"fbgemm"``, fixed when weights are packed.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated in favour of torchao, which is slower here
            small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    finally:
        torch.backends.quantized.engine = before
    return in_torch(small)


def in_torchao(model: nn.Module) -> Answer:
    """Quantise a copy by torchao, weights to int8 and inputs by row as they come."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    small = copy.deepcopy(model)
    quantize_(small, Int8DynamicActivationInt8WeightConfig())
    return in_torch(small)


def compiled(model: nn.Module) -> Answer:
    """Compile a copy for the shape it is called with first, weights frozen into the code."""
    import torch._inductor.config

    torch.compiler.reset()
    code: Any = torch.compile(copy.deepcopy(model).eval(), dynamic=False)

    def answer(batch: Batch) -> Tensor:
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return code(**batch).logits

    return answer


def ours_onnx(model: nn.Module, path: Path, **form: Any) -> Path:
    """Export by this library, for texts of any length."""
    return export_onnx(model, path, length="dynamic", **form)


def dynamic_onnx(model: nn.Module, path: Path) -> Path:
    """Export by torch alone and quantise by onnxruntime, as its documentation says."""
    from onnxruntime.quantization import quantize_dynamic  # pyright: ignore[reportMissingImports]

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in names)
    sizes = {name: {0: "batch", 1: "tokens"} for name in names}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = Path(folder) / "model.onnx"
        torch.onnx.export(
            copy.deepcopy(model), example, str(plain), input_names=names, output_names=["logits"],
            dynamic_axes=sizes, dynamo=False,
        )  # fmt: skip
        logging.getLogger().setLevel(logging.ERROR)  # of advice to preprocess, which changes nothing here
        quantize_dynamic(plain, path)
    return path


def in_onnxruntime(path: Path) -> Answer:
    """Open a file in onnxruntime, with as many threads as torch has."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def answer(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])

    return answer


def in_openvino(
    path: Path, shape: tuple[int, int], precision: str, group: int = 0, calibration: Sequence[Batch] = ()
) -> Answer:
    """Compile a file in OpenVINO for one shape, with as many threads as torch has.

    Args:
        path: ONNX.
        shape: Texts and tokens of every batch.
        precision: ``"f32"`` or ``"bf16"``, of what is not int8.
        group: Inputs of int8 weights are rounded in groups of so many; 0 leaves them as they are.
        calibration: If given, the model is quantised to int8 by nncf, with ranges of activations from these.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    graph = core.read_model(path)
    names = [entry.any_name for entry in graph.inputs]
    graph.reshape({name: list(shape) for name in names})
    if calibration:
        graph = _calibrated(graph, names, calibration)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def answer(batch: Batch) -> Tensor:
        found = request.infer({name: batch[name].numpy() for name in names}, share_inputs=True)
        return torch.from_numpy(next(iter(found.values())).copy())

    return answer


def _calibrated(graph: Any, names: list[str], calibration: Sequence[Batch]) -> Any:
    import nncf  # pyright: ignore[reportMissingImports]

    data = nncf.Dataset(list(calibration), lambda batch: {name: batch[name].numpy() for name in names})
    kind = nncf.ModelType.TRANSFORMER
    return nncf.quantize(graph, data, model_type=kind, subset_size=len(calibration))

"""Export: an encoder as one ONNX file, checked in onnxruntime; token dropping with fixed shapes, one exit, int8.

It needs the extra ``onnx``. What is exported is the static variant of :mod:`lightning_compress.runtime.static`. The
next chapter is :mod:`lightning_compress.deploy.onnx_program`.

Shape legend: B sequences, T padded length.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.deploy.float_form import round_by_rows, to_float_form
from lightning_compress.deploy.onnx_int8 import left_in_fp32, to_int8
from lightning_compress.deploy.onnx_program import OnnxProgram, forget_sources, to_onnx
from lightning_compress.nn.anatomy import describe, find_transformer
from lightning_compress.nn.packed_matrix import PackedMatrix
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime.packing import packed_encoder
from lightning_compress.runtime.static import make_static

__all__ = ["EXTRA", "Runtime", "export_onnx"]

EXTRA = ("onnx", "onnxruntime", "onnxscript")
"""What the extra ``onnx`` installs."""
Runtime = Literal["onnxruntime", "openvino"]
"""Where a file is to be fast."""
_TOLERANCE = 1e-4


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    length: int | Literal["dynamic"],
    counts: Sequence[int] | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    exit_layer: int | None = None,
    int8: bool = False,
    runtime: Runtime = "onnxruntime",
) -> Path:
    """Write an encoder as ONNX, for texts padded to ``length`` on the right.

    The inputs are ``input_ids``, ``attention_mask`` and, where the model tells segments apart, ``token_type_ids``,
    int64 ``[B, T]``; the output is ``logits``, or ``last_hidden_state`` of a base model. Before anything is written,
    onnxruntime and the model have to give the same outputs. Exits are not asked who may leave: all texts run the same
    layers.

    A quantised model is written with the weights that its integers stand for. Nothing else of it is rounded in the fp32
    file: inputs of linears are as they come, and attention, activations and norms compute in floating point.

    With ``int8`` the weights of layers and tables are integers with a scale for each output; those that were quantised
    with a factor for each row, to whatever bits, keep theirs. Laid out for onnxruntime, inputs are rounded too, to 8
    bits by one scale for the whole batch: outputs differ, with the batch, and are to be measured on a data set.
    Laid out for OpenVINO, they equal those of a model with these weights, and the runtime decides: it multiplies in
    fp32 or bf16, or rounds inputs in groups (its ``DYNAMIC_QUANTIZATION_GROUP_SIZE``).

    Args:
        model: A token-dropping model, a packed or a dense encoder, or a module that holds one; quantised or not. It
            stays as it is.
        path: The file to write, which is replaced as a whole.
        length: Tokens per text, padding included; ``"dynamic"`` for any number where no tokens are dropped.
        counts: Tokens that enter each layer of a token-dropping model, see
            :func:`~lightning_compress.runtime.static.static_counts`.
        batch: Texts per call, or ``"dynamic"`` for any number.
        exit_layer: Layer, from 0, whose exit answers; later layers are left out. None runs all layers.
        int8: Whether to write weights and tables in int8.
        runtime: Where an int8 file is to be fast; one in fp32 is the same for both.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If the extra is not installed.
        ValueError: If the length does not fit the model, is below 2, or dynamic with counts, the batch is below 1, the
            runtime is unknown, the path is a folder or below a file, the model drops tokens and there are no counts, or
            for the reasons of :func:`~lightning_compress.runtime.static.make_static`.
        RuntimeError: If onnxruntime computes something else, or a weight that is to be in int8 would not be.

    Example:
        ``export_onnx(model, "model.onnx", length=128, counts=static_counts(model, validation_batches))``
    """
    _check_installed()
    longest = _longest(model)
    _check_shape(longest, length, batch, counts)
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime={runtime!r} is not one of {list(get_args(Runtime))}")
    encoder = packed_encoder(model)
    if counts is None and encoder is not None and encoder.policy is not None:
        raise ValueError(
            "the model drops tokens by thresholds, but the shapes of an exported model are fixed: pass "
            "counts=static_counts(model, batches) with batches of typical texts, or the length once for each layer to "
            "drop nothing; on the command line --texts FILE with typical texts, one a line, or --counts"
        )
    static = make_static(model, counts, exit_layer=exit_layer)
    target = _target(Path(path))
    rounded = _round(static) if int8 else []
    to_float_form(static)
    program = OnnxProgram(static.float().cpu()).eval()
    weights = {path: static.get_parameter(f"{path}.weight") for path in rounded}
    sizes = _Sizes(length, batch, longest)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / "model.onnx"
        _write(program, sizes, written, runtime if int8 else None, weights)
        os.replace(written, target)
    return Path(path)


def _target(path: Path) -> Path:
    """Return where to write, in a folder that is there, before minutes are spent."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write, such as {path / 'model.onnx'}")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} would be below a file: name another folder ({error})") from error
    return path.resolve()


class _Sizes:
    """How many texts and tokens, and which of the two may differ."""

    def __init__(self, length: int | str, batch: int | str, longest: int) -> None:
        self.example = (batch if isinstance(batch, int) else 3, length if isinstance(length, int) else 7)
        self.dynamic: dict[int, Any] = {}
        if batch == "dynamic":
            self.dynamic[0] = torch.export.Dim("batch")
        if length == "dynamic":
            self.dynamic[1] = torch.export.Dim("length", min=2, max=longest)


def _check_installed() -> None:
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"exporting to ONNX needs {', '.join(missing)}: install it with "
            "`pip install lightning-compress[onnx]`",
            name=missing[0],
        )


def _longest(model: nn.Module) -> int:
    config: Any = find_transformer(model)[1].config
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0  # its positions begin there
    return config.max_position_embeddings - offset


def _check_shape(longest: int, length: int | str, batch: int | str, counts: Sequence[int] | None) -> None:
    if length == "dynamic" and counts is not None:
        raise ValueError(f"counts={list(counts)} need a fixed length: pass length=128, say")
    if length != "dynamic" and not (isinstance(length, int) and 2 <= length <= longest):
        raise ValueError(f"length={length} is outside [2, {longest}], what the model has positions for")
    if batch != "dynamic" and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch={batch!r} must be a number of at least 1, or 'dynamic'")


def _round(static: nn.Module) -> list[str]:
    """Round embeddings and layers, and return what has a factor for a row: heads, exits and policies stay in fp32."""
    transformer = find_transformer(static)[1]
    anatomy = describe(transformer)
    encoder: Any = get_module(transformer, anatomy.encoder or "")
    for part in (get_module(transformer, anatomy.embeddings), encoder.layer):
        round_by_rows(part)
    held = {path: module for path, module in static.named_modules() if isinstance(module, PackedMatrix)}
    return [path for path, module in held.items() if module.weight_factors.shape[1] == 1]


def _write(
    program: OnnxProgram, sizes: _Sizes, path: Path, int8_for: Runtime | None, rounded: Mapping[str, Tensor]
) -> None:
    """Write the program, once the file gives the same outputs as the program."""
    import onnx  # pyright: ignore[reportMissingImports]

    inputs = program.example(*sizes.example)
    graph_model = to_onnx(program, inputs, sizes.dynamic)
    forget_sources(graph_model)
    if int8_for == "openvino":
        to_int8(graph_model, "weights")
        _check_held(graph_model, rounded)
    onnx.save(graph_model, path)
    _check_outputs(program, inputs, path, as_written=int8_for == "openvino")
    if int8_for == "onnxruntime":
        to_int8(graph_model, "dynamic")  # rounds inputs: outputs are others than those just checked
        _check_held(graph_model, rounded)
        onnx.save(graph_model, path)


def _check_held(graph_model: Any, rounded: Mapping[str, Tensor]) -> None:
    """Refuse a graph that reads a rounded weight in fp32."""
    for matrix in left_in_fp32(graph_model):
        for path, weight in rounded.items():
            if any(np.array_equal(matrix, form.detach().numpy()) for form in (weight, weight.T)):
                raise RuntimeError(
                    f"the integers of {path} are not found again in what torch {torch.__version__} exports, so nothing "
                    "was written: export without int8, or try another release"
                )


def _check_outputs(program: OnnxProgram, inputs: tuple[Tensor, ...], path: Path, *, as_written: bool) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    if as_written:  # otherwise it rounds the inputs of int8 weights, in blocks of 32
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(program.names, inputs, strict=True)}
    (found,) = session.run(None, feed)
    with torch.no_grad():
        expected = program(*inputs)
    apart = (torch.from_numpy(found) - expected).abs()
    if program.output != "logits":
        apart = apart[inputs[1].bool()]
    if not bool((apart <= _TOLERANCE * expected.abs().amax().clamp_min(1.0)).all()):
        raise RuntimeError(
            f"onnxruntime {onnxruntime.__version__} differs from the model by {float(apart.max()):.2g}, so nothing was "
            f"written; torch {torch.__version__} may not export this model: try another release of either"
        )

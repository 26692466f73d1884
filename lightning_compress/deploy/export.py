"""Export: an encoder as one ONNX file, checked in onnxruntime; token dropping with fixed shapes.

It needs the extra ``onnx``. What is exported is the static variant of :mod:`lightning_compress.runtime.static`.

Shape legend: B sequences, T padded length.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe, find_transformer
from lightning_compress.runtime.packing import packed_encoder
from lightning_compress.runtime.static import make_static

__all__ = ["EXTRA", "export_onnx"]

EXTRA = ("onnx", "onnxruntime", "onnxscript")
"""What the extra ``onnx`` installs."""
_TOLERANCE = 1e-4


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    length: int | Literal["dynamic"],
    counts: Sequence[int] | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    int8: bool = False,
) -> Path:
    """Write an encoder as ONNX, for texts padded to ``length`` on the right.

    The inputs are ``input_ids``, ``attention_mask`` and, where the model tells segments apart, ``token_type_ids``,
    int64 ``[B, T]``; the output is ``logits``, or ``last_hidden_state`` of a base model. Before anything is written,
    onnxruntime and the model have to give the same outputs in fp32; those of the int8 file differ, and are to be
    measured on a data set. Exits are left out: every text runs all layers.

    Args:
        model: A token-dropping model, a packed or a dense encoder, or a module that holds one. It stays as it is.
        path: The file to write, which is replaced as a whole.
        length: Tokens per text, padding included; ``"dynamic"`` for any number where no tokens are dropped.
        counts: Tokens that enter each layer of a token-dropping model, see
            :func:`~lightning_compress.runtime.static.static_counts`.
        batch: Texts per call, or ``"dynamic"`` for any number.
        int8: Whether to quantise weights to int8, with activations quantised as they come.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If the extra is not installed.
        ValueError: If the length does not fit the model, is below 2, or dynamic with counts, the batch is below 1, the
            model drops tokens and there are no counts, or for the reasons of
            :func:`~lightning_compress.runtime.static.make_static`.
        RuntimeError: If onnxruntime computes something else.

    Example:
        ``export_onnx(model, "model.onnx", length=128, counts=static_counts(model, validation_batches))``
    """
    _check_installed()
    longest = _longest(model)
    _check_shape(longest, length, batch, counts)
    encoder = packed_encoder(model)
    if counts is None and encoder is not None and encoder.policy is not None:
        raise ValueError(
            "the model drops tokens by thresholds, but the shapes of an exported model are fixed: pass "
            "counts=static_counts(model, batches) with batches of typical texts, or the length once for each layer to "
            "drop nothing; on the command line --texts FILE with typical texts, one a line, or --counts"
        )
    program = _Outputs(make_static(model, counts).float().cpu()).eval()
    sizes = _Sizes(length, batch, longest)
    inputs = program.example(*sizes.example)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / "model.onnx"
        _write(program, inputs, written, sizes.dynamic)
        _check_outputs(program, inputs, written)
        if int8:
            written = _quantize(written, Path(folder) / "int8.onnx")
        os.replace(written, target)
    return Path(path)


class _Sizes:
    """How many texts and tokens, and which of the two may differ."""

    def __init__(self, length: int | str, batch: int | str, longest: int) -> None:
        self.example = (batch if isinstance(batch, int) else 3, length if isinstance(length, int) else 7)
        self.dynamic: dict[int, Any] = {}
        if batch == "dynamic":
            self.dynamic[0] = torch.export.Dim("batch")
        if length == "dynamic":
            self.dynamic[1] = torch.export.Dim("length", min=2, max=longest)


class _Outputs(nn.Module):
    """A model as a function of tensors to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = find_transformer(model)[1]
        taken = inspect.signature(self.model.forward).parameters
        has_segments = "token_type_ids" in taken and getattr(self.model.config, "type_vocab_size", 0) > 1
        self.names = ("input_ids", "attention_mask", *(("token_type_ids",) if has_segments else ()))
        self.output = "last_hidden_state" if describe(self.model).head is None else "logits"

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)))[0]

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Return random texts, of which the first is of full length."""
        generator = torch.Generator().manual_seed(0)
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        ids_BT = torch.randint(0, self.model.config.vocab_size, (batch, length), generator=generator)
        lengths_B = torch.randint(2, length + 1, (batch,), generator=generator)
        lengths_B[0] = length
        mask_BT = (torch.arange(length) < lengths_B[:, None]).long()
        ids_BT = ids_BT.masked_fill(mask_BT == 0, padding)
        return (ids_BT, mask_BT, torch.zeros_like(ids_BT))[: len(self.names)]


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


def _write(program: _Outputs, inputs: tuple[Tensor, ...], path: Path, dynamic: dict[int, Any]) -> None:
    sizes = ((dynamic,) * len(inputs),) if dynamic else None
    # not by TorchScript, which is deprecated, and warns that it takes branches over the mask for constants
    with torch.no_grad(), _quiet("torch.onnx"):
        exported = torch.export.export(program, inputs, dynamic_shapes=sizes)
        onnx_program = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=list(program.names),
            output_names=[program.output],
            verbose=False,
        )
    assert onnx_program is not None
    onnx_program.save(path)


def _check_outputs(program: _Outputs, inputs: tuple[Tensor, ...], path: Path) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
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


def _quantize(path: Path, target: Path) -> Path:
    import onnx  # pyright: ignore[reportMissingImports]
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]

    graph = onnx.load(path)
    del graph.graph.value_info[:]  # the exporter's names of shapes, which the quantiser trips over
    with _quiet():
        quantize_dynamic(graph, target, weight_type=QuantType.QInt8)
    return target


@contextmanager
def _quiet(name: str | None = None) -> Iterator[None]:
    """Keep advice that is about the exporter's own affairs from the user."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)
            yield
    finally:
        logger.setLevel(before)

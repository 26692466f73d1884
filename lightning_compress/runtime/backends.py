"""Which engine computes which quantised linear of a model: one that is named, or the fastest.

Speed depends on the machine, the shape and the number of rows: it is measured when a model is loaded, and told; it
never becomes part of what is saved. :mod:`lightning_compress.runtime.linear_backends` says what can be chosen from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import UnknownFamilyError, describe, find_transformer
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.runtime.engine_timing import BackendReport, Timing, fastest, time_engines
from lightning_compress.runtime.fast_linear import Engine
from lightning_compress.runtime.joined_engine import JoinedEngine, PartEngine
from lightning_compress.runtime.linear_backends import BACKENDS, build_engine, refusal
from lightning_compress.runtime.packing import packed_encoder

__all__ = ["check_backend", "use_backend"]

_MEASURED = ("int8", "triton", "bf16", "fp32")
_SAMPLE = 4
"""Layers of each shape that are measured."""

Group = tuple[str, ...]
"""Paths of layers that run as one."""


def use_backend(
    model: nn.Module,
    backend: str | Mapping[str, str] | BackendReport = "auto",
    *,
    batch_tokens: Sequence[int] = (16, 128, 1024),
    one_factor: bool | None = None,
    bf16_states: bool | None = None,
    verbose: bool = True,
) -> BackendReport:
    """Let the quantised linears of a model be computed fast, where gradients are off; in place.

    With ``"auto"`` each shape is timed with the model's own weights, in ``"int8"``, ``"triton"``, ``"bf16"`` and
    ``"fp32"``, as far as they can compute it, and gets the fastest. The first two multiply the same integers as the
    reference does, ``"triton"`` in any blocks and on CUDA only. The others leave inputs as they are, which costs no
    accuracy: weights are those of the artefact in every backend but ``"bnb8"`` and ``"nf4"``, which round them again.

    Nothing of it is saved or copied: copies, moves, casts and loads go back to the reference, and this is called again.

    Args:
        model: A model with quantised linears, as ``quantize`` or ``load`` return it; for encoders, ``pack`` it first.
        backend: ``"auto"``, one of ``"int8"``, ``"triton"``, ``"bf16"``, ``"fp32"``, ``"bnb8"``, ``"nf4"``, or
            ``"reference"``; for each layer by its path such a name; or an earlier report, all of whose choices are
            taken again.
        batch_tokens: Numbers of rows (tokens in flight) to measure at; they count the same.
        one_factor: Let ``"int8"`` round all rows of a call by one factor: on processors by PyTorch's own dynamic
            quantisation. Faster; but then texts of a batch change each other's rounding, outliers of one row cost all
            of them precision, integers are not those of the reference, and NaN may be taken for an ordinary number.
            None does as an earlier report says that is given, and otherwise does not.
        bf16_states: Whether a packed encoder hands bfloat16 from operator to operator. None does as an earlier report
            says that is given, and otherwise where the processor has AMX and the backend is ``"auto"``.
        verbose: Print what was chosen.

    Returns:
        What was chosen, and the times.

    Raises:
        ValueError: If there is no quantised linear, a name is unknown, a backend cannot compute a layer, numbers of
            rows are none, or states cannot be bfloat16; the model then is as it was.

    Example:
        >>> from lightning_compress.nn.block_format import BlockFormat
        >>> layer = QuantizedLinear.from_linear(nn.Linear(8, 8), BlockFormat())
        >>> use_backend(nn.Sequential(layer), "fp32").choices
        backends of 1 quantised linears: fp32 for 1
        {'0': 'fp32'}
    """
    check_backend(backend)
    if isinstance(backend, BackendReport):
        bf16_states = backend.states is not None if bf16_states is None else bf16_states
        one_factor = backend.one_factor if one_factor is None else one_factor
        backend = backend.choices
    one_factor = bool(one_factor)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no quantised linear: call lightning_compress.quantize(model, ...) first"
        )
    rows = _checked_rows(batch_tokens)
    choices = {} if backend == "auto" else _named(backend, layers, one_factor)
    groups = _groups(model, layers)
    states = _states(model, layers, backend, bf16_states)
    # all that can be refused was refused: from here on the reference computes, until the new engines are there
    encoder = packed_encoder(model)
    if encoder is not None:
        encoder.states = None
    for layer in layers.values():
        layer.engine = None
    timings: list[Timing] = []
    if backend == "auto":
        like = torch.empty(0, dtype=states or _dtype(model), device=_device(layers))
        choices = _measure(layers, groups, rows, one_factor, like, timings)
    for path, engine in _engines(layers, groups, choices, one_factor).items():
        layers[path].engine = engine
    if encoder is not None:
        encoder.states = states
    report = BackendReport(choices, states, timings, one_factor)
    if verbose:
        print(report)
    return report


def check_backend(backend: str | Mapping[str, str] | BackendReport) -> None:
    """Refuse names that are none, before a model is there.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> check_backend("auto")
    """
    choices = backend.choices if isinstance(backend, BackendReport) else backend
    names = [choices] if isinstance(choices, str) else sorted(set(choices.values()))
    known = [*BACKENDS, "reference", *(["auto"] if isinstance(choices, str) else [])]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ValueError(f"backend={unknown!r} is not one of {known}")


def _checked_rows(batch_tokens: Sequence[int]) -> tuple[int, ...]:
    rows = tuple(batch_tokens) if isinstance(batch_tokens, Sequence) else ()
    if not rows or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in rows):
        raise ValueError(
            f"batch_tokens={batch_tokens!r} are no numbers of rows: give at least one, whole numbers from 1, such as "
            "(16, 128)"
        )
    return rows


def _named(
    backend: str | Mapping[str, str], layers: Mapping[str, QuantizedLinear], one_factor: bool
) -> dict[str, str]:
    """Return the backend of each layer; first those are refused that cannot be."""
    if not isinstance(backend, str) and set(backend) != set(layers):
        odd = sorted(set(backend) ^ set(layers))
        raise ValueError(f"backends are named for other layers than there are; only on one side: {odd[:5]}")
    choices = dict.fromkeys(layers, backend) if isinstance(backend, str) else dict(backend)
    for path, name in choices.items():
        reason = None if name == "reference" else refusal(name, layers[path], one_factor=one_factor)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot compute {path!r}: {reason}")
    return choices


def _groups(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> list[Group]:
    """Return the layers, those of query, key and value that can run as one together."""
    joined = [group for group in _projections(model) if all(path in layers for path in group)]
    joined = [group for group in joined if refusal("fp32", [layers[path] for path in group]) is None]
    taken = {path for group in joined for path in group}
    return joined + [(path,) for path in layers if path not in taken]


def _projections(model: nn.Module) -> list[Group]:
    if packed_encoder(model) is None:
        return []  # only there they run as one
    try:
        prefix, transformer = find_transformer(model)
        anatomy = describe(transformer)
    except (ValueError, UnknownFamilyError):
        return []  # whatever this is, its layers run one by one
    dot = f"{prefix}." if prefix else ""
    found = []
    for layer in anatomy.layers:
        at = {slot.role: dot + slot.path for slot in layer.linears}
        if {"query", "key", "value"} <= set(at):
            found.append((at["query"], at["key"], at["value"]))
    return found


def _measure(
    layers: Mapping[str, QuantizedLinear],
    groups: Sequence[Group],
    rows: tuple[int, ...],
    one_factor: bool,
    like: Tensor,
    timings: list[Timing],
) -> dict[str, str]:
    """Return a backend for each layer: the fastest for some layers of its shape and formats."""
    shapes: dict[object, list[Group]] = {}
    for group in groups:
        parts = [layers[path] for path in group]
        sizes = parts[0].in_features, sum(part.out_features for part in parts)
        key = (*sizes, parts[0].input_format, *[part.weight_format for part in parts])
        shapes.setdefault(key, []).append(group)
    choices: dict[str, str] = {}
    for alike in shapes.values():
        sample = [[layers[path] for path in group] for group in alike[:_SAMPLE]]
        able = [name for name in _MEASURED if refusal(name, sample[0], one_factor=one_factor) is None]
        engines = {
            name: [build_engine(name, parts, one_factor=one_factor) for parts in sample] for name in able
        }
        num_inputs, num_outputs = sample[0][0].in_features, sum(part.out_features for part in sample[0])
        seconds = time_engines(engines, num_inputs, rows, like)
        timings.append(Timing(num_inputs, num_outputs, rows, seconds, fastest(seconds)))
        choices |= {path: timings[-1].chosen for group in alike for path in group}
    return {path: choices[path] for path in layers}


def _engines(
    layers: Mapping[str, QuantizedLinear],
    groups: Sequence[Group],
    choices: Mapping[str, str],
    one_factor: bool,
) -> dict[str, Engine]:
    """Build an engine for each layer that the reference is not to compute."""
    engines: dict[str, Engine] = {}
    for group in groups:
        parts = [layers[path] for path in group]
        names = {choices[path] for path in group}
        build = {
            path: partial(build_engine, choices[path], layers[path], one_factor=one_factor)
            for path in group
            if choices[path] != "reference"
        }
        if len(names) > 1 or len(build) < 2:
            engines |= {path: build_one() for path, build_one in build.items()}
            continue
        whole = build_engine(names.pop(), parts, one_factor=one_factor)
        joined = JoinedEngine(whole, [part.out_features for part in parts])
        engines |= {path: PartEngine(joined, place, build[path]) for place, path in enumerate(group)}
    return engines


def _states(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], backend: object, wanted: bool | None
) -> torch.dtype | None:
    """Return the dtype that states of a packed encoder get, if another one than the model's."""
    encoder = packed_encoder(model)
    if wanted is False or backend == "reference" or encoder is None:
        if wanted:
            raise ValueError("bf16_states=True: states belong to packed encoders; call pack(model) first")
        return None
    if wanted is None and (backend != "auto" or _device(layers).type != "cpu" or not _has_amx()):
        return None
    dense = [name for name, part in encoder.layer.named_modules() if type(part) is nn.Linear]
    if not dense:
        return torch.bfloat16
    if wanted:
        raise ValueError(
            f"bf16_states=True: linears that are not quantised compute in the dtype of the model, such as {dense[0]!r}"
        )
    return None


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _device(layers: Mapping[str, QuantizedLinear]) -> torch.device:
    return next(iter(layers.values())).weight_payload.device


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's states: that of most of its numbers."""
    floats = [p for p in model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return max(floats, key=lambda p: p.numel()).dtype if floats else torch.float32

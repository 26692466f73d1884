"""BlockQuantization: linears, embeddings and, if asked, everything between them in blocks of few bits.

The plot in the order of time: the config, :func:`prepare`, :func:`update` (nothing, or rounding that grows to its full
strength), :func:`convert`, :func:`restore`. What training sees is in :mod:`lightning_compress.nn.block_quantization`,
what is left in :mod:`lightning_compress.nn.quantization_plan`.

Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), whose bodies were not readable: BCT-style, our own design.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch import nn

from lightning_compress.methods.base import HandleDefaults, MethodConfig, MethodHandle, check, check_kinds
from lightning_compress.nn.adapters import fold_adapter
from lightning_compress.nn.block_format import Factor
from lightning_compress.nn.block_quantization import QuantizationGates
from lightning_compress.nn.operator_formats import OPERATORS, OperatorFormats, Preset, preset
from lightning_compress.nn.quantization_plan import quantize_model, restore_quantized
from lightning_compress.nn.quantized_places import check_finite, find_places
from lightning_compress.nn.rounded_places import left_out
from lightning_compress.nn.surgery import Ledger, get_module, unwrap_adapter
from lightning_compress.plan import PlanError

__all__ = [
    "BlockQuantizationConfig",
    "BlockQuantizationHandle",
    "Config",
    "convert",
    "prepare",
    "restore",
    "update",
]


@dataclass(frozen=True, kw_only=True)
class BlockQuantizationConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields."""

    stem: ClassVar[str] = "block_quantization"

    preset: Preset = "w8a8"
    """Bits of weights and activations: ``"w8a8"``, ``"w4a8"``, ``"w4a4"``, or ``"w8"``, weights alone."""
    block: Literal["row"] | tuple[int, int] = "row"
    """Rows and columns that share a factor; ``"row"`` is a factor per row, 0 stands for all rows or columns."""
    factor: Factor = "scale"
    """What a block is multiplied with: ``"scale"``, any real number, or ``"shift"``, a power of two."""
    operators: tuple[str, ...] = ("linear", "embedding")
    """What is quantised, of ``"linear"``, ``"embedding"``, ``"attention"``, ``"softmax"``, ``"activation"``,
    ``"norm"``; or ``"all"``."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over module paths: what stays as it is."""
    bits: tuple[str, ...] = ()
    """Bits that differ from the preset's, as ``"weight=4"``, of weight, input, embedding, attention; or a mapping."""
    start: float = 1.0
    """Share of training after which it sees the rounding, in [0, 1]; 1 rounds when training has ended."""
    ramp_end: float | None = None
    """Share of training after which it sees all of it, in [start, 1]; by default half of what is left after start."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", _sides(self.block))
        check_kinds(self)
        object.__setattr__(self, "exclude", _words("exclude", self.exclude))
        object.__setattr__(self, "bits", _assignments(self.bits))
        object.__setattr__(self, "operators", _named(self.operators, self.preset))
        check(0.0 <= self.start <= 1.0, f"start={self.start} is outside [0, 1]")
        check(
            self.ramp_end is None or self.start <= self.ramp_end <= 1.0,
            f"ramp_end={self.ramp_end} is outside [start={self.start}, 1]",
        )
        _ = self.formats  # refuses what does not go together

    @property
    def formats(self) -> OperatorFormats:
        """The format of each operator."""
        bits = {name: int(number) for name, number in (word.split("=") for word in self.bits)}
        return preset(self.preset, self.block, self.factor, cast(Any, self.operators), bits)

    @property
    def full_at(self) -> float:
        """Share of training after which all of the rounding is seen."""
        return (1.0 + self.start) / 2 if self.ramp_end is None else self.ramp_end


Config = BlockQuantizationConfig


@dataclass
class BlockQuantizationHandle(HandleDefaults):
    """A model that is to be quantised, and sees how it will be."""

    model: nn.Module
    config: BlockQuantizationConfig
    ledger: Ledger
    gates: QuantizationGates
    phase: Literal["float", "ramp", "rounded"] = "float"

    @property
    def is_on_target(self) -> bool:
        """Whether training saw all of the rounding, or was to see nothing of it."""
        return self.phase == "rounded" or self.config.start == 1.0

    @property
    def is_as_deployed(self) -> bool:
        """Whether all of the rounding is seen."""
        return self.gates.ramp.is_full

    def meet(self, handles: Mapping[str, MethodHandle]) -> None:
        """Get to know what width gates will leave of the matrices that are rounded."""
        widths: Any = handles.get("width_slimming")
        self.gates.follow(self.model, None if widths is None else widths.gates)

    def metrics(self) -> dict[str, float]:
        """How much of the rounding training sees, in [0, 1]."""
        return {"strength": self.gates.ramp.value}

    def state_dict(self) -> dict[str, Any]:
        """Phase and strength; the model has no more state than before."""
        return {"phase": self.phase, "strength": self.gates.ramp.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase."""
        self.phase = state["phase"]
        self.gates.ramp.set(state["strength"])


def prepare(model: nn.Module, config: BlockQuantizationConfig) -> BlockQuantizationHandle:
    """Put gates where something will be rounded, all of them open: outputs stay the same.

    Raises:
        ValueError: If the model cannot be quantised so, or there is nothing to quantise.
    """
    ledger = Ledger(model)
    gates = QuantizationGates.install(ledger, config.formats, config.exclude, is_trained=config.start < 1.0)
    return BlockQuantizationHandle(model, config, ledger, gates)


def update(handle: BlockQuantizationHandle, progress: float) -> None:
    """Let training see nothing of the rounding up to ``start``, more and more up to ``ramp_end``, then all of it."""
    config, share = handle.config, 0.0
    if progress >= config.start and config.start < 1.0:
        length = config.full_at - config.start
        share = 1.0 if progress >= config.full_at else (progress - config.start) / length
    handle.phase = "rounded" if share == 1.0 else "ramp" if progress >= config.start else "float"
    handle.gates.ramp.set(share)


def convert(handle: BlockQuantizationHandle) -> dict[str, Any]:
    """Put the quantised modules in place; active LoRA adapters are folded into the weights before.

    Returns:
        What is quantised where, see :func:`~lightning_compress.nn.quantization_plan.quantize_model`, and under
        ``"merged"`` the paths of linears that lost an adapter, if there are any.

    Raises:
        ValueError: If weights are not finite: training has diverged. Only the gates are gone then.
    """
    model, ledger, formats = handle.model, handle.ledger, handle.config.formats
    ledger.revert()
    exclude = left_out(model, formats, handle.gates.places)
    places = find_places(model, formats, exclude)
    check_finite(model, places)
    merged = [path for path in places["linears"] if fold_adapter(ledger, path)]
    structure = quantize_model(model, formats, exclude, ledger)
    return {**structure, "merged": merged} if merged else structure


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild the quantised modules on a fresh, possibly meta-device model; adapters around them go.

    Raises:
        PlanError: If the structure does not fit the model.
    """
    merged = structure.get("merged", [])
    if not isinstance(merged, list) or not set(map(str, merged)) <= set(structure.get("linears", ())):
        raise PlanError(f"plan has merged={merged!r}, which are not linears that it lists")
    ledger = restore_quantized(model, {name: part for name, part in structure.items() if name != "merged"})
    for path in merged:
        inner = unwrap_adapter(model, path)
        if inner != path:
            ledger.replace(path, get_module(model, inner))
    return ledger


def _sides(block: Any) -> Any:
    is_pair = isinstance(block, Sequence) and len(block) == 2 and all(type(side) is int for side in block)
    check(
        block == "row" or is_pair, f"block={block!r} is neither 'row' nor rows and columns, such as (32, 32)"
    )
    return block if block == "row" else tuple(block)


def _words(name: str, value: Any) -> tuple[str, ...]:
    is_listed = isinstance(value, Collection)
    check(is_listed, f"{name}={value!r} is no list of words: give one, empty or with what is meant")
    return (value,) if isinstance(value, str) else tuple(value)


def _named(operators: Any, name: str) -> tuple[str, ...]:
    """Return operators in the order in which they are always named; ``"all"`` is written out."""
    words = _words("operators", operators)
    if words == ("all",):
        return preset(cast(Preset, name), operators="all").operators
    unknown = sorted(set(words) - set(OPERATORS))
    check(
        bool(words) and not unknown,
        f"operators={list(words)}: give one or more of {list(OPERATORS)}, or 'all'",
    )
    return tuple(operator for operator in OPERATORS if operator in words)


def _assignments(bits: Mapping[str, int] | Sequence[str] | str) -> tuple[str, ...]:
    """Return a mapping, or words like ``"weight=4"``, as words in alphabetical order."""
    is_mapping = isinstance(bits, Mapping)
    pairs = list(bits.items()) if is_mapping else [_assignment(word) for word in _words("bits", bits)]
    chosen = dict(pairs)
    check(len(chosen) == len(pairs), f"bits={bits!r} names something twice")
    for name, number in pairs:
        check(type(number) is int, f"bits of {name!r} are {number!r}: give a whole number from 2 to 8")
    return tuple(f"{name}={chosen[name]}" for name in sorted(chosen))


def _assignment(word: Any) -> tuple[str, int]:
    name, mark, number = str(word).partition("=")
    check(bool(mark) and number.isdecimal(), f"bits={word!r} is no name and number, such as 'weight=4'")
    return name, int(number)

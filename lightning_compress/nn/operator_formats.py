"""Which operators of a transformer are quantised, and in which format each.

The next chapter is :mod:`lightning_compress.nn.quantization_plan`, which puts modules with these formats into a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from lightning_compress.nn.block_format import BlockFormat, Factor

__all__ = ["OPERATORS", "Operator", "OperatorFormats", "OperatorUse", "Preset", "preset", "uses_of"]

Operator = Literal["linear", "embedding", "attention", "softmax", "activation", "norm"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
"""Everything that can be quantised, by the names that settings give it."""

Preset = Literal["w8a8", "w4a8", "w4a4", "w8"]

_BITS: dict[str, dict[str, int]] = {
    "w8a8": {"weight": 8, "input": 8, "embedding": 8, "attention": 8},
    "w4a8": {"weight": 4, "input": 8, "embedding": 4, "attention": 8},
    "w4a4": {"weight": 4, "input": 4, "embedding": 4, "attention": 4},
    "w8": {"weight": 8, "embedding": 8},
}
_OPERATOR_OF: dict[str, Operator] = {
    "weight": "linear",
    "input": "linear",
    "embedding": "embedding",
    "attention": "attention",
}
_USES = {
    "weight": ("linears", "linear weights"),
    "input": ("linears", "inputs of linears"),
    "embedding": ("embeddings", "tables"),
    "attention": ("attention", "query, key and value"),
    "softmax": ("attention", "softmax"),
    "activation": ("activations", "activations"),
    "norm": ("norms", "norms"),
}
"""Of each field: under which name a structure lists its places, and what it is called."""
_SWITCHES: tuple[Operator, ...] = ("softmax", "activation", "norm")


@dataclass(frozen=True)
class OperatorFormats:
    """The format of each operator; None and False leave it in floating point.

    Raises:
        ValueError: If inputs have a format and weights have none.
    """

    weight: BlockFormat | None = None
    """Weights of the layers' linears."""
    input: BlockFormat | None = None
    """Inputs of the same linears; None multiplies them as they are with weights that are written out."""
    embedding: BlockFormat | None = None
    """Tables of tokens, positions and segments."""
    attention: BlockFormat | None = None
    """Query, key and value as operands of attention's two products, a matrix ``[tokens, head width]`` for each head."""
    softmax: bool = False
    """Whether attention's softmax is computed in integers."""
    activation: bool = False
    """Whether GELU, SiLU or ReLU between the linears of the FFN is."""
    norm: bool = False
    """Whether LayerNorm or RMSNorm is."""

    def __post_init__(self) -> None:
        if self.input is not None and self.weight is None:
            raise ValueError(f"inputs have the format {self.input} but weights none: give weights one too")

    @property
    def operators(self) -> tuple[Operator, ...]:
        """Names of the operators that are quantised."""
        chosen = {operator for name, operator in _OPERATOR_OF.items() if getattr(self, name) is not None}
        return tuple(name for name in OPERATORS if name in chosen or getattr(self, name, False) is True)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            name: value.to_dict() if isinstance(value := getattr(self, name), BlockFormat) else value
            for name in asdict(self)
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatorFormats:
        """Rebuild the formats from plain values.

        Raises:
            TypeError: If a value is of another type than it should be.
            ValueError: If a field is unknown to this release, or a value is out of its range.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"OperatorFormats has no fields {unknown}")
        return cls(**{name: _read(name, value) for name, value in data.items()})


class OperatorUse(NamedTuple):
    """One kind of operator that is quantised in a model."""

    name: str
    """In words, such as ``"inputs of linears"``."""
    places: int
    """How many there are of it."""
    form: BlockFormat | None
    """In which blocks its operands are held; None where it is computed in integers and holds none."""


def uses_of(structure: Mapping[str, Any]) -> tuple[OperatorUse, ...]:
    """Return what is quantised in a model, in the order in which it is always named.

    Args:
        structure: As :func:`~lightning_compress.nn.quantization_plan.quantize_model` returns it.

    Example:
        >>> formats = OperatorFormats(weight=BlockFormat(4), norm=True).to_dict()
        >>> places = {"linears": ["a", "b"], "embeddings": [], "attention": [], "activations": {}, "norms": ["c"]}
        >>> [(use.name, use.places) for use in uses_of({"formats": formats, **places})]
        [('linear weights', 2), ('norms', 1)]
    """
    formats = OperatorFormats.from_dict(structure["formats"])
    places = {name: len(structure[kind]) for name, (kind, _) in _USES.items()}
    return tuple(
        OperatorUse(words, places[name], held if isinstance(held, BlockFormat) else None)
        for name, (_, words) in _USES.items()
        if (held := getattr(formats, name))
    )


def preset(
    name: Preset,
    block: Literal["row"] | Sequence[int] = "row",
    factor: Factor = "scale",
    operators: Sequence[Operator] | Literal["all"] = ("linear", "embedding"),
    bits: Mapping[str, int] | None = None,
) -> OperatorFormats:
    """Return the formats that a few words stand for.

    ========  ==================  ===============  =====================
    preset    weights and tables  inputs           attention's operands
    ========  ==================  ===============  =====================
    ``w8a8``  8 bits              8 bits           8 bits
    ``w4a8``  4 bits              8 bits           8 bits
    ``w4a4``  4 bits              4 bits           4 bits
    ``w8``    8 bits              floating point   floating point
    ========  ==================  ===============  =====================

    Args:
        name: The preset.
        block: Rows and columns of the blocks of weights and tables; ``"row"`` is ``(1, 0)``, a factor for each row.
            Inputs and attention's operands get blocks as wide, of one row each: what is computed of a token depends
            on no other token. Only ``(0, 0)``, one factor for the whole (layer-wise quantisation), spans tokens.
        factor: ``"scale"`` (real numbers) or ``"shift"`` (powers of two).
        operators: What to quantise; ``"all"`` is everything that the preset speaks of.
        bits: Other bits for ``weight``, ``input``, ``embedding`` or ``attention``.

    Raises:
        ValueError: If a word is unknown, ``w8`` is to quantise what is not a weight, or there are bits for what is not
            quantised.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483) name the operators; bits and blocks could not be read and
    are our own.

    Example:
        >>> formats = preset("w4a8", block=(128, 128))
        >>> formats.weight, formats.input
        (BlockFormat(bits=4, block=(128, 128), factor='scale'), BlockFormat(bits=8, block=(1, 128), factor='scale'))
        >>> formats.operators
        ('linear', 'embedding')
    """
    if name not in _BITS:
        raise ValueError(f"preset={name!r} is not one of {list(_BITS)}")
    chosen = _chosen(name, operators)
    widths = {**_BITS[name], **_overrides(name, bits or {}, chosen)}
    rows, columns = (1, 0) if block == "row" else _pair(block)
    static = BlockFormat(8, (rows, columns), factor)
    moving = BlockFormat(8, (0, 0) if (rows, columns) == (0, 0) else (1, columns), factor)
    held = {
        field: replace(static if field in ("weight", "embedding") else moving, bits=width)
        for field, width in widths.items()
        if _OPERATOR_OF[field] in chosen
    }
    return OperatorFormats(**held, **{switch: True for switch in _SWITCHES if switch in chosen})  # type: ignore[arg-type]


def _chosen(name: str, operators: Sequence[str] | str) -> set[str]:
    known = OPERATORS if "input" in _BITS[name] else ("linear", "embedding")
    if operators == "all":
        return set(known)
    words = (operators,) if isinstance(operators, str) else tuple(operators)
    unknown = sorted(set(words) - set(known))
    if unknown or not words:
        raise ValueError(
            f"operators={list(words)}: give one or more of {list(known)}, which are those of preset {name!r}, or 'all'"
        )
    return set(words)


def _overrides(name: str, bits: Mapping[str, int], chosen: set[str]) -> Mapping[str, int]:
    unknown = sorted(set(bits) - set(_BITS[name]))
    if unknown:
        raise ValueError(f"bits for {unknown}: preset {name!r} has bits for {sorted(_BITS[name])}")
    idle = sorted(field for field in bits if _OPERATOR_OF[field] not in chosen)
    if idle:
        raise ValueError(
            f"bits for {idle}, but operators={sorted(chosen)} do not quantise it: name "
            f"{_OPERATOR_OF[idle[0]]!r} among the operators too, or leave these bits out"
        )
    return bits


def _pair(block: Any) -> tuple[int, int]:
    if isinstance(block, str) or len(block) != 2:
        raise ValueError(f"block={block!r} is neither 'row' nor rows and columns, such as (32, 32)")
    return tuple(block)


def _read(name: str, value: Any) -> Any:
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is neither true nor false")
        return value
    if value is None or isinstance(value, BlockFormat):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r} is no format: give bits, block and factor, or nothing")
    return BlockFormat.from_dict(dict(value))

"""What every method offers: four verbs over a model, and a handle that the compressor can drive.

A method is a module with the functions ``prepare``, ``update``, ``convert`` and ``restore`` and a ``Config``
dataclass. ``prepare`` returns a handle; this file states what the rest of the library may ask of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from numbers import Integral, Real
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from torch import nn

from lightning_compress.nn.surgery import Ledger

__all__ = [
    "AuxiliaryGroup",
    "Companion",
    "GradientReader",
    "HandleDefaults",
    "MethodConfig",
    "MethodHandle",
    "MethodModule",
    "check",
    "check_choice",
    "check_kinds",
    "config_from_dict",
    "leaves_no_trace",
]


class MethodConfig:
    """Base of the frozen configuration dataclasses; ``stem`` names the method everywhere.

    A configuration may have a ``target``, the share asked for; where no field was given a value, ``default_goal`` names
    the one that it stands for.
    """

    stem: ClassVar[str]
    default_goal: ClassVar[str] = "target_flops"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values (tuples become lists)."""
        values = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def config_from_dict(config_class: type[MethodConfig], data: dict[str, Any]) -> MethodConfig:
    """Rebuild a configuration from plain values.

    Raises:
        ValueError: If a field is unknown to this release, or a value is out of its range.
    """
    known = {field.name for field in fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{config_class.__name__} has no fields {unknown}; it knows {sorted(known)}")
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})


def check(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: If the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def check_choice(config: MethodConfig, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that a field does not know.

    Raises:
        ValueError: If the value of the field ``name`` is none of the choices.
    """
    value = getattr(config, name)
    check(value in choices, f"{name}={value!r} is not one of {list(choices)}")


def check_kinds(config: MethodConfig) -> None:
    """Refuse what is no number, or no whole one, where a field holds one, and a single one where it holds several.

    Raises:
        TypeError: If a value is of another kind than its field.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):  # type: ignore[arg-type]
        value, hint = getattr(config, field.name), hints[field.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if (value is None and type(None) in kinds) or value in words:
            continue
        given = f"{field.name}={value!r} is of type {type(value).__name__}"
        listed = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)
        if listed in (int, float):
            items = (
                list(value) if isinstance(value, Collection) else [None]
            )  # an iterator would be empty then
            if not all(_is_number(item, whole=listed is int) for item in items):
                numbers = "whole numbers" if listed is int else "numbers"
                raise TypeError(
                    f"{given}, but lists {numbers}: give a list of them, of one too, e.g. [{listed(1)}]"
                )
        elif float in kinds and not _is_number(value):
            raise TypeError(f"{given}, but stands for a number")
        elif int in kinds and float not in kinds and not _is_number(value, whole=True):
            raise TypeError(f"{given}, but stands for a whole number, e.g. 1")


def _is_number(value: Any, *, whole: bool = False) -> bool:
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


class AuxiliaryGroup(NamedTuple):
    """Parameters of the private optimizer with a learning rate of their own."""

    parameters: list[nn.Parameter]
    """At least one."""
    lr: float
    """Learning rate for the coming step; 0 means that they rest."""
    max_norm: float | None = None
    """Largest norm of the group's gradient; None does not clip."""


@runtime_checkable
class MethodHandle(Protocol):
    """One prepared method on one model.

    A handle may also have a ``task_weight``, a number with which the task's own loss is to be multiplied.
    """

    model: nn.Module
    config: Any
    ledger: Ledger

    @property
    def phase(self) -> str:
        """Name of the current phase, for logs and reports."""
        ...

    @property
    def is_on_target(self) -> bool:
        """Whether the model, converted now, would meet the user's target."""
        ...

    @property
    def is_as_deployed(self) -> bool:
        """Whether the model, evaluated now, answers as it would if training ended here and it were converted."""
        ...

    def open_resources(self) -> None:
        """Fetch what only training needs, such as a teacher, so that what is missing is found out before it starts."""
        ...

    def auxiliary_groups(self) -> list[AuxiliaryGroup]:
        """Parameters that the private optimizer owns (thresholds, predictors), always in the same order."""
        ...

    def end_pass(self) -> None:
        """Count what the forward passes so far gathered; until then it is not part of the state."""
        ...

    def pop_stale_moments(self) -> list[nn.Parameter]:
        """Parameters whose optimizer moments became meaningless since the last call."""
        ...

    def metrics(self) -> dict[str, float]:
        """Quantities worth logging, without the ``compress/<stem>/`` prefix."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State that neither parameters nor buffers hold, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        ...


class HandleDefaults:
    """Base of handles: of what the compressor may ask, that which many methods have nothing to do for.

    Example:
        >>> HandleDefaults().auxiliary_groups()
        []
    """

    def open_resources(self) -> None:
        """Nothing: no teacher is needed."""

    def auxiliary_groups(self) -> list[AuxiliaryGroup]:
        """None: what there is to learn is in the user's optimizer."""
        return []

    def end_pass(self) -> None:
        """Nothing: no pass leaves anything to count."""

    def pop_stale_moments(self) -> list[nn.Parameter]:
        """Nothing: no parameter changes its meaning."""
        return []


@runtime_checkable
class GradientReader(Protocol):
    """A handle that looks at gradients when they are complete."""

    def read_gradients(self) -> None:
        """Read the parameters' gradients, averaged over processes and not yet clipped, before the optimizer steps."""
        ...


@runtime_checkable
class Companion(Protocol):
    """A handle that looks at what other methods have prepared on the same model."""

    def meet(self, handles: Mapping[str, MethodHandle]) -> None:
        """Get to know the handles of all methods, by stem; called whenever all of them are there.

        Raises:
            ValueError: If one that is needed does not take part, or cannot help.
        """
        ...


class MethodModule(Protocol):
    """The module of a method, as the registry sees it.

    One whose ``LEAVES_NO_TRACE`` is true leaves nothing in a converted model: its plan has no record of it.
    """

    Config: type[MethodConfig]

    def prepare(self, model: nn.Module, config: Any, **resources: Any) -> MethodHandle:
        """Install trainable machinery; the model's outputs stay the same up to rounding.

        ``resources`` is what some methods take and no configuration can hold, such as a teacher's module.
        """
        ...

    def update(self, handle: Any, progress: float) -> None:
        """Move ramps and phases; ``progress`` in [0, 1]."""
        ...

    def convert(self, handle: Any) -> dict[str, Any]:
        """Bake the machinery into plain modules and return a JSON-able structure."""
        ...

    def restore(self, model: nn.Module, structure: dict[str, Any]) -> Ledger:
        """Rebuild a structure on a fresh, possibly meta-device model, without weights."""
        ...


def leaves_no_trace(method: MethodModule) -> bool:
    """Whether nothing of a method is left in a converted model."""
    return bool(getattr(method, "LEAVES_NO_TRACE", False))

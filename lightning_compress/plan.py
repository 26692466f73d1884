"""The words for what a model has become: a versioned, validated, JSON-only description of its structure.

A plan lists the methods that touched a model, in the order in which they were applied. It holds no weights and
no code, so it can travel in ``config.json``, in a Lightning checkpoint and between versions of this library.
The next chapter is :mod:`lightning_compress.methods`, which turns a plan back into modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = ["SCHEMA_VERSION", "CompressionPlan", "MethodRecord", "PlanError", "Stage"]

SCHEMA_VERSION = 1

Stage = Literal["prepared", "converted"]


class PlanError(ValueError):
    """A plan cannot be used: unknown schema version, unknown field, wrong type or impossible bound."""


@dataclass(frozen=True)
class MethodRecord:
    """One method in a plan."""

    method: str
    """Stem of the method, e.g. ``"soft_threshold_rank"``."""
    stage: Stage
    """``"prepared"`` while trainable machinery is installed, ``"converted"`` once it is baked into small modules."""
    config: dict[str, Any] = field(default_factory=dict)
    """The method's configuration, as plain JSON values."""
    structure: dict[str, Any] = field(default_factory=dict)
    """What is left of the model, as plain JSON values; empty while the stage is ``"prepared"``."""


@dataclass(frozen=True)
class CompressionPlan:
    """The compressed structure of one model.

    Example:
        >>> record = MethodRecord("soft_threshold_rank", "converted", {}, {"ranks": {"layer.0": 4}})
        >>> plan = CompressionPlan("bert", (record,))
        >>> CompressionPlan.from_dict(plan.to_dict()) == plan
        True
    """

    model_type: str
    """``config.model_type`` of the model the plan belongs to."""
    methods: tuple[MethodRecord, ...] = ()
    """The methods in the order in which they were applied."""
    version: int = SCHEMA_VERSION
    """Schema version of the plan."""

    @property
    def is_converted(self) -> bool:
        """Whether nothing in the plan needs training machinery any more."""
        return all(record.stage == "converted" for record in self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as nested dicts, lists, strings and numbers."""
        return {
            "version": self.version,
            "model_type": self.model_type,
            "methods": [
                {
                    "method": r.method,
                    "stage": r.stage,
                    "config": dict(r.config),
                    "structure": dict(r.structure),
                }
                for r in self.methods
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionPlan:
        """Validate plain data and return the plan.

        Only the frame is checked here; each method checks its own structure against the model before it allocates.

        Raises:
            PlanError: If the schema version is unknown, a field is missing, unknown or of the wrong type, or a
                value is not JSON.
        """
        _require(isinstance(data, Mapping), f"a plan must be a mapping, got {type(data).__name__}")
        version = data.get("version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise PlanError(
                f"plan has schema version {version!r}, this release of lightning-compress reads version "
                f"{SCHEMA_VERSION}: install a release that knows it, or save the model again with this one"
            )
        _check_fields(data, {"version", "model_type", "methods"}, "plan")
        _require(isinstance(data["model_type"], str), "plan field 'model_type' must be a string")
        _require(isinstance(data["methods"], list | tuple), "plan field 'methods' must be a list")
        _check_json(data)
        return cls(data["model_type"], tuple(_read_record(record) for record in data["methods"]), version)


def _read_record(data: Any) -> MethodRecord:
    _require(isinstance(data, Mapping), f"a method record must be a mapping, got {type(data).__name__}")
    _check_fields(data, {"method", "stage", "config", "structure"}, "method record")
    _require(isinstance(data["method"], str), "method record field 'method' must be a string")
    stages = get_args(Stage)
    _require(data["stage"] in stages, f"method record has stage {data['stage']!r}, allowed are {stages}")
    for name in ("config", "structure"):
        _require(isinstance(data[name], Mapping), f"method record field {name!r} must be a mapping")
    return MethodRecord(data["method"], data["stage"], dict(data["config"]), dict(data["structure"]))


def _check_fields(data: Mapping[str, Any], expected: set[str], what: str) -> None:
    missing, unknown = expected - set(data), set(data) - expected
    _require(not missing, f"{what} lacks the fields {sorted(missing)}")
    _require(not unknown, f"{what} has unknown fields {sorted(map(str, unknown))}")


def _check_json(data: Mapping[str, Any]) -> None:
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PlanError(f"plan holds a value that is not JSON: {error}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)

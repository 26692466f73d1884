"""Plans are validated before anything is built from them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_compress.plan import SCHEMA_VERSION, CompressionPlan, MethodRecord, PlanError


def plain() -> dict[str, Any]:
    record = {"method": "m", "stage": "converted", "config": {"a": [1]}, "structure": {"ranks": {"x": 2}}}
    return {"version": SCHEMA_VERSION, "model_type": "bert", "methods": [record]}


def test_a_plan_survives_json() -> None:
    plan = CompressionPlan.from_dict(plain())
    assert CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.is_converted


def test_a_plan_in_training_form_says_so() -> None:
    assert not CompressionPlan("bert", (MethodRecord("m", "prepared"),)).is_converted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "schema version 99"),
        ({"version": True}, "schema version True"),
        ({"version": None}, "schema version None"),
        ({"extra": 1}, "unknown fields.*extra"),
        ({"model_type": 3}, "model_type"),
        ({"methods": "no"}, "methods"),
        ({"methods": [3]}, "must be a mapping"),
        ({"methods": [{"method": "m"}]}, "lacks the fields"),
        ({"methods": [{**plain()["methods"][0], "stage": "molten"}]}, "molten"),
        ({"methods": [{**plain()["methods"][0], "method": 1}]}, "'method' must be a string"),
        ({"methods": [{**plain()["methods"][0], "structure": []}]}, "'structure' must be a mapping"),
        ({"methods": [{**plain()["methods"][0], "config": {"x": float("nan")}}]}, "not JSON"),
        ({"methods": [{**plain()["methods"][0], "config": {"x": object()}}]}, "not JSON"),
    ],
    ids=str,
)
def test_a_broken_plan_is_refused_with_the_field_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        CompressionPlan.from_dict({**plain(), **change})


@pytest.mark.parametrize("missing", ["model_type", "methods"])
def test_a_missing_field_is_named(missing: str) -> None:
    data = plain()
    del data[missing]
    with pytest.raises(PlanError, match=missing):
        CompressionPlan.from_dict(data)


def test_what_is_not_a_mapping_is_no_plan() -> None:
    with pytest.raises(PlanError, match="must be a mapping"):
        CompressionPlan.from_dict([])  # type: ignore[arg-type]

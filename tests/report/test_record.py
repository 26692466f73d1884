import json
import math

import pytest

from lightning_compress.report.record import LayerRank, RunRecord, StepRecord
from tests.report.records import with_value


def test_a_record_there_and_back_is_the_same(run: dict):
    record = RunRecord.from_dict(run)
    assert RunRecord.from_dict(json.loads(record.to_json())) == record
    assert record.to_dict() == run


def test_a_record_of_nothing_but_the_model_type_is_valid():
    record = RunRecord(model_type="bert")
    assert RunRecord.from_dict(record.to_dict()) == record


def test_only_what_is_known_is_needed_in_the_file():
    record = RunRecord.from_dict({"schema": 1, "model_type": "gpt2"})
    assert record.final is None
    assert record.steps == []


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_another_schema_is_refused_with_the_remedy(run: dict, schema: object):
    with pytest.raises(ValueError, match="this version reads 1: render it with the version that wrote it"):
        RunRecord.from_dict(run | {"schema": schema})


def test_an_unknown_field_is_refused_by_name(run: dict):
    with pytest.raises(ValueError, match=r"unknown fields \['finals'\]"):
        RunRecord.from_dict(run | {"finals": 1})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "", "'model_type' is ''"),
        (("target",), [], r"'target' is \[\]"),
        (("steps", 0, "step"), -1, "'step' is -1"),
        (("steps", 0, "step"), True, "'step' is True"),
        (("steps", 0, "progress"), 1.5, r"'progress' is 1.5: expected a number in \[0, 1\]"),
        (("steps", 0, "size_ratio"), "half", "'size_ratio' is 'half'"),
        (("steps", 0, "flops_ratio"), math.inf, "'flops_ratio' is inf"),
        (("steps", 0, "flops_ratio"), math.nan, "'flops_ratio' is nan"),
        (("steps", 0, "phase"), None, "'phase' is None"),
        (("final", "parameters"), {}, "'dense' is None"),
        (("final", "parameters", "dense", "total"), 1.5, "'total' is 1.5"),
        (("final", "flops", "dense"), None, "'dense' is None"),
        (("final", "bytes_on_disk", "dense"), -3, "'dense' is -3"),
        (("final", "ranks", "x"), [1, 2], "expected .rank, full rank, kept."),
        (("final", "ranks", "x"), [3, 2, "dense"], "rank 3 of 2 is impossible"),
        (("final", "ranks", "x"), [1, 2, "thin"], "kept='thin' is unknown"),
    ],
)
def test_an_impossible_value_is_refused_by_name(run: dict, path: tuple, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(with_value(run, *path, value=value))


def test_losses_that_are_not_numbers_survive_json_as_null(run: dict):
    run["steps"][-1]["loss"] = {"task": math.nan, "rank": math.inf}
    text = RunRecord.from_dict(run).to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = RunRecord.from_dict(json.loads(text))
    assert math.isnan(again.steps[-1].loss["task"])


def test_metrics_that_are_not_numbers_become_null(run: dict):
    run["metrics"]["compressed"] = {"accuracy": math.nan}
    assert json.loads(RunRecord.from_dict(run).to_json())["metrics"]["compressed"] == {"accuracy": None}


@pytest.mark.parametrize(
    ("target", "share"),
    [({"target_flops": 1}, 1.0), ({"target_flops": 0.3}, 0.3), ({"target_flops": None}, None), ({}, None)],
)
def test_the_target_of_flops_is_a_number_or_nothing(target: dict, share: float | None):
    assert RunRecord(model_type="bert", target=target).target_flops == share


def test_the_share_is_rank_over_full_rank():
    assert LayerRank(96, 384, "low_rank").share == 0.25


def test_a_step_does_not_share_its_containers_with_its_dictionary():
    step = StepRecord(step=1, progress=0.5, phase="search", size_ratio=1.0, flops_ratio=1.0, ranks={"a": 3})
    step.to_dict()["ranks"]["a"] = 4
    assert step.ranks == {"a": 3}

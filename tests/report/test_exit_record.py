import json
import math

import pytest

from lightning_compress.report.exit_record import ExitPointRecord, ExitsRecord
from lightning_compress.report.record import RunRecord
from lightning_compress.runtime.exit_trial import ExitPoint
from tests.report.records import with_value


def test_a_record_with_exits_there_and_back_is_the_same(exit_run: dict):
    record = RunRecord.from_dict(exit_run)
    assert RunRecord.from_dict(json.loads(record.to_json())) == record
    assert record.to_dict() == exit_run


def test_a_record_without_exits_is_written_as_ever(run: dict):
    assert "exits" not in RunRecord.from_dict(run).to_dict()


def test_the_mean_depth_is_over_texts():
    record = ExitsRecord(num_texts=4, leaves=(0.5, 0.25, 0.25), asked=(0, 1), rule="entropy", threshold=0.1)
    assert record.mean_depth == (2 * 1 + 2 + 3) / 4


def test_points_of_a_trial_are_told_as_shares_of_the_dense_flops():
    point = ExitPoint(
        threshold=0.25,
        exits=(0,),
        score=0.5,
        flops_ratio=0.75,
        flops=30.0,
        mean_depth=1.5,
        leaves_L=(0.5, 0.5),
    )
    found = ExitPointRecord.of(point, off=-1.0, dense_flops=120.0)
    assert found == ExitPointRecord(threshold=0.25, score=0.5, flops_ratio=0.25, mean_depth=1.5)
    assert ExitPointRecord.of(point, off=0.25, dense_flops=120.0).threshold is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("num_texts",), -1, "'num_texts' is -1"),
        (("leaves",), [], "'leaves' is empty"),
        (("leaves", 0), 1.5, r"'leaves' is 1.5: expected a number in \[0, 1\]"),
        (("leaves", 0), 0.25, "'leaves' sums to 0.75"),
        (("asked", 0), 3, r"exits \[3, 2\] are asked in a model of 4 layers"),
        (("asked", 0), -1, "'asked' is -1"),
        (("rule",), "", "'rule' is ''"),
        (("threshold",), math.inf, "'threshold' is inf"),
        (("metric",), None, "'metric' is None"),
        (("curve",), 3, "'curve' is 3: expected a list"),
        (("curve", 0), "a point", "'curve' is 'a point': expected a mapping"),
        (("curve", 1, "score"), math.nan, "'score' is nan"),
        (("curve", 1, "flops_ratio"), -1, "'flops_ratio' is -1"),
        (("curve", 1, "mean_depth"), None, "'mean_depth' is None"),
    ],
)
def test_an_impossible_value_is_refused_by_name(exit_run: dict, path: tuple, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(with_value(exit_run, "exits", *path, value=value))


def test_a_part_of_another_kind_is_refused(run: dict):
    with pytest.raises(ValueError, match="'exits' is 3"):
        RunRecord.from_dict(run | {"exits": 3})

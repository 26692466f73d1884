import json
import math

import pytest

from lightning_compress.report.dropping_record import DroppingRecord, TokenText
from lightning_compress.report.record import RunRecord, StepRecord
from tests.report.records import with_value


def test_a_record_with_tokens_there_and_back_is_the_same(dropping_run: dict):
    record = RunRecord.from_dict(dropping_run)
    assert RunRecord.from_dict(json.loads(record.to_json())) == record
    assert record.to_dict() == dropping_run


def test_a_record_without_tokens_is_written_as_ever(run: dict):
    plain = RunRecord.from_dict(run).to_dict()
    assert "dropping" not in plain
    assert {"tokens_kept", "ratio", "target", "threshold"}.isdisjoint(plain["steps"][0])


def test_a_step_keeps_what_it_knows_of_tokens():
    step = StepRecord(
        step=1, progress=0.5, phase="ramp", size_ratio=1.0, flops_ratio=0.5, tokens_kept=0.6, ratio=0.5
    )
    assert StepRecord.from_dict(step.to_dict()) == step
    assert "threshold" not in step.to_dict()


def test_the_mean_is_over_layers():
    assert DroppingRecord(num_texts=1, layers=(1.0, 0.5, 0.0)).mean_kept == 0.5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("num_texts",), -1, "'num_texts' is -1"),
        (("layers",), [], "'layers' is empty"),
        (("layers", 0), 1.5, r"'layers' is 1.5: expected a number in \[0, 1\]"),
        (("texts",), "a text", "'texts' is 'a text': expected a list"),
        (("texts", 0), "a text", "'texts' is 'a text': expected a mapping"),
        (("texts", 0, "layers"), [1], "4 tokens and 1 numbers"),
        (("texts", 0, "layers", 1), 2.5, "'layers' is 2.5"),
        (("texts", 0, "layers", 1), 9, "entered 9 layers of a model that has 3"),
        (("texts", 0, "label"), 3, "'label' is 3"),
        (("scale",), math.nan, "'scale' is nan"),
        (("metric",), "", "'metric' is ''"),
        (("curve", 0, "score"), None, "'score' is None"),
        (("curve", 0, "score"), math.inf, "'score' is inf"),
        (("curve", 0, "flops_ratio"), -1, "'flops_ratio' is -1"),
    ],
)
def test_an_impossible_value_is_refused_by_name(dropping_run: dict, path: tuple, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(with_value(dropping_run, "dropping", *path, value=value))


def test_a_part_of_another_kind_is_refused(run: dict):
    with pytest.raises(ValueError, match="'dropping' is 3"):
        RunRecord.from_dict(run | {"dropping": 3})


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="0 tokens"):
        TokenText(tokens=(), layers=())

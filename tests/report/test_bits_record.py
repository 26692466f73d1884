import json

import pytest

from lightning_compress import quantize
from lightning_compress.deploy import plan_of
from lightning_compress.report.bits_record import BitsRecord, OperatorBits
from lightning_compress.report.record import RunRecord
from tests.report.conftest import tiny_bert
from tests.report.records import with_value


def test_a_record_with_bits_there_and_back_is_the_same(bits_run: dict):
    record = RunRecord.from_dict(bits_run)
    assert RunRecord.from_dict(json.loads(record.to_json())) == record
    assert record.to_dict() == bits_run


def test_a_record_without_bits_is_written_as_ever(run: dict):
    assert "bits" not in RunRecord.from_dict(run).to_dict()


def test_operators_are_those_of_the_plan():
    model = quantize(tiny_bert(), "w4a8", block=(0, 16), factor="shift", operators=("linear", "norm"))
    plan = plan_of(model)
    assert plan is not None
    blocks = {"block": "all × 16", "factor": "shift"}
    inputs = {"block": "1 × 16", "factor": "shift"}
    found = BitsRecord.of_plan(plan)
    assert found is not None and found.operators == (
        OperatorBits(operator="linear weights", places=12, bits=4, **blocks),
        OperatorBits(operator="inputs of linears", places=12, bits=8, **inputs),
        OperatorBits(operator="norms", places=5),
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("operators",), [], "'operators' is empty"),
        (("operators",), 3, "'operators' is 3: expected a list"),
        (("operators", 0), "softmax", "an entry of field 'operators' is 'softmax'"),
        (("operators", 0, "operator"), "", "'operator' is ''"),
        (("operators", 0, "places"), -1, "'places' is -1"),
        (("operators", 0, "bits"), 4.5, "'bits' is 4.5"),
        (("operators", 0, "block"), None, "'block' is None"),
        (("operators", 0, "factor"), 2, "'factor' is 2"),
    ],
)
def test_an_impossible_value_is_refused_by_name(bits_run: dict, path: tuple, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(with_value(bits_run, "bits", *path, value=value))


def test_a_part_of_another_kind_is_refused(run: dict):
    with pytest.raises(ValueError, match="'bits' is 3"):
        RunRecord.from_dict(run | {"bits": 3})

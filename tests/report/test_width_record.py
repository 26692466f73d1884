import json

import pytest
from transformers import BertConfig, BertModel

from lightning_compress.deploy import quantize
from lightning_compress.report.record import RunRecord
from lightning_compress.report.width_record import KeptOf, LayerWidth
from tests.report.records import with_value


def test_a_record_with_widths_there_and_back_is_the_same(width_run: dict):
    record = RunRecord.from_dict(width_run)
    assert RunRecord.from_dict(json.loads(record.to_json())) == record
    assert record.to_dict() == width_run


def test_a_record_without_widths_is_written_as_ever(run: dict):
    assert "widths" not in RunRecord.from_dict(run).to_dict()


def test_parameters_of_the_layers_add_up(width_run: dict):
    widths = RunRecord.from_dict(width_run).widths
    assert widths is not None
    assert widths.parameters == KeptOf(600_000, 1_100_000)
    assert widths.layers[1].heads.share == 0.25


def test_layers_are_counted_beside_the_dense_ones_whatever_their_bits():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
    dense, narrow = (BertModel(BertConfig(**sizes, intermediate_size=number)) for number in (16, 6))
    plain = LayerWidth.of_layers(narrow, dense.to("meta"))
    same = 4 * 8 * 8 + 4 * 8 + 4 * 8  # attention, its biases, two norms
    expected = KeptOf(same + 2 * 8 * 6 + 6 + 8, same + 2 * 8 * 16 + 16 + 8)
    assert plain == (LayerWidth(heads=KeptOf(2, 2), neurons=KeptOf(6, 16), parameters=expected),) * 2
    assert LayerWidth.of_layers(quantize(narrow, "w4a8"), dense) == plain


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers",), [], "'layers' is empty"),
        (("layers",), 3, "'layers' is 3: expected a list"),
        (("layers", 0), "a layer", "'layers' is 'a layer': expected a mapping"),
        (("layers", 0, "heads"), 6, r"'heads' is 6: expected \[kept, dense\]"),
        (("layers", 0, "heads"), [6], r"'heads' is \[6\]"),
        (("layers", 0, "neurons"), [-1, 3072], "'neurons' is -1"),
        (("layers", 1, "neurons"), [4000, 3072], "4000 of 3072 is impossible"),
        (("layers", 1, "parameters"), [0, 0], "0 of 0 is impossible"),
        (("criterion",), "", "'criterion' is ''"),
        (("embedding_rank",), [1.5, 768], "'embedding_rank' is 1.5"),
        (("hidden",), "all", "'hidden' is 'all'"),
        (("calibration_seconds",), -1.0, "'calibration_seconds' is -1.0"),
        (("calibration_share",), 1.5, r"'calibration_share' is 1.5: expected a number in \[0, 1\]"),
    ],
)
def test_an_impossible_value_is_refused_by_name(width_run: dict, path: tuple, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(with_value(width_run, "widths", *path, value=value))


def test_a_part_of_another_kind_is_refused(run: dict):
    with pytest.raises(ValueError, match="'widths' is 3"):
        RunRecord.from_dict(run | {"widths": 3})

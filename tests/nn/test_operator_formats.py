import json

import pytest

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.operator_formats import OPERATORS, OperatorFormats, preset


@pytest.mark.parametrize(
    ("name", "weight", "moving"), [("w8a8", 8, 8), ("w4a8", 4, 8), ("w4a4", 4, 4), ("w8", 8, None)]
)
def test_presets_give_weights_and_moving_values_their_bits(name, weight, moving):
    formats = preset(name, operators="all")
    assert formats.weight == formats.embedding == BlockFormat(weight, (1, 0), "scale")
    assert formats.input == formats.attention == (None if moving is None else BlockFormat(moving))


def test_blocks_of_moving_values_hold_one_row_except_where_there_is_one_for_all():
    tiles = preset("w8a8", block=(32, 64), factor="shift", operators="all")
    assert tiles.weight == tiles.embedding == BlockFormat(8, (32, 64), "shift")
    assert tiles.input == tiles.attention == BlockFormat(8, (1, 64), "shift")
    layerwise = preset("w8a8", block=[0, 0])
    assert layerwise.weight == layerwise.input == BlockFormat(8, (0, 0))


def test_blocks_as_high_as_the_matrix_do_not_span_tokens():
    formats = preset("w8a8", block=(0, 16), operators="all")
    assert formats.weight == BlockFormat(8, (0, 16))
    assert formats.input == formats.attention == BlockFormat(8, (1, 16))


def test_only_what_was_asked_for_is_quantised():
    assert preset("w8a8", operators=("norm", "linear")).operators == ("linear", "norm")
    assert preset("w8a8", operators=["attention"]) == OperatorFormats(attention=BlockFormat())
    assert preset("w8a8", operators="all").operators == OPERATORS
    assert preset("w8", operators="all").operators == ("linear", "embedding")


def test_single_operators_can_have_other_bits():
    formats = preset("w4a8", operators="all", bits={"embedding": 8, "input": 6})
    assert [getattr(formats, name).bits for name in ("weight", "input", "embedding", "attention")] == [
        4,
        6,
        8,
        8,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "w2a2"}, "not one of"),
        ({"name": "w8", "operators": ("softmax",)}, "preset 'w8'"),
        ({"name": "w8a8", "operators": ()}, "one or more"),
        ({"name": "w8a8", "operators": ("gelu",)}, "gelu"),
        ({"name": "w8a8", "block": "tile"}, "neither 'row'"),
        ({"name": "w8a8", "block": (1, 2, 3)}, "neither 'row'"),
        ({"name": "w8a8", "factor": "float"}, "factor='float'"),
        ({"name": "w8", "bits": {"input": 8}}, "input"),
        ({"name": "w8a8", "bits": {"weight": 1}}, "bits=1"),
        ({"name": "w8a8", "bits": {"attention": 4}}, "name 'attention' among the operators"),
    ],
)
def test_unknown_words_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(**arguments)


def test_formats_come_back_from_json():
    formats = preset("w4a8", block=(32, 32), factor="shift", operators="all")
    assert OperatorFormats.from_dict(json.loads(json.dumps(formats.to_dict()))) == formats
    assert OperatorFormats.from_dict({}) == OperatorFormats()


def test_data_that_is_no_format_is_refused():
    with pytest.raises(ValueError, match="'depth'"):
        OperatorFormats.from_dict({"depth": 3})
    with pytest.raises(TypeError, match="softmax=1"):
        OperatorFormats.from_dict({"softmax": 1})
    with pytest.raises(TypeError, match="weight=8"):
        OperatorFormats.from_dict({"weight": 8})


def test_quantised_inputs_need_quantised_weights():
    with pytest.raises(ValueError, match="give weights one too"):
        OperatorFormats(input=BlockFormat())

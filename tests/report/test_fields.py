import math

import pytest

from lightning_compress.report.fields import (
    count_field,
    list_field,
    mapping_field,
    number_field,
    optional_field,
    text_field,
)

DATA = {"number": 0.5, "count": 3, "text": "a", "mapping": {"b": 1}, "list": [1, 2], "none": None}


def test_what_is_right_comes_back():
    assert number_field(DATA, "number") == 0.5
    assert count_field(DATA, "count") == 3
    assert text_field(DATA, "text") == "a"
    assert mapping_field(DATA, "mapping") == {"b": 1}
    assert list_field(DATA, "list") == [1, 2]


def test_what_may_be_absent_has_a_word_for_it():
    assert mapping_field(DATA, "absent", default={}) == {}
    assert list_field(DATA, "absent") == []
    assert optional_field(DATA, "absent") is optional_field(DATA, "none") is None
    assert optional_field(DATA, "number") == 0.5
    assert optional_field({"x": -3.0}, "x", lower=-math.inf) == -3.0


@pytest.mark.parametrize("value", [None, "1", True, -0.1, 2.0, math.nan, math.inf])
def test_a_number_out_of_range_is_refused_by_name(value: object):
    with pytest.raises(ValueError, match="'x' is"):
        number_field({"x": value}, "x", upper=1.0)


@pytest.mark.parametrize("value", [None, 1.5, True, -1])
def test_a_count_that_is_none_is_refused_by_name(value: object):
    with pytest.raises(ValueError, match=r"'x' is .* whole number"):
        count_field({"x": value}, "x")


@pytest.mark.parametrize("field", [text_field, mapping_field, list_field])
def test_a_value_of_another_kind_is_refused_by_name(field):
    with pytest.raises(ValueError, match="'x' is 3: expected a"):
        field({"x": 3}, "x")

import re
from dataclasses import replace

import pytest

from lightning_compress.report import exit_figures as figures
from lightning_compress.report.exit_record import ExitsRecord


@pytest.fixture
def found(exit_run: dict) -> ExitsRecord:
    return ExitsRecord.from_dict(exit_run["exits"])


def words_of(svg: str) -> list[str]:
    return re.findall(r">([^<>\n]+)<", svg)


def test_bars_write_the_share_of_each_exit_that_is_asked_and_of_the_last_layer(found: ExitsRecord):
    words = words_of(figures.draw_exits(found))
    assert "50 %" in words and words.count("25 %") == 2
    assert "0 %" not in words, "the exit after layer 1 is not asked"
    assert "mean 2.25 layers" in words


def test_bars_of_a_deep_model_leave_the_numbers_out(found: ExitsRecord):
    deep = replace(found, leaves=(0.5, *[0.0] * 15, 0.5), asked=(0,))
    assert "50 %" not in words_of(figures.draw_exits(deep))


def test_the_curve_marks_the_deployed_point_and_that_of_all_layers(found: ExitsRecord):
    words = words_of(figures.draw_exit_curve(found, 0.6))
    assert {"as deployed", "0.89 at 57%", "all layers", "0.9"} <= set(words)


def test_a_curve_of_a_model_that_nobody_leaves_and_of_one_point_can_be_drawn(found: ExitsRecord):
    stays = replace(found, leaves=(0.0, 0.0, 0.0, 1.0), asked=(), threshold=None, curve=found.curve[:1])
    words = words_of(figures.draw_exit_curve(stays))
    assert "0.9 at 100%" in words and "all layers" not in words

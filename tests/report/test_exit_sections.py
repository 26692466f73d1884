import re

import pytest

from lightning_compress.report import sections
from lightning_compress.report.exit_sections import exits
from lightning_compress.report.page import render_page
from lightning_compress.report.record import RunRecord


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).strip()


def test_the_section_shows_who_leaves_where_and_every_threshold(exit_run: dict):
    markup = exits(RunRecord.from_dict(exit_run))
    words = text_of(markup)
    assert "Over 320 validation texts, 75.0 % leave before the last of 4 layers" in words
    assert "a text runs 2.25 layers on average" in words
    assert "its entropy is below 0.125" in words
    assert 'id="exits-' in markup and 'id="thresholds-' in markup
    assert "nobody leaves 0.9 100.0 % 4.00" in words and "0.5 0.8 30.0 % 1.00" in words


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("max_prob", "its largest probability is above 0.125"),
        ("margin", "differ by more than 0.125"),
        ("patience", "0.125 exits in a row agree"),
        ("learned", "guessed to be below 0.125"),
        ("of tomorrow", "the rule says so"),
    ],
)
def test_each_rule_is_told_in_words(exit_run: dict, rule: str, words: str):
    exit_run["exits"]["rule"] = rule
    assert words in text_of(exits(RunRecord.from_dict(exit_run)))


def test_a_threshold_that_lets_nobody_leave_is_said_with_the_remedy(exit_run: dict):
    exit_run["exits"].update(threshold=None, leaves=[0.0, 0.0, 0.0, 1.0], asked=[])
    words = text_of(exits(RunRecord.from_dict(exit_run)))
    assert "lets nobody leave: every text runs all 4 layers" in words and "choose_exit_threshold" in words


def test_without_a_curve_the_bars_are_shown(exit_run: dict):
    exit_run["exits"]["curve"] = []
    markup = exits(RunRecord.from_dict(exit_run))
    assert 'id="exits-' in markup and "thresholds-" not in markup and "Every threshold" not in markup


def test_where_there_are_no_exits_there_is_no_section(run: dict):
    assert exits(RunRecord.from_dict(run)) == ""


def test_the_rest_of_the_page_knows_that_texts_leave_and_weights_stay(exit_run: dict):
    record = RunRecord.from_dict(exit_run)
    tiles = text_of(sections.tiles(record))
    assert "Parameters" not in tiles
    assert "Layers run 2.25 of 4, on average; 75.0 % of the texts leave early" in tiles
    size = text_of(sections.size(record))
    assert "Texts leave, weights stay" in size and "mean over 320 validation texts" in size
    assert "Layers that a text runs 4 2.25 56.2 % 1.78×" in size
    assert "<h2>Exits</h2>" in render_page(record)


def test_texts_and_tokens_may_leave_from_one_model(dropping_run: dict, exit_run: dict):
    exit_run["dropping"] = dropping_run["dropping"]
    size = text_of(sections.size(RunRecord.from_dict(exit_run)))
    assert "Tokens and texts leave" in size and size.count("validation texts") == 1
    assert "Tokens in a layer" in size and "Layers that a text runs" in size

import re

import pytest

from lightning_compress.report.page import render_page
from lightning_compress.report.record import RunRecord
from lightning_compress.report.width_sections import widths


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).strip()


def words_of(run: dict) -> str:
    return text_of(widths(RunRecord.from_dict(run)))


def test_the_section_shows_heads_neurons_and_parameters_of_each_layer(width_run: dict):
    words = words_of(width_run)
    assert "A layer keeps 4.5 of 12 heads and 768 of 3,072 neurons on average" in words
    assert "600 k of 1.10 M parameters of the layers are left, 54.5 %" in words
    assert "Word embeddings have rank 128 of 768" in words and "residual" not in words
    assert "0 6 of 12 1,024 of 3,072 350 k of 550 k 63.6 %" in words
    assert "1 3 of 12 512 of 3,072 250 k of 550 k 45.5 %" in words
    assert "<h2>Widths</h2>" in render_page(RunRecord.from_dict(width_run))


def test_a_narrower_residual_stream_is_told(width_run: dict):
    width_run["widths"].update(hidden=[512, 768], embedding_rank=None)
    words = words_of(width_run)
    assert "The residual stream is 512 wide, of 768" in words and "rank" not in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "measured in separate passes: 12.2 s, 4.50 % of the time since training began or was resumed"),
        ({"calibration_share": None}, "separate passes: 12.2 s since training began"),
        ({"calibration_seconds": None, "calibration_share": None}, "ordinary steps, which costs nothing"),
        ({"criterion": "l0", "calibration_seconds": None}, "learned by gates"),
    ],
)
def test_what_the_choice_cost_is_told(width_run: dict, change: dict, words: str):
    width_run["widths"].update(change)
    assert words in words_of(width_run)


def test_passes_of_an_earlier_run_are_told_of_without_their_time(width_run: dict):
    width_run["widths"].update(calibration_seconds=None, calibration_share=None)
    width_run["methods"][0]["config"]["calibration_batches"] = 4
    assert "measured in separate passes, in an earlier run." in words_of(width_run)
    assert "costs nothing" not in words_of(width_run)


def test_where_no_layer_was_slimmed_there_is_no_section(run: dict):
    assert widths(RunRecord.from_dict(run)) == ""

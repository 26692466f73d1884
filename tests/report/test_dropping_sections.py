import re

from lightning_compress.report import sections
from lightning_compress.report.dropping_sections import tokens
from lightning_compress.report.record import RunRecord


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).strip()


def test_the_section_shows_texts_layers_and_the_dial(dropping_run: dict):
    markup = tokens(RunRecord.from_dict(dropping_run))
    words = text_of(markup)
    assert (
        "Over 320 validation texts, a layer runs on 50.0 % of the tokens on average, the last one on 20.0 %"
        in words
    )
    assert "positive · ✓ · 2 of 4 tokens go through all layers" in words
    assert "negative · ✗ label positive · 1 of 2 tokens goes through all layers" in words
    assert 'id="kept-' in markup and 'id="dial-' in markup
    assert "target 50%" in markup


def test_texts_beyond_the_first_unfold(dropping_run: dict):
    dropping_run["dropping"]["texts"] *= 4
    markup = tokens(RunRecord.from_dict(dropping_run))
    assert "3 more texts" in markup
    assert markup.split("<details")[0].count("<article") == 5


def test_a_text_without_prediction_or_label_has_no_verdict(dropping_run: dict):
    first = dropping_run["dropping"]["texts"][0]
    del first["label"]
    assert "✓" not in text_of(tokens(RunRecord.from_dict(dropping_run)))
    first["prediction"], first["label"] = None, "positive"
    words = text_of(tokens(RunRecord.from_dict(dropping_run)))
    assert "label positive · 2 of 4" in words


def test_without_a_curve_or_texts_the_rest_is_shown(dropping_run: dict):
    dropping_run["dropping"].update(texts=[], curve=[])
    markup = tokens(RunRecord.from_dict(dropping_run))
    assert "dial-" not in markup and "article" not in markup
    assert 'id="kept-' in markup


def test_where_tokens_do_not_leave_there_is_no_section(run: dict):
    assert tokens(RunRecord.from_dict(run)) == ""


def test_no_one_is_told_that_parameters_shrank(dropping_run: dict):
    record = RunRecord.from_dict(dropping_run)
    tiles = text_of(sections.tiles(record))
    assert "Parameters" not in tiles
    assert "Tokens kept 50.0 % on average over the layers; 20.0 % in the last" in tiles
    size = text_of(sections.size(record))
    assert "Tokens leave, weights stay" in size
    assert "mean over 320 validation texts" in size
    assert "Tokens in a layer 100.0 % 50.0 % 50.0 % 2.00×" in size


def test_a_model_that_is_smaller_too_says_both(dropping_run: dict):
    half = {"linear": 500_000, "encoder": 600_000, "total": 2_500_000}
    dropping_run["final"]["parameters"]["compressed"] = half
    record = RunRecord.from_dict(dropping_run)
    assert "Parameters 83.3 %" in text_of(sections.tiles(record))
    assert "weights stay" not in sections.size(record)
    assert 'id="progress-' in sections.course(record) and 'id="course-' in sections.course(record)


def test_the_course_of_dropping_has_no_flat_line_of_parameters(dropping_run: dict):
    markup = sections.course(RunRecord.from_dict(dropping_run))
    assert 'id="progress-' not in markup
    assert "scheduled" in markup

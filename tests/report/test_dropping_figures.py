import re

from lightning_compress.report import dropping_figures as figures
from lightning_compress.report.dropping_record import DialRecord
from lightning_compress.report.record import RunRecord

CURVE = [
    DialRecord(scale=scale, score=score, flops_ratio=flops)
    for scale, score, flops in ((0.0, 0.91, 1.02), (0.5, 0.9, 0.7), (1.0, 0.88, 0.5), (2.0, 0.7, 0.25))
]


def words_of(svg: str) -> list[str]:
    return [words.replace("\u2212", "-") for words in re.findall(r">([^<>\n]+)<", svg)]


def test_bars_write_each_share():
    words = words_of(figures.draw_kept_by_layer([1.0, 0.5, 0.042]))
    assert {"100 %", "50 %", "4.2 %"} <= set(words)


def test_bars_of_a_deep_model_leave_the_numbers_out():
    assert "33 %" in words_of(figures.draw_kept_by_layer([0.333] * 16))
    assert "33 %" not in words_of(figures.draw_kept_by_layer([0.333] * 17))


def test_the_dial_marks_the_deployed_point_the_target_and_what_was_not_dropped():
    words = words_of(figures.draw_dial("accuracy", CURVE, 1.0, 0.5))
    assert {"as deployed", "0.88 at 50%", "target 50%", "nothing dropped", "× 0.5", "× 2"} <= set(words)
    assert "× 1" not in words


def test_the_dial_without_target_and_of_one_point_can_be_drawn():
    words = words_of(figures.draw_dial("accuracy", CURVE[:1], 1.0))
    assert "0.91 at 102%" in words
    assert not any("target" in word for word in words)


def test_the_course_shows_ratio_schedule_tokens_and_thresholds(dropping_run: dict):
    steps = RunRecord.from_dict(dropping_run).steps
    words = words_of(figures.draw_dropping_course(steps, "FLOPs"))
    assert {"FLOPs left", "Tokens kept", "Threshold", "measured", "scheduled"} <= set(words)
    assert words.count("ramp") == words.count("recovery") == 1


def test_the_course_of_a_token_target_leads_with_tokens_and_adds_flops(dropping_run: dict):
    steps = RunRecord.from_dict(dropping_run).steps
    words = words_of(figures.draw_dropping_course(steps, "tokens"))
    assert words.index("Tokens kept") < words.index("FLOPs left")


def test_the_course_without_schedule_or_thresholds_can_be_drawn(dropping_run: dict):
    for step in dropping_run["steps"]:
        del step["target"], step["threshold"]
    words = words_of(figures.draw_dropping_course(RunRecord.from_dict(dropping_run).steps, "FLOPs"))
    assert "measured" in words
    assert "scheduled" not in words


def test_thresholds_may_be_negative(dropping_run: dict):
    for step in dropping_run["steps"]:
        step["threshold"] -= 1.0
    record = RunRecord.from_dict(dropping_run)
    assert record.steps[0].threshold == -0.75
    words = words_of(figures.draw_dropping_course(record.steps, "FLOPs"))
    assert any(word.startswith("-0.") for word in words)

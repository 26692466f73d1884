import re

import pytest

from lightning_compress.report import sections
from lightning_compress.report.record import RunRecord

SECTIONS = ("tiles", "warnings", "size", "quality", "latency", "ranks", "course")


def text_of(markup: str) -> str:
    """What a reader sees, on one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).strip()


def test_title_and_lead_say_what_was_done_and_asked(run: dict):
    record = RunRecord.from_dict(run)
    assert sections.title(record) == "bert, compressed by soft threshold rank"
    assert "Asked for: 50.0 % of the parameters, scope linear. Trained for 40 steps." in sections.lead(record)


def test_without_target_and_steps_the_lead_says_so():
    assert "No target was stated." in sections.lead(RunRecord(model_type="bert"))


def test_tiles_give_size_flops_quality_and_both_speeds(run: dict):
    words = text_of(sections.tiles(RunRecord.from_dict(run)))
    assert "Parameters 83.3 % 2.50 M of 3.00 M; of the linears 50.0 %" in words
    assert "FLOPs 60.0 % 1.20 GFLOPs of 2.00 GFLOPs" in words
    assert "Accuracy 86.2 % dense 87.5 % (−1.25 points)" in words
    assert "Speed-up, same dtype 2.00× fp32 (bf16 1.25×), batch 8 × 128" in words
    assert "Speed-up, best dense 1.25× bf16 (fp32 over bf16 1.00×), batch 8 × 128" in words


def test_a_metric_of_the_compressed_model_alone_stands_alone(run: dict):
    run["metrics"] = {"dense": None, "compressed": {"perplexity": 12.3456}}
    words = text_of(sections.tiles(RunRecord.from_dict(run)))
    assert "Perplexity 12.35 dense was not measured" in words


def test_a_metric_of_both_goes_before_one_of_the_compressed_model_alone(run: dict):
    run["metrics"] = {"dense": {"f1": 0.5}, "compressed": {"perplexity": 2.0, "f1": 0.25}}
    assert "F1 25.0 % dense 50.0 % (−25.00 points)" in text_of(sections.tiles(RunRecord.from_dict(run)))


def test_a_loss_is_shown_large_only_where_there_is_nothing_better(run: dict):
    run["metrics"] = {"dense": None, "compressed": {"val/loss": 0.5, "val/acc": 0.75}}
    assert "Val/acc 0.75" in text_of(sections.tiles(RunRecord.from_dict(run)))
    del run["metrics"]["compressed"]["val/acc"]
    assert "Val/loss 0.5" in text_of(sections.tiles(RunRecord.from_dict(run)))


def test_the_size_table_has_three_scopes_flops_and_disk(run: dict):
    words = text_of(sections.size(RunRecord.from_dict(run)))
    assert "Weights of the linears 1.00 M 500 k 50.0 % 2.00×" in words
    assert "All layers 1.10 M 600 k 54.5 % 1.83×" in words
    assert "Whole model 3.00 M 2.50 M 83.3 % 1.20×" in words
    assert "FLOPs 2.00 GFLOPs 1.20 GFLOPs 60.0 % 1.67×" in words
    assert "On disk 11.4 MiB 9.54 MiB 83.3 % 1.20×" in words


def test_disk_is_left_out_when_only_one_side_is_known(run: dict):
    run["final"]["bytes_on_disk"] = {"compressed": 10}
    assert "On disk" not in sections.size(RunRecord.from_dict(run))


def test_quality_shows_what_was_not_measured_as_a_dash(run: dict):
    run["metrics"] = {"dense": {"accuracy": 0.5}, "compressed": {"accuracy": None, "loss": 0.25}}
    words = text_of(sections.quality(RunRecord.from_dict(run)))
    assert "accuracy 50.0 % – –" in words
    assert "loss – 0.25 –" in words


def test_latency_lists_every_timing(run: dict):
    words = text_of(sections.latency(RunRecord.from_dict(run)))
    assert "8 × 128 small bf16 1.60 1.60–2.88 1.25 1.25" in words
    assert "A &lt;fast&gt; processor" in words


def test_ranks_are_listed_by_name(run: dict):
    words = text_of(sections.ranks(RunRecord.from_dict(run)))
    assert "bert.encoder.layer.1.output.dense 4 32 12.5 % low rank" in words


def test_the_course_shows_losses_from_first_to_last(run: dict):
    assert "task 1 0.6" in text_of(sections.course(RunRecord.from_dict(run)))


def test_a_loss_that_appears_late_or_is_no_number_does_not_break_the_page(run: dict):
    run["steps"][-1]["loss"] = {"task": None, "late": 0.5}
    words = text_of(sections.course(RunRecord.from_dict(run)))
    assert "late – 0.5" in words
    assert "task 1 nan" in words


def test_long_runs_are_thinned_and_keep_their_end(run: dict):
    steps = [dict(run["steps"][0], step=index) for index in range(1234)]
    kept = sections._thin(RunRecord.from_dict(run | {"steps": steps}).steps)
    assert len(kept) <= 402
    assert kept[-1].step == 1233


def test_settings_machine_and_versions_are_told(run: dict):
    words = text_of(sections.reproduction(RunRecord.from_dict(run)))
    assert "torch 2.13.0" in words
    assert "machine: cpu A processor" in words
    assert "&quot;target_params&quot;: 0.5" in words


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_with_nothing_to_say_is_absent(name: str):
    assert getattr(sections, name)(RunRecord(model_type="bert")) == ""


def test_warnings_are_listed(run: dict):
    run["warnings"] = ["mind the <gap>"]
    assert "<li>mind the &lt;gap&gt;</li>" in sections.warnings(RunRecord.from_dict(run))

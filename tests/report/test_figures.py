import pytest

from lightning_compress.report import figures
from lightning_compress.report.latency_table import LatencyTable
from lightning_compress.report.record import LayerRank, RunRecord


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("bert.encoder.layer.3.attention.self.query", (3, "attention.self.query")),
        ("bert.encoder.layer.11.output.dense", (11, "output")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("distilbert.transformer.layer.2.ffn.lin1", (2, "ffn.lin1")),
        ("layers.4.mixer.in_proj", (4, "mixer.in_proj")),
        ("0.experts.7.up", (0, "experts.7.up")),
        ("classifier", (None, "classifier")),
    ],
)
def test_a_path_splits_into_layer_and_place(path: str, parts: tuple):
    assert figures.split_path(path) == parts


def test_the_rank_map_writes_each_rank_and_marks_the_dense(run: dict):
    ranks = {path: LayerRank(*row) for path, row in run["final"]["ranks"].items()}
    ranks["classifier"] = LayerRank(2, 2, "low_rank")
    svg = figures.draw_rank_map(ranks)
    for words in (">8<", ">16<", ">4<", ">2<", ">dense<", ">attention.self.query<", ">classifier<", ">–<"):
        assert words in svg
    assert ">30<" not in svg


def test_the_rank_map_of_a_deep_model_leaves_the_numbers_to_the_table():
    ranks = {f"layers.{layer}.up": LayerRank(77, 128, "low_rank") for layer in range(17)}
    assert ">77<" not in figures.draw_rank_map(ranks)
    assert ">16<" in figures.draw_rank_map(ranks)
    del ranks["layers.16.up"]
    assert ">77<" in figures.draw_rank_map(ranks)


def test_the_width_map_writes_what_is_left_of_each_layer(width_run: dict):
    record = RunRecord.from_dict(width_run)
    assert record.widths is not None
    svg = figures.draw_width_map(record.widths.layers)
    for words in (">6<", ">3<", ">1,024<", ">512<", ">heads<", ">neurons<"):
        assert words in svg
    assert ">dense<" not in svg and 'id="widths-' in svg
    assert ">512<" not in figures.draw_width_map(record.widths.layers * 9)


def test_progress_names_phases_and_target(run: dict):
    record = RunRecord.from_dict(run)
    svg = figures.draw_progress(record.steps, record.target)
    assert svg.count(">search<") == svg.count(">recovery<") == 2
    assert svg.count(">target 50%<") == 1


def test_progress_without_a_target_has_no_line_for_it(run: dict):
    assert "target" not in figures.draw_progress(RunRecord.from_dict(run).steps, {"scope": "linear"})


def test_rank_paths_have_one_line_per_place_and_skip_steps_without_ranks(run: dict):
    run["steps"][0]["ranks"] = {}
    record = RunRecord.from_dict(run)
    assert record.final is not None
    svg = figures.draw_rank_paths(record.steps, record.final.ranks)
    assert svg.count(">attention.self.query<") == svg.count(">output<") == 1


def test_the_trade_off_labels_both_models():
    svg = figures.draw_tradeoff("accuracy", {"dense": (1.0, 0.875), "compressed": (0.6, 0.8625)})
    assert ">0.8625 at 60%<" in svg
    assert ">0.875 at 100%<" in svg


def test_the_trade_off_of_one_point_and_of_zero_can_be_drawn():
    assert ">0 at 60%<" in figures.draw_tradeoff("accuracy", {"compressed": (0.6, 0.0)})


def test_speedups_show_each_shape_and_dtype_and_leave_out_the_baseline(table: LatencyTable):
    svg = figures.draw_speedups(table)
    assert ">8 × 128  fp32<" in svg.replace("\u00a0", " ")
    assert ">8 × 128  bf16<" in svg.replace("\u00a0", " ")
    assert "dense" not in svg

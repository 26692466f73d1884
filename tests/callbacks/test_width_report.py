"""What the report says of widths agrees with the model that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.callbacks import (
    BlockQuantization,
    CompressionReport,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
)
from lightning_compress.callbacks.width_report import calibration_clock, measure_widths
from lightning_compress.compressor import Compressor
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.width_config import WidthSlimmingConfig
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer


def run(folder: Path, *methods: Any) -> tuple[ToyModule, dict[str, Any]]:
    module, report = ToyModule(), CompressionReport(str(folder), lengths=[6], every_n_steps=2)
    toy_trainer(callbacks=[report, *methods], max_steps=12).fit(module, toy_loader(48), toy_loader(24))
    return module, json.loads((folder / "report.json").read_text())


def test_a_run_that_slims_leaves_a_page_about_widths(tmp_path: Path) -> None:
    method = WidthSlimming(heads=2, ffn=16, embedding_rank=12, calibration_batches=2)
    module, data = run(tmp_path, method)
    page, widths = (tmp_path / "report.html").read_text(), data["widths"]
    assert "<h2>Widths</h2>" in page and 'id="widths-' in page
    assert widths["embedding_rank"] == [12, 32] and widths["hidden"] is None
    dense = tiny_bert().bert.encoder.layer
    for layer, left, whole in zip(widths["layers"], module.model.bert.encoder.layer, dense, strict=True):
        assert layer["heads"] == [2, 4] and layer["neurons"] == [16, 64]
        sizes = [sum(p.numel() for p in part.parameters()) for part in (left, whole)]
        assert layer["parameters"] == sizes
    assert widths["calibration_seconds"] > 0.0 and 0.0 < widths["calibration_share"] < 1.0
    assert "measured in separate passes" in page


@pytest.mark.parametrize("criterion", ["taylor", "l0"])
def test_without_separate_passes_none_are_priced(criterion: Any, tmp_path: Path) -> None:
    _, data = run(tmp_path, WidthSlimming(heads=2, ffn=16, criterion=criterion))
    assert data["widths"]["criterion"] == criterion
    assert data["widths"]["calibration_seconds"] is data["widths"]["calibration_share"] is None


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({}, "Asked for: 50.0 % of the parameters"),
        ({"target_flops": 0.6}, "Asked for: 60.0 % of the FLOPs"),
        ({"heads": 2}, "No target was stated"),
    ],
)
def test_the_goal_is_told_as_what_it_is_also_where_none_was_given(
    wish: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, data = run(tmp_path, WidthSlimming(**wish))
    asked = {name: value for name, value in data["target"].items() if value is not None}
    assert asked == ({} if "heads" in wish else wish or {"target_params": 0.5})
    assert words in (tmp_path / "report.html").read_text()


@pytest.mark.filterwarnings("ignore:training ended in phase")
def test_layers_are_found_where_others_changed_them_too(tmp_path: Path) -> None:
    company = SoftThresholdRank(target_params=0.5, rank_multiple=4), MultiExit(threshold=0.5)
    _, data = run(tmp_path, WidthSlimming(hidden=24, heads=2), *company)
    assert data["widths"]["hidden"] == [24, 32]
    assert [layer["heads"] for layer in data["widths"]["layers"]] == [[2, 4]] * 2
    assert [layer["neurons"] for layer in data["widths"]["layers"]] == [[64, 64]] * 2
    assert all(kept < dense for kept, dense in (layer["parameters"] for layer in data["widths"]["layers"]))


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_weights_of_few_bits_are_as_many(bits: Any, tmp_path: Path) -> None:
    methods = WidthSlimming(heads=2, ffn=16), BlockQuantization(preset=bits)
    module, data = run(tmp_path, *methods)
    layer = module.model.bert.encoder.layer[0]
    assert not any(name.endswith("dense.weight") for name, _ in layer.named_parameters()), (
        "weights are buffers"
    )
    # 4 heads of 8 of 32 dimensions, 64 neurons; 2 heads and 16 neurons are left: weights, biases, two norms
    dense = 4 * 32 * 32 + 2 * 32 * 64 + (4 * 32 + 64 + 32) + 4 * 32
    kept = 4 * 32 * 16 + 2 * 32 * 16 + (3 * 16 + 32 + 16 + 32) + 4 * 32
    assert [layer["parameters"] for layer in data["widths"]["layers"]] == [[kept, dense]] * 2
    assert data["final"]["parameters"]["compressed"]["encoder"] == 2 * kept


def test_only_runs_that_slim_have_widths_and_only_separate_passes_a_clock() -> None:
    plain = Compressor(tiny_bert(), [SoftThresholdRankConfig(target_params=0.5, rank_multiple=4)])
    ordinary = Compressor(tiny_bert(), [WidthSlimmingConfig()])
    separate = Compressor(tiny_bert(), [WidthSlimmingConfig(calibration_batches=2)])
    for compressor in (plain, ordinary, separate):
        compressor.prepare()
    assert calibration_clock(plain) is calibration_clock(ordinary) is None
    clock = calibration_clock(separate)
    assert clock is not None and clock.seconds == 0.0
    for compressor in (plain, ordinary, separate):
        compressor.convert()
    assert measure_widths(plain) is None
    assert measure_widths(ordinary) is not None

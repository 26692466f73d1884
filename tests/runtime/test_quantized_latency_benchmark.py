from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmark_scripts import load_benchmark
from tests.toys import tiny_bert


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    return load_benchmark("quantized_latency")


@pytest.fixture
def results(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(script, "minilm_shape", lambda: tiny_bert(initializer_range=0.3).eval())
    monkeypatch.setattr(script, "append", lambda file, row: rows.append(row))
    monkeypatch.setattr(script, "rows_in", lambda file: rows)
    monkeypatch.setattr(script.runtimes, "absent", lambda: ["onnxruntime", "openvino", "nncf", "torchao"])
    threads = torch.get_num_threads()
    yield rows
    torch.set_num_threads(threads)


def test_every_rival_gets_a_row_per_shape_and_absent_ones_are_named(script, results, capsys):
    wanted = ["--rivals", "packed fp32", "w8a8", "--rounds", "2", "--shapes", "1x4", "8x4"]
    script.main(wanted)
    ours = ["w8a8", "w8a8 bf16", "w8a8 packed", "w8a8 packed, all int8"]
    names = ["dense fp32", "dense bf16", "packed fp32", *ours]
    assert [row["rival"] for row in results] == names * 2
    assert [row["batch_size"] for row in results] == [1] * 7 + [8] * 7
    assert results[0]["x_fp32"] == results[1]["x_bf16"] == 1.0
    assert all(len(row["seconds"]) == 2 for row in results)
    assert results[2]["logit_error"] < 1e-5 < results[6]["logit_error"] < 0.1
    assert results[0]["absent"] == ["onnxruntime", "openvino", "nncf", "torchao"]
    assert "not installed, and left out: onnxruntime, openvino, nncf, torchao" in capsys.readouterr().out
    script.main(wanted)
    assert len(results) == 14  # it was all there
    capsys.readouterr()
    script.main(["table", "--shapes", "8x4"])
    assert "8 x 4" in capsys.readouterr().out


def test_other_models_are_exported_and_their_flops_are_told(script, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(script.runtimes, "absent", lambda: [])
    dense, slim = tiny_bert(), tiny_bert(intermediate_size=32)
    rivals = dict(script.rivals_of(dense, {"slim": slim}, tmp_path))
    assert {"slim packed fp32", "slim w8a8 packed", "slim onnxruntime int8", "slim openvino bf16"} <= set(
        rivals
    )
    assert {"dense onnxruntime fp32", "dense openvino int8 calibrated, bf16", "torchao int8"} <= set(rivals)
    ratio = script._flops_ratio(dense, slim, (2, 8))
    layer, ffn = 4 * 32 * 32 + 2 * 8 * 32, 2 * 32 * 64  # of a token: linears and products, and the FFN
    assert 1.1 < ratio < (layer + ffn) / (layer + ffn / 2)


def test_compressed_models_are_held_against_the_dense_one_in_the_same_runtime(script):
    samples = {
        "dense ort int8": [4.0, 2.0],
        "packed fp32": [9.0, 9.0],
        "a ort int8": [1.0, 1.0],
        "a packed fp32": [3.0, 3.0],
    }
    ratios = [script._against_dense(name, ["a"], samples) for name in samples]
    assert ratios == [None, None, 3.0, 3.0]


def test_answers_that_are_not_finite_are_not_timed(script):
    batch = script.texts((1, 4), 40)[0]
    with pytest.raises(ValueError, match="not finite"):
        script._logit_error(lambda _: torch.tensor([torch.nan]), lambda _: torch.ones(1), batch)
    assert script._logit_error(lambda _: torch.tensor([3.0]), lambda _: torch.tensor([2.0]), batch) == 0.5


def test_small_shapes_are_timed_over_several_batches(script):
    assert [len(script.texts(shape, 40)) for shape in ((1, 4), (4, 4), (32, 4))] == [8, 2, 1]

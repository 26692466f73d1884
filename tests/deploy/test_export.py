from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.deploy import export
from lightning_compress.deploy.export import export_onnx
from lightning_compress.runtime import pack
from lightning_compress.runtime.static import make_static
from tests.toys import tiny_bert
from tests.toys_dropping import dropping_bert, ragged_batch

LENGTH = 12


def run(path: Path, batch: dict[str, Tensor]) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    given = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    feed = {name: given[name].numpy().astype(np.int64) for name in names}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.fixture
def installed() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="the extra `onnx` is not installed")


def answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(batch["input_ids"], batch["attention_mask"]).logits


@pytest.mark.usefixtures("installed")
def test_a_dropping_model_gives_the_logits_of_its_static_variant_for_any_batch(tmp_path):
    model = dropping_bert({"protect_tokens": (39,)}, initializer_range=0.3)
    path = export_onnx(model, tmp_path / "new" / "model.onnx", length=LENGTH, counts=(6, 3))
    static = make_static(model, (6, 3))
    for lengths in ([5], [12, 3, 1, 7, 9]):
        batch = ragged_batch(lengths, padded=LENGTH)
        torch.testing.assert_close(run(path, batch), answers(static, batch), rtol=1e-5, atol=1e-5)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("prepare", [nn.Module.eval, pack], ids=["dense", "packed"])
def test_a_dense_model_gives_its_own_logits(tmp_path, prepare):
    model = prepare(tiny_bert(initializer_range=0.3).eval())
    path = export_onnx(model, tmp_path / "model.onnx", length=LENGTH, batch=2)
    batch = ragged_batch([12, 3])
    torch.testing.assert_close(run(path, batch), answers(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("installed")
def test_without_dropping_texts_may_have_any_length(tmp_path):
    model = tiny_bert(initializer_range=0.3).eval()
    path = export_onnx(model, tmp_path / "model.onnx", length="dynamic")
    for lengths in ([3], [12, 3, 9]):
        batch = ragged_batch(lengths)
        torch.testing.assert_close(run(path, batch), answers(model, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="need a fixed length"):
        export_onnx(dropping_bert(), path, length="dynamic", counts=(3, 2))


@pytest.mark.usefixtures("installed")
def test_int8_is_smaller_and_close(tmp_path):
    model = tiny_bert(hidden_size=64, intermediate_size=256, initializer_range=0.1).bfloat16().eval()
    full = export_onnx(model, tmp_path / "full.onnx", length=LENGTH)
    small = export_onnx(model, tmp_path / "small.onnx", length=LENGTH, int8=True)
    batch = ragged_batch([12, 3, 7])
    expected, found = run(full, batch), run(small, batch)
    assert small.stat().st_size < 0.6 * full.stat().st_size
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.usefixtures("installed")
def test_thresholds_cannot_be_exported_without_counts(tmp_path):
    with pytest.raises(ValueError, match=r"counts=static_counts\(model, batches\)"):
        export_onnx(dropping_bert(), tmp_path / "model.onnx", length=LENGTH)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("length", [1, 17])
def test_a_length_without_positions_is_refused(tmp_path, length):
    with pytest.raises(ValueError, match=rf"length={length} is outside \[2, 16\]"):
        export_onnx(tiny_bert(), tmp_path / "model.onnx", length=length)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("batch", [0, "any"])
def test_a_batch_that_is_no_number_is_refused(tmp_path, batch):
    with pytest.raises(ValueError, match="at least 1, or 'dynamic'"):
        export_onnx(tiny_bert(), tmp_path / "model.onnx", length=LENGTH, batch=batch)


@pytest.mark.usefixtures("installed")
def test_outputs_that_differ_leave_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was written"):
        export_onnx(tiny_bert(), path, length=LENGTH)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnx" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx: .* lightning-compress\[onnx\]"):
        export_onnx(tiny_bert(), tmp_path / "model.onnx", length=LENGTH)

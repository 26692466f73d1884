import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.deploy import export, onnx_int8
from lightning_compress.deploy.export import export_onnx
from lightning_compress.deploy.float_form import round_by_rows, to_float_form
from lightning_compress.nn.operator_formats import preset
from lightning_compress.nn.quantization_plan import quantize_model
from lightning_compress.runtime import pack
from lightning_compress.runtime.static import make_static
from tests.toys import tiny_bert
from tests.toys_dropping import dropping_bert, ragged_batch
from tests.toys_exits import exiting_model

LENGTH = 12


def run(path: Path, batch: dict[str, Tensor]) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    given = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    feed = {name: given[name].numpy().astype(np.int64) for name in names}
    return torch.from_numpy(session.run(None, feed)[0])


def run_in_openvino(path: Path, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, **settings}
    model = core.compile_model(core.read_model(path), "CPU", config)
    given = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    names = [entry.any_name for entry in model.inputs]
    return torch.from_numpy(model({name: given[name].numpy() for name in names})[0].copy())


def held_in_int8(path: Path) -> set[tuple[int, ...]]:
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    entries = onnx.load(path).graph.initializer
    held = [entry for entry in entries if entry.data_type == onnx.TensorProto.INT8]
    return {tuple(entry.dims) for entry in held if len(entry.dims) == 2}


def largest_integers(path: Path) -> list[int]:
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    held = [e for e in onnx.load(path).graph.initializer if e.data_type == onnx.TensorProto.INT8]
    return [int(np.abs(onnx.numpy_helper.to_array(entry).astype(int)).max()) for entry in held]


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
        found = run_in_openvino(path, batch)
        torch.testing.assert_close(found, answers(static, batch), rtol=1e-4, atol=1e-4)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("prepare", [nn.Module.eval, pack], ids=["dense", "packed"])
def test_a_dense_model_gives_its_own_logits(tmp_path, prepare):
    model = prepare(tiny_bert(num_hidden_layers=1, initializer_range=0.3).eval())
    path = export_onnx(model, tmp_path / "model.onnx", length=LENGTH, batch=2)
    batch = ragged_batch([12, 3])
    torch.testing.assert_close(run(path, batch), answers(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("installed")
def test_a_folder_or_a_place_below_a_file_is_refused_before_anything_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "to_float_form", lambda static: pytest.fail("tracing began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is a folder: name the file to write, such as .*model\.onnx"):
        export_onnx(tiny_bert().eval(), tmp_path, length=LENGTH)
    with pytest.raises(ValueError, match="below a file: name another folder"):
        export_onnx(tiny_bert().eval(), tmp_path / "file" / "model.onnx", length=LENGTH)


@pytest.mark.usefixtures("installed")
def test_without_dropping_texts_may_have_any_length(tmp_path):
    model = tiny_bert(initializer_range=0.3).eval()
    path = export_onnx(model, tmp_path / "model.onnx", length="dynamic")
    for lengths in ([3], [12, 3, 9]):
        batch = ragged_batch(lengths)
        torch.testing.assert_close(run(path, batch), answers(model, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="need a fixed length"):
        export_onnx(dropping_bert(), path, length="dynamic", counts=(3, 2))


def large() -> Any:
    """One layer, with tables and linears large enough to be most of a file."""
    return tiny_bert(num_hidden_layers=1, hidden_size=64, intermediate_size=256, initializer_range=0.1).eval()


def rounded(model: Any) -> Any:
    """The model with 8 bits for each row of its layers and tables."""
    twin = copy.deepcopy(model).float()
    for part in (twin.bert.embeddings, twin.bert.encoder):
        round_by_rows(part)
    to_float_form(twin)
    return twin


@pytest.mark.usefixtures("installed")
def test_int8_is_smaller_and_close(tmp_path):
    model, batch = large().bfloat16(), ragged_batch([12, 3, 7])
    path = export_onnx(model, tmp_path / "small.onnx", length=LENGTH, int8=True)
    expected = answers(rounded(model), batch)
    apart = (run(path, batch) - expected).abs().max()
    assert 0 < apart < 0.1 * expected.std()
    assert path.stat().st_size < 1.7 * sum(p.numel() for p in model.parameters())
    assert held_in_int8(path) == {(40, 64), (2, 64), (64, 64), (64, 256), (256, 64)}
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.usefixtures("installed")
def test_int8_for_openvino_equals_the_model_with_its_weights(tmp_path):
    model, batch = large(), ragged_batch([12, 3, 7])
    path = export_onnx(model, tmp_path / "small.onnx", length=LENGTH, int8=True, runtime="openvino")
    expected = answers(rounded(model), batch)
    assert not torch.allclose(answers(model, batch), expected, rtol=1e-4, atol=1e-4)
    found = run_in_openvino(path, batch, DYNAMIC_QUANTIZATION_GROUP_SIZE=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    apart = (run_in_openvino(path, batch, DYNAMIC_QUANTIZATION_GROUP_SIZE=64) - expected).abs().max()
    assert apart < 0.1 * expected.std()


@pytest.mark.usefixtures("installed")
def test_a_quantised_model_is_written_with_its_own_integers_and_exact_besides(tmp_path):
    model, batch = large(), ragged_batch([12, 3, 7])
    quantize_model(model, preset("w4a8", operators="all"))
    exact = copy.deepcopy(model)
    to_float_form(exact)
    path = export_onnx(model, tmp_path / "small.onnx", length=LENGTH, int8=True, runtime="openvino")
    found = run_in_openvino(path, batch, DYNAMIC_QUANTIZATION_GROUP_SIZE=0)
    torch.testing.assert_close(found, answers(exact, batch), rtol=1e-4, atol=1e-4)
    assert max(largest_integers(path)) == 7


@pytest.mark.usefixtures("installed")
def test_blocks_become_rows_of_eight_bits(tmp_path):
    model, batch = large(), ragged_batch([12, 3, 7])
    quantize_model(model, preset("w4a8", block=(1, 32)))
    path = export_onnx(model, tmp_path / "small.onnx", length=LENGTH, int8=True)
    exact = copy.deepcopy(model)
    to_float_form(exact)
    expected = answers(exact, batch)
    assert (run(path, batch) - expected).abs().max() < 0.1 * expected.std()
    assert max(largest_integers(path)) == 127


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("block", [(2, 0), (0, 0), (256, 256)])
def test_rows_that_share_a_factor_are_written_with_their_own_integers(tmp_path, block, factor):
    model, batch = large(), ragged_batch([12, 3, 7])
    quantize_model(model, preset("w8a8", block=block, factor=factor))
    path = export_onnx(model, tmp_path / "small.onnx", length=LENGTH, int8=True, runtime="openvino")
    assert held_in_int8(path) == {(40, 64), (2, 64), (64, 64), (64, 256), (256, 64)}
    to_float_form(model)
    found = run_in_openvino(path, batch, DYNAMIC_QUANTIZATION_GROUP_SIZE=0)
    torch.testing.assert_close(found, answers(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_rounded_weight_that_would_be_written_in_fp32_is_an_error(tmp_path, monkeypatch, runtime):
    path = tmp_path / "model.onnx"
    found = onnx_int8.integers_of_columns
    wide = (64, 256)
    monkeypatch.setattr(
        onnx_int8, "integers_of_columns", lambda weight: None if weight.shape == wide else found(weight)
    )
    with pytest.raises(RuntimeError, match=r"layer\.0\.intermediate\.dense .*nothing was written"):
        export_onnx(large(), path, length=LENGTH, int8=True, runtime=runtime)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("installed")
def test_heads_and_what_tokens_are_ranked_by_stay_in_floating_point(tmp_path):
    model = dropping_bert(initializer_range=0.3)
    path = export_onnx(model, tmp_path / "model.onnx", length=LENGTH, counts=(6, 3), int8=True)
    assert held_in_int8(path) == {(40, 32), (2, 32), (32, 32), (32, 64), (64, 32)}
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulInteger") == 12  # six linears in each of two layers, and nothing else
    assert run(path, ragged_batch([12, 3], padded=LENGTH)).isfinite().all()


@pytest.mark.usefixtures("installed")
def test_one_exit_answers_and_the_layers_after_it_are_not_written(tmp_path):
    model = exiting_model(tiny_bert(num_hidden_layers=3, initializer_range=0.3), pooling="mean")
    path = export_onnx(model, tmp_path / "exit.onnx", length="dynamic", exit_layer=0)
    batch = ragged_batch([12, 3, 7])
    expected = answers(make_static(model, exit_layer=0), batch)
    torch.testing.assert_close(run(path, batch), expected, rtol=1e-5, atol=1e-5)
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("LayerNormalization") == 3  # one of the embeddings, two of one layer
    with pytest.raises(ValueError, match="exit 2 is not after one of the layers 0, 1"):
        export_onnx(model, path, length="dynamic", exit_layer=2)


@pytest.mark.usefixtures("installed")
def test_an_unknown_runtime_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"runtime='tensorrt' is not one of \['onnxruntime', 'openvino'\]"):
        export_onnx(tiny_bert(), tmp_path / "model.onnx", length=LENGTH, runtime="tensorrt")  # type: ignore[arg-type]


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
        export_onnx(tiny_bert(num_hidden_layers=1), path, length=LENGTH)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnx" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx: .* lightning-compress\[onnx\]"):
        export_onnx(tiny_bert(), tmp_path / "model.onnx", length=LENGTH)

"""Shape legend: B sequences, K inputs, N outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.deploy.onnx_int8 import integers_of_columns, left_in_fp32, to_int8
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize


@pytest.fixture
def onnx() -> Any:
    return pytest.importorskip("onnx", reason="the extra `onnx` is not installed")


@pytest.mark.parametrize("factor", ["scale", "shift"])
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 9), st.integers(-18, 18), st.integers(0, 2**16))
def test_the_integers_of_quantised_rows_are_found_again(factor, bits, inputs, outputs, size, seed):
    weight_NK = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    weight_NK[0] *= 0.0
    held = BlockFormat(bits, factor=factor)
    payload_NK, factors_N1 = block_quantize(weight_NK, bits, held.block, factor)
    rounded_NK = block_dequantize(payload_NK, factors_N1, held.block)
    found = integers_of_columns(rounded_NK.T.numpy())
    assert found is not None
    payload_KN, scale_N = found
    np.testing.assert_allclose(payload_KN * scale_N, rounded_NK.T.numpy(), rtol=2e-7, atol=0)
    if factor == "scale" and outputs > 1:  # nothing but the coarsest step is lost
        assert (np.abs(payload_KN) <= np.abs(payload_NK.T.numpy())).all()


@pytest.mark.parametrize("factor", ["scale", "shift"])
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.sampled_from([(2, 0), (3, 0), (0, 0), (64, 64)]), st.integers(0, 2**16))
def test_integers_are_found_again_where_rows_share_a_factor(factor, bits, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(7, 40, generator=generator) * torch.rand(7, 1, generator=generator)
    payload_NK, factors_F1 = block_quantize(weight_NK, bits, block, factor)
    rounded_NK = block_dequantize(payload_NK, factors_F1, block)
    found = integers_of_columns(rounded_NK.T.numpy())
    assert found is not None
    payload_KN, scale_N = found
    np.testing.assert_allclose(payload_KN * scale_N, rounded_NK.T.numpy(), rtol=2e-7, atol=0)
    assert (np.abs(payload_KN) <= np.abs(payload_NK.T.numpy())).all()


@pytest.mark.parametrize("largest", range(1, 128))
def test_any_integer_may_be_the_largest_of_a_column(largest):
    payload_K = np.array([0] * 40 + [1, -largest, largest // 2])
    found = integers_of_columns((payload_K * 0.0137).astype(np.float32)[:, None])
    assert found is not None
    assert found[0][:, 0].tolist() == payload_K.tolist()


def test_a_column_off_the_grid_has_no_integers():
    on_KN = np.array([[127.0, 64.0], [1.0, -2.0], [50.0, 3.0]], dtype=np.float32)
    assert integers_of_columns(on_KN) is not None
    on_KN[2, 1] += 0.3
    assert integers_of_columns(on_KN) is None


def test_columns_may_have_grids_of_different_kinds():
    real_K = np.array([3, -7, 1], dtype=np.float32) * np.float32(0.013)
    power_K = np.array([5, 90, -33], dtype=np.float32) * np.float32(2.0**-9)
    found = integers_of_columns(np.stack([real_K, power_K], axis=1))
    assert found is not None
    assert found[0].tolist() == [[3, 5], [-7, 90], [1, -33]]
    np.testing.assert_allclose(found[1], [0.013, 2.0**-9], rtol=1e-6)


def graph_model(onnx: Any, weights: dict[str, np.ndarray], table: np.ndarray | None = None) -> Any:
    """``x @ each weight``, stacked; x is looked up if there is a table."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [] if table is None else [helper.make_node("Gather", ["table", "ids"], ["x"])]
    nodes += [helper.make_node("MatMul", ["x", name], [f"of_{name}"]) for name in weights]
    nodes.append(helper.make_node("Concat", [f"of_{name}" for name in weights], ["y"], axis=-1))
    given = ("x", 1, ["B", next(iter(weights.values())).shape[0]]) if table is None else ("ids", 7, ["B"])
    held = {**weights, **({} if table is None else {"table": table})}
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(*given)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: Any, feed: dict[str, np.ndarray], tmp_path: Path) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def on_grid(inputs: int, outputs: int, most: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    payload = generator.integers(-most, most + 1, size=(inputs, outputs))
    payload[0] = most
    return (payload * generator.uniform(0.001, 1.0, size=outputs)).astype(np.float32)


def test_inputs_are_rounded_to_eight_bits_by_one_scale_and_nothing_else_is(onnx, tmp_path):
    weights = {"a": on_grid(12, 5, 127, seed=0), "b": on_grid(12, 3, 7, seed=1)}
    x = np.random.default_rng(2).normal(0.3, 2.0, size=(4, 12)).astype(np.float32)
    model = graph_model(onnx, weights)
    assert to_int8(model, "dynamic") == 2
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    expected = np.concatenate([rounded @ weight for weight in weights.values()], axis=1)
    np.testing.assert_allclose(run(model, {"x": x}, tmp_path), expected, rtol=1e-4, atol=1e-4)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 1  # both read the same input
    assert kinds.count("MatMulInteger") == 2
    assert {entry.data_type for entry in model.graph.initializer if len(entry.dims) == 2} == {3}  # int8


@pytest.mark.parametrize("layout", ["dynamic", "weights"])
def test_what_lies_on_no_grid_is_left_alone(onnx, tmp_path, layout):
    weights = {"a": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)}
    model = graph_model(onnx, weights)
    before = model.SerializeToString(deterministic=True)
    assert to_int8(model, layout) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_what_is_still_read_in_floating_point_is_listed(onnx):
    off = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    model = graph_model(
        onnx, {"on": on_grid(12, 5, 50, seed=0), "off": off}, on_grid(12, 9, 99, seed=3).T.copy()
    )
    assert [matrix.shape for matrix in left_in_fp32(model)] == [(12, 5), (12, 5), (9, 12)]
    assert to_int8(model, "dynamic") == 2
    left, scale = left_in_fp32(model)
    assert np.array_equal(left, off) and scale.shape == (9, 1)


def test_weights_alone_change_nothing(onnx, tmp_path):
    weights = {"a": on_grid(12, 5, 63, seed=0), "b": on_grid(12, 3, 7, seed=1)}
    table = on_grid(12, 9, 127, seed=3).T.copy()
    ids, model = np.array([0, 8, 3, 3]), graph_model(onnx, weights, table)
    expected = run(model, {"ids": ids}, tmp_path)
    assert to_int8(model, "weights") == 3
    np.testing.assert_allclose(run(model, {"ids": ids}, tmp_path), expected, rtol=1e-5, atol=1e-5)
    held = {entry.name: tuple(entry.dims) for entry in model.graph.initializer if entry.data_type == 3}
    assert held == {
        "a_int8": (12, 5), "a_int8_zero": (5,), "b_int8": (12, 3), "b_int8_zero": (3,), "table_int8": (9, 12)
    }  # fmt: skip


def test_a_table_is_looked_up_in_integers(onnx, tmp_path):
    weights, table = {"a": np.eye(6, dtype=np.float32) / 3}, on_grid(6, 9, 127, seed=3).T.copy()
    model = graph_model(onnx, weights, table)
    assert to_int8(model, "weights") == 2
    found = run(model, {"ids": np.array([7, 2])}, tmp_path)
    np.testing.assert_allclose(found, table[[7, 2]] / 3, rtol=1e-5)
    assert "table" not in {entry.name for entry in model.graph.initializer}


def test_a_weight_that_two_products_read_is_held_once(onnx, tmp_path):
    weight, x = on_grid(4, 4, 127, seed=0), np.ones((2, 4), dtype=np.float32)
    model = graph_model(onnx, {"a": weight})
    model.graph.node[0].output[0] = "twice"
    again = onnx.helper.make_node("MatMul", ["twice", "a"], ["of_a"])
    nodes = [model.graph.node[0], again, model.graph.node[1]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    expected = run(model, {"x": x}, tmp_path)
    assert to_int8(model, "weights") == 1
    np.testing.assert_allclose(run(model, {"x": x}, tmp_path), expected, rtol=1e-5)
    assert [node.op_type for node in model.graph.node].count("DequantizeLinear") == 1

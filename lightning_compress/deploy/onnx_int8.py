"""ONNX graphs in fp32 whose weights stand for integers, with those integers in the place of the weights.

No weight changes by it: a matrix is replaced if it lies on a grid of at most 8 bits for each column, or each row of a
table, and is left alone otherwise. So it does not matter how the exporter named, transposed or joined matrices.
``onnxruntime.quantization.quantize_dynamic`` writes the same nodes, but would round weights of fewer bits once more,
has one scale for all rows of a table, and quantises heads and what a token-dropping policy ranks by.

Two layouts, since each is fast in one runtime. ``"dynamic"``, for onnxruntime: DynamicQuantizeLinear, MatMulInteger and
scales, which it fuses; OpenVINO runs this slower than fp32. ``"weights"``, for OpenVINO: DequantizeLinear and MatMul;
onnxruntime makes products in blocks of 32 of this, about as slow as in fp32.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

__all__ = ["Int8Layout", "integers_of_columns", "left_in_fp32", "to_int8"]

Int8Layout = Literal["dynamic", "weights"]

_MOST = 127
"""Largest integer of 8 bits, symmetric."""
_SAMPLE = 16
"""Rows that a grid is tried on before it is tried on all."""
_ON_GRID = 1e-4
"""How far from an integer a weight may be, in steps of its grid: rounding of float32, times 127."""
_FLOAT = 1
"""What ONNX calls float32."""
_READERS = ("MatMul", "Gemm", "Gather", "Transpose")
"""Nodes that read weights of linears and tables."""


def to_int8(graph_model: Any, layout: Int8Layout) -> int:
    """Hold weights that stand for integers as int8, in place: right operands of MatMul, and tables of Gather.

    Args:
        graph_model: ``onnx.ModelProto`` in fp32.
        layout: How they are multiplied.

    Returns:
        How many weights are held in int8.
    """
    graph = graph_model.graph
    rewriter = _Rewriter(graph, layout)
    nodes = [new for node in graph.node for new in rewriter.of(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [entry for entry in graph.initializer if entry.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return sum(name is not None for name in rewriter.names.values())


def left_in_fp32(graph_model: Any) -> list[np.ndarray]:
    """Return the matrices that products and look-ups of an ONNX model read in fp32, scales of tables included."""
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

    graph = graph_model.graph
    read = {name for node in graph.node if node.op_type in _READERS for name in node.input}
    return [numpy_helper.to_array(entry) for entry in _matrices(graph) if entry.name in read]


def integers_of_columns(weight_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the integers and the scale of each column of a matrix, if it has such.

    The grid of a column is the coarsest that it lies on. Its largest weight may be any integer of 8 bits: columns whose
    scale came from a larger one need not have the largest.

    Args:
        weight_RC: The matrix, float32.

    Returns:
        int8 ``[R, C]`` and float32 ``[C]``; None if a column lies on no grid.

    Example:
        >>> integers_of_columns(np.array([[1.5, 0.2], [-3.5, 0.0], [0.5, -0.6]], dtype=np.float32))
        (array([[ 3,  1],
               [-7,  0],
               [ 1, -3]], dtype=int8), array([0.5, 0.2], dtype=float32))
    """
    wide_RC = weight_RC.astype(np.float64)
    amax_C = np.abs(wide_RC).max(axis=0)
    amax_C[amax_C == 0.0] = 1.0
    sample_RC = wide_RC[:: max(1, len(wide_RC) // _SAMPLE)]
    scale_C = np.zeros(len(amax_C))
    for most in range(1, _MOST + 1):
        step_C = amax_C / most
        open_C = np.flatnonzero((scale_C == 0.0) & _is_on_grid(sample_RC, step_C))
        on_C = open_C[_is_on_grid(wide_RC[:, open_C], step_C[open_C])]
        scale_C[on_C] = step_C[on_C]
    if not scale_C.all():
        return None
    return np.rint(wide_RC / scale_C).astype(np.int8), scale_C.astype(np.float32)


def _is_on_grid(wide_RC: np.ndarray, step_C: np.ndarray) -> np.ndarray:
    steps_RC = wide_RC / step_C
    return np.abs(steps_RC - np.rint(steps_RC)).max(axis=0) <= _ON_GRID


def _matrices(graph: Any) -> list[Any]:
    return [entry for entry in graph.initializer if len(entry.dims) == 2 and entry.data_type == _FLOAT]


class _Rewriter:
    """Replaces nodes that read weights by nodes that read integers."""

    def __init__(self, graph: Any, layout: Int8Layout) -> None:
        self.names: dict[str, str | None] = {}
        """Weight to its integers, beside which are ``_scale`` and, of columns, ``_zero``; None if it has none."""
        self._graph, self._layout = graph, layout
        self._weights = {entry.name: entry for entry in _matrices(graph)}
        self._written: set[str] = set()

    def of(self, node: Any) -> Iterator[Any]:
        """Yield what takes the place of a node."""
        is_product = node.op_type == "MatMul" and node.input[1] in self._weights
        is_lookup = node.op_type == "Gather" and node.input[0] in self._weights and _reads_rows(node)
        weight = node.input[1] if is_product else node.input[0] if is_lookup else None
        name = None if weight is None else self._integers(weight, by_column=is_product)
        if name is None:
            yield node
        elif is_lookup:
            yield from _looked_up(name, node.input[1], node.output[0])
        elif self._layout == "weights":
            yield from self._once(_written_out(name))
            yield _node("MatMul", [node.input[0], f"{name}_float"], node.output[0])
        else:
            yield from self._once(_rounded(node.input[0]))
            yield from _product(node.input[0], name, node.output[0])

    def _once(self, node: Any) -> Iterator[Any]:
        """Yield a node that several others read from."""
        if node.name not in self._written:
            self._written.add(node.name)
            yield node

    def _integers(self, weight: str, *, by_column: bool) -> str | None:
        if weight not in self.names:
            self.names[weight] = self._hold(weight, by_column)
        return self.names[weight]

    def _hold(self, weight: str, by_column: bool) -> str | None:
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

        matrix_RC, name = numpy_helper.to_array(self._weights[weight]), f"{weight}_int8"
        found = integers_of_columns(matrix_RC if by_column else matrix_RC.T)
        if found is None:
            return None
        payload, scale = found
        added = {name: payload, f"{name}_scale": scale, f"{name}_zero": np.zeros(len(scale), np.int8)}
        if not by_column:
            added = {name: payload.T.copy(), f"{name}_scale": scale[:, None]}
        self._graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in added.items())
        return name


def _reads_rows(gather: Any) -> bool:
    return all(attribute.i == 0 for attribute in gather.attribute if attribute.name == "axis")


def _rounded(x: str) -> Any:
    return _node("DynamicQuantizeLinear", [x], f"{x}_uint8", f"{x}_scale", f"{x}_zero")


def _product(x: str, name: str, out: str) -> Iterator[Any]:
    yield _node("MatMulInteger", [f"{x}_uint8", name, f"{x}_zero", f"{name}_zero"], f"{out}_int32")
    yield _node("Cast", [f"{out}_int32"], f"{out}_whole", to=_FLOAT)
    yield _node("Mul", [f"{x}_scale", f"{name}_scale"], f"{out}_step")
    yield _node("Mul", [f"{out}_whole", f"{out}_step"], out)


def _written_out(name: str) -> Any:
    return _node("DequantizeLinear", [name, f"{name}_scale", f"{name}_zero"], f"{name}_float", axis=1)


def _looked_up(name: str, ids: str, out: str) -> Iterator[Any]:
    yield _node("Gather", [name, ids], f"{out}_int8")
    yield _node("Gather", [f"{name}_scale", ids], f"{out}_scale")
    yield _node("Cast", [f"{out}_int8"], f"{out}_whole", to=_FLOAT)
    yield _node("Mul", [f"{out}_whole", f"{out}_scale"], out)


def _node(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> Any:
    from onnx import helper  # pyright: ignore[reportMissingImports]

    return helper.make_node(kind, inputs, outputs, name=f"{kind}_{outputs[0]}", **attributes)

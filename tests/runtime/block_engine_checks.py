"""What the engine of blocks gives where its operators are interpreted Triton kernels; prints what differs.

    TRITON_INTERPRET=1 python tests/runtime/block_engine_checks.py

A process of its own, because Triton decides at decoration time whether a kernel is interpreted.
"""

from __future__ import annotations

import json
from importlib import import_module

import torch
from torch import nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.runtime.block_linear import BlockEngine

PAIRS = (((1, 0), (1, 0)), ((1, 8), (1, 8)), ((8, 8), (1, 8)))


def run_by_kernels() -> None:
    """Gives the operators the kernels that they have on CUDA, on the processor too."""
    for name in ("block_quantize", "block_matmul"):
        kernel = import_module(f"lightning_compress.ops.{name}.triton_kernel")
        torch.library.impl(f"lightning_compress::{name}", "CPU", getattr(kernel, name))


def main() -> None:
    torch.manual_seed(0)
    x, expected = torch.randn(5, 24), {}
    for weight, inputs in PAIRS:
        for factor in ("scale", "shift"):
            formats = BlockFormat(8, weight, factor), BlockFormat(8, inputs, factor)
            layer = QuantizedLinear.from_linear(nn.Linear(24, 16), *formats)
            with torch.no_grad():
                expected[f"{weight}, {factor}"] = layer, layer(x)
    run_by_kernels()
    differing = []
    for name, (layer, y) in expected.items():
        rows, columns = layer.weight_format.block
        assert layer.bias is not None and layer.input_format is not None
        factors = layer.weight_factors.repeat_interleave(rows, 0)
        engine = BlockEngine(layer.weight_int8(), factors, layer.bias, columns, layer.input_format)
        with torch.no_grad():
            differing += [] if torch.equal(engine(x), y) else [name]
    print(json.dumps({"compared": len(expected), "differing": differing}))


if __name__ == "__main__":
    main()

"""The engine of blocks against products written out here, and by interpreted Triton kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.runtime.block_linear import BlockEngine
from tests.runtime.toys_engines import inputs, weight


def slow_products(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, factors_NG: torch.Tensor, edge: int
) -> torch.Tensor:
    """Round to integers, multiply and scale, block by block, in float64."""
    y_MN = torch.zeros(len(x_MK), len(weight_NK), dtype=torch.float64)
    for k, start in enumerate(range(0, x_MK.shape[1], edge)):
        block_MD = x_MK[:, start : start + edge].double()
        scale_M1 = block_MD.abs().amax(1, keepdim=True) / 127
        integers_MD = (block_MD / scale_M1).round().long()
        products_MN = integers_MD @ weight_NK[:, start : start + edge].long().T
        y_MN += products_MN.double() * scale_M1 * factors_NG[:, k].double()
    return y_MN


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("edge", [8, 12, 32])
def test_each_block_is_rounded_and_scaled_on_its_own(edge, rows):
    (weight_NK, _, bias_N), x_MK = weight(), inputs(rows, 32)
    factors_NG = torch.rand(48, -(-32 // edge), generator=torch.Generator().manual_seed(0))
    engine = BlockEngine(weight_NK, factors_NG, bias_N, edge, BlockFormat(block=(1, edge)))
    expected = slow_products(x_MK, weight_NK, factors_NG, edge) + bias_N
    torch.testing.assert_close(engine(x_MK).double(), expected, rtol=1e-5, atol=1e-2)


def test_no_rows_give_no_rows():
    weight_NK, scales_N, _ = weight()
    engine = BlockEngine(weight_NK, scales_N[:, None], None, 0, BlockFormat())
    assert engine(torch.empty(2, 0, 32)).shape == (2, 0, 48)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is published for Linux only")
def test_interpreted_triton_kernels_give_the_numbers_of_the_reference(pytestconfig, tmp_path: Path):
    root = str(pytestconfig.rootpath)
    cache = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-W", "error", "tests/runtime/block_engine_checks.py"],
        cwd=root,
        env=os.environ | cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"compared": 6, "differing": []}

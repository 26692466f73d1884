from types import ModuleType

import pytest
import torch

from tests.benchmark_scripts import load_benchmark


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    return load_benchmark("exits")


def test_a_share_of_the_batch_leaves_where_it_is_told_to(script: ModuleType) -> None:
    row = script.measured(script.exiting(torch.float32), 4, 3, [0.5], rounds=1)
    assert row.token_layers["0.5"] == pytest.approx((4 * 3 + 2 * 3) / (4 * 6))
    assert row.token_layers["each"] == pytest.approx((4 + 3 + 2 + 1 + 1 + 1) / (4 * 6))
    assert row.check_ms > 0 and set(row.times) == {"0.5", "each"}
    assert row.breaks_even == pytest.approx(row.check_ms / (row.off_ms / 6))


def test_a_single_text_is_only_asked(script: ModuleType) -> None:
    row = script.measured(script.exiting(torch.float32), 1, 3, [0.5], rounds=1)
    assert row.times == row.token_layers == {} and row.check_ms > 0

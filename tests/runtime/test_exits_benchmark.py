import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "exits.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, imported from its file."""
    spec = importlib.util.spec_from_file_location("exits_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # data classes look their module up
    spec.loader.exec_module(module)
    return module


def test_a_share_of_the_batch_leaves_where_it_is_told_to(script: ModuleType) -> None:
    row = script.measured(script.exiting(torch.float32), 4, 3, [0.5], rounds=1)
    assert row.token_layers["0.5"] == pytest.approx((4 * 3 + 2 * 3) / (4 * 6))
    assert row.token_layers["each"] == pytest.approx((4 + 3 + 2 + 1 + 1 + 1) / (4 * 6))
    assert row.check_ms > 0 and set(row.times) == {"0.5", "each"}
    assert row.breaks_even == pytest.approx(row.check_ms / (row.off_ms / 6))


def test_a_single_text_is_only_asked(script: ModuleType) -> None:
    row = script.measured(script.exiting(torch.float32), 1, 3, [0.5], rounds=1)
    assert row.times == row.token_layers == {} and row.check_ms > 0

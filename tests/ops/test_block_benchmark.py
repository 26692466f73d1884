"""The benchmark of the operators of blocks runs, and times nothing that is wrong."""

import pytest
import torch

from tests.benchmark_scripts import load_benchmark

script = load_benchmark("block_ops")


def test_it_prints_rows_for_each_case(capsys: pytest.CaptureFixture[str]):
    arguments = ["--rows", "2", "3", "--layers", "6x4", "--blocks", "row", "32x32", "--rounds", "2"]
    script.main([*arguments, "--threads", str(torch.get_num_threads())])
    printed = capsys.readouterr().out
    assert (printed.count("2 × 6 × 4"), printed.count("3 × 6 × 4")) == (1, 1)
    assert (printed.count("row scale"), printed.count("32x32 shift")) == (6, 6)


@pytest.mark.parametrize("what", ["quantise", "dequantise", "multiply"])
def test_what_differs_from_the_reference_is_not_timed(what: str):
    calls = script.Case(3, 6, 4, "1x32", "shift").calls("cpu")[what]
    script.check(calls)
    made = calls["operator"]()
    wrong = made + 1 if isinstance(made, torch.Tensor) else (made[0], made[1] + 1)
    with pytest.raises(RuntimeError, match="the operator: not what the reference gives"):
        script.check(calls | {"operator": lambda: wrong})

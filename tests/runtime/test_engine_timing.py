import time

import pytest
import torch

from lightning_compress.runtime.engine_timing import BackendReport, Timing, fastest, time_engines


def test_the_least_mean_time_wins():
    # geometric means: 2 against sqrt(3)
    assert fastest({"int8": (1.0, 4.0), "bf16": (1.0, 3.0)}) == "bf16"


def test_the_first_of_those_that_are_almost_equal_wins():
    assert fastest({"int8": (1.04,), "bf16": (1.0,), "fp32": (0.999,)}) == "int8"
    assert fastest({"int8": (1.06,), "bf16": (1.0,)}) == "bf16"


def test_nothing_to_choose_from_is_an_error():
    with pytest.raises(ValueError, match="nothing was measured"):
        fastest({})


def test_engines_are_called_with_rows_as_they_are_in_use():
    seen: set[tuple[tuple[int, ...], torch.dtype, bool]] = set()

    def engine(x: torch.Tensor) -> torch.Tensor:
        seen.add((tuple(x.shape), x.dtype, torch.is_grad_enabled()))
        return x

    like = torch.empty(0, dtype=torch.bfloat16)
    seconds = time_engines({"fp32": [engine]}, 6, (1, 9), like)
    assert seen == {((1, 6), torch.bfloat16, False), ((9, 6), torch.bfloat16, False)}
    assert len(seconds["fp32"]) == 2 and min(seconds["fp32"]) > 0


def test_layers_are_called_one_after_the_other_and_backends_in_turns():
    called: list[str] = []

    def engine(name: str):
        return lambda x: called.append(name) or x

    time_engines({"int8": [engine("a"), engine("b")], "bf16": [engine("c")]}, 4, (2,), torch.empty(0))
    assert called[:6] == ["a", "b", "c", "a", "b", "c"]


def test_what_takes_longer_is_measured_as_longer():
    def slow(x: torch.Tensor) -> torch.Tensor:
        started = time.thread_time()
        while time.thread_time() < started + 0.002:
            pass
        return x

    seconds = time_engines({"int8": [slow], "bf16": [lambda x: x]}, 4, (2,), torch.empty(0))
    assert seconds["int8"][0] >= 0.002
    assert fastest(seconds) == "bf16"


def test_the_report_says_what_was_chosen_and_why():
    timing = Timing(8, 24, (1, 16), {"int8": (1e-6, 2e-6), "bf16": (3e-6, 4e-6)}, "int8")
    report = BackendReport({"a": "int8", "b": "int8", "c": "bf16"}, torch.bfloat16, [timing])
    assert str(report).splitlines() == [
        "backends of 3 quantised linears: int8 for 2, bf16 for 1; bfloat16 between operators",
        "  8 -> 24: int8 (microseconds at 1/16 rows: int8 1/2, bf16 3/4)",
    ]

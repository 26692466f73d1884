"""The benchmark of the operator runs, and times nothing that is wrong."""

import pytest
import torch

from benchmarks import compact as script


def test_it_prints_a_row_for_each_case(capsys: pytest.CaptureFixture[str]):
    arguments = ["--sequences", "1", "2", "--length", "4", "--widths", "6", "--rounds", "2"]
    script.main([*arguments, "--threads", str(torch.get_num_threads())])
    printed = capsys.readouterr().out
    assert "4 × 6, 50%" in printed and "8 × 6, 50%" in printed


@pytest.mark.parametrize("wrong", ["rows", "offsets", "index", "gradient"])
def test_what_differs_from_the_reference_is_not_timed(wrong: str):
    tensors = script.Case(2, 6, 3, 0.5).tensors(torch.float32, "cpu")

    def spoiled(hidden, keep, cu_seqlens):
        kept, offsets, index = script.by_index(hidden, keep, cu_seqlens)
        return {
            "rows": (kept + 1, offsets, index),
            "offsets": (kept, offsets + 1, index),
            "index": (kept, offsets, index + 1),
            "gradient": (kept + (hidden.sum() - hidden.sum().detach()), offsets, index),
        }[wrong]

    with pytest.raises(RuntimeError, match=f"^{wrong}: not what the reference gives"):
        script.check(spoiled, tensors)
    script.check(script.by_mask, tensors)

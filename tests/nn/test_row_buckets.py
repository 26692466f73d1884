import pytest
import torch

from lightning_compress.nn.row_buckets import bucket_of, with_spare_rows


def low(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buckets_hold_the_rows_and_waste_little(dtype):
    for rows in range(1, 5000, 7):
        size = bucket_of(rows, low(dtype))
        assert rows <= size
        assert size - rows < max(16, rows / 16)
        assert bucket_of(size, low(dtype)) == size


def test_few_sizes_serve_all_batches():
    assert len({bucket_of(rows, low()) for rows in range(1, 16385)}) == 32 + 5 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_needs_no_spare_rows(dtype):
    rows = torch.ones(37, 2, dtype=dtype)
    assert bucket_of(37, rows) == 37
    assert with_spare_rows(rows) is rows


def test_autocast_counts_by_what_it_computes_in():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bucket_of(37, low(torch.float32)) == 48


def test_spare_rows_are_zeros_after_the_rows():
    rows = torch.ones(20, 3, dtype=torch.bfloat16)
    filled = with_spare_rows(rows)
    assert filled.shape == (32, 3)
    assert torch.equal(filled[:20], rows)
    assert filled[20:].abs().max() == 0


def test_no_rows_and_full_buckets_stay_as_they_are():
    assert with_spare_rows(torch.ones(0, 3, dtype=torch.bfloat16)).shape == (0, 3)
    full = torch.ones(48, 3, dtype=torch.bfloat16)
    assert with_spare_rows(full) is full

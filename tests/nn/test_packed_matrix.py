import copy

import pytest
import torch

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.packed_matrix import PackedMatrix
from tests.nn.toys_blocks import rounded_slowly

FORMATS = [
    BlockFormat(bits, block, factor)
    for bits in (3, 4, 8)
    for block in ((1, 0), (0, 0), (2, 3), (1, 2))
    for factor in ("scale", "shift")
]


def stored(weight_RC: torch.Tensor, held: BlockFormat) -> PackedMatrix:
    matrix = PackedMatrix(*weight_RC.shape, held)
    matrix.store(weight_RC)
    return matrix


@pytest.mark.parametrize("held", FORMATS, ids=str)
def test_a_matrix_is_held_to_the_nearest_numbers_of_each_block(held):
    weight_RC = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    matrix = stored(weight_RC, held)
    dequantized_RC = matrix.dequantized_weight()
    assert dequantized_RC.dtype == torch.float32
    torch.testing.assert_close(dequantized_RC.double(), rounded_slowly(weight_RC, held), rtol=1e-6, atol=1e-7)
    assert matrix.weight_int8().abs().max() <= held.largest
    assert matrix.storage_bytes * 8 == held.storage_bits((5, 7))
    assert matrix.kept_parameters == 35


def test_rows_with_one_factor_tell_it_as_a_number():
    weight_RC = torch.tensor([[127.0, 1.0], [0.5, -63.5]])
    assert stored(weight_RC, BlockFormat(8)).row_scales().tolist() == [1.0, 0.5]
    shifts = stored(weight_RC, BlockFormat(8, factor="shift"))
    assert shifts.row_scales().tolist() == [1.0, 0.5] and shifts.weight_factors.tolist() == [[0], [-1]]
    assert stored(weight_RC, BlockFormat(8, (1, 1))).row_scales() is None
    assert stored(weight_RC, BlockFormat(8, (0, 0))).row_scales() is None


@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_casts_change_neither_integers_nor_factors(factor):
    matrix = stored(torch.randn(4, 6), BlockFormat(4, (2, 2), factor))
    before = {name: tensor.clone() for name, tensor in matrix.state_dict().items()}
    for cast in (matrix.bfloat16(), matrix.half(), matrix.double(), copy.deepcopy(matrix)):
        after = cast.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}


def test_the_state_goes_into_a_blank_and_gives_the_same_matrix():
    held = BlockFormat(4, (2, 2), "shift")
    matrix, blank = stored(torch.randn(3, 5), held), PackedMatrix(3, 5, held, device="meta")
    assert all(buffer.is_meta for buffer in blank.buffers()) and not list(blank.parameters())
    blank.load_state_dict(matrix.state_dict(), assign=True)
    assert torch.equal(blank.dequantized_weight(), matrix.dequantized_weight())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_factors_keep_their_dtype_whatever_is_loaded(factor, assign):
    matrix = stored(torch.randn(4, 6), BlockFormat(8, (1, 0), factor))
    before = matrix.dequantized_weight()
    state = {
        name: tensor.bfloat16() if "factors" in name else tensor
        for name, tensor in matrix.state_dict().items()
    }
    matrix.load_state_dict(state, assign=assign)
    assert matrix.weight_factors.dtype == (torch.float32 if factor == "scale" else torch.int8)
    torch.testing.assert_close(matrix.dequantized_weight(), before, rtol=2**-8, atol=0.0)


def test_other_shapes_and_infinities_are_refused():
    matrix = PackedMatrix(2, 3, BlockFormat())
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        matrix.store(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="finite"):
        matrix.store(torch.full((2, 3), torch.inf))

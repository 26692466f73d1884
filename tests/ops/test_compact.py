"""The operator keeps the right rows, moves the offsets with them, and is an honest citizen of torch.library."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from lightning_compress.ops.compact import compact, reference

OPERATOR = torch.ops.lightning_compress.compact.default


def slowly(
    hidden: Tensor, keep: Tensor, cu_seqlens: Tensor
) -> tuple[list[list[float]], list[int], list[int]]:
    """Sequence by sequence and row by row, in Python."""
    rows, offsets, index = [], [0], []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for row in range(start, end):
            if keep[row]:
                rows.append(hidden[row].tolist())
                index.append(row)
        offsets.append(len(rows))
    return rows, offsets, index


def example(
    lengths: list[int], width: int = 3, dtype: torch.dtype = torch.float32, offsets: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=offsets)
    num_rows = sum(lengths)
    return torch.randn(num_rows, width).to(dtype), torch.rand(num_rows) < 0.5, cu_seqlens


def test_it_keeps_what_a_hand_keeps():
    hidden = torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]])
    keep = torch.tensor([True, False, True, False, True])
    kept, offsets, index = compact(hidden, keep, torch.tensor([0, 2, 5]))
    assert kept.tolist() == [[0.0, 0.5], [2.0, 2.5], [4.0, 4.5]]
    assert offsets.tolist() == [0, 1, 3]
    assert index.tolist() == [0, 2, 4]


def test_a_sequence_that_leaves_has_no_rows_from_then_on():
    hidden, _, cu_seqlens = example([2, 3, 1])
    keep = torch.tensor([True, True, False, False, False, True])
    kept, offsets, index = compact(hidden, keep, cu_seqlens)
    assert offsets.tolist() == [0, 2, 2, 3] and index.tolist() == [0, 1, 5]
    again, offsets, index = compact(kept, torch.tensor([False, True, True]), offsets)
    assert offsets.tolist() == [0, 1, 1, 2] and index.tolist() == [1, 2]
    assert torch.equal(again, hidden[[1, 5]])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [4, 0, 3]])
@pytest.mark.parametrize("stays", [True, False])
def test_all_or_none_may_stay_of_any_number_of_rows(lengths: list[int], stays: bool):
    hidden, keep, cu_seqlens = example(lengths)
    kept, offsets, index = compact(hidden, torch.full_like(keep, stays), cu_seqlens)
    assert torch.equal(kept, hidden if stays else hidden[:0])
    assert torch.equal(offsets, cu_seqlens if stays else torch.zeros_like(cu_seqlens))
    assert index.tolist() == (list(range(sum(lengths))) if stays else [])


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=7),
    width=st.integers(0, 5),
    offsets=st.sampled_from([torch.int32, torch.int64]),
    data=st.data(),
)
def test_it_equals_a_slow_loop(lengths: list[int], width: int, offsets: torch.dtype, data: st.DataObject):
    hidden, _, cu_seqlens = example(lengths, width, offsets=offsets)
    leaves = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)), label="leaves")
    flags = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)), label="flags")
    stays = [not leaves[i] for i, length in enumerate(lengths) for _ in range(length)]
    keep = torch.tensor([a and b for a, b in zip(flags, stays, strict=True)], dtype=torch.bool)
    kept, moved, index = compact(hidden, keep, cu_seqlens)
    assert (kept.tolist(), moved.tolist(), index.tolist()) == slowly(hidden, keep, cu_seqlens)
    assert kept.shape[1] == width and moved.dtype == offsets and index.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["transposed", "wide", "every other"])
def test_rows_of_any_dtype_and_strides_are_kept_bit_for_bit(dtype: torch.dtype, layout: str):
    _, keep, cu_seqlens = example([5, 6], offsets=torch.int32)
    hidden = {
        "transposed": torch.randn(3, 11).t(),
        "wide": torch.randn(11, 9)[:, 2:5],
        "every other": torch.randn(22, 6)[::2, ::2],
    }[layout].to(dtype)
    kept, moved, index = compact(hidden, keep, cu_seqlens)
    assert (kept.tolist(), moved.tolist(), index.tolist()) == slowly(hidden, keep, cu_seqlens)
    assert kept.dtype == dtype and kept.is_contiguous()


def test_decisions_and_offsets_may_have_strides():
    hidden = torch.randn(4, 2)
    keep = torch.tensor([[True, False], [False, True], [True, True], [True, False]])[:, 0]
    cu_seqlens = torch.tensor([[0, 7], [3, 7], [4, 7]])[:, 0]
    kept, moved, index = compact(hidden, keep, cu_seqlens)
    assert (kept.tolist(), moved.tolist(), index.tolist()) == slowly(hidden, keep, cu_seqlens)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("lengths", [[], [3], [2, 0, 6]])
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
def test_torch_finds_nothing_wrong_with_the_operator(
    lengths: list[int], requires_grad: bool, offsets: torch.dtype
):
    hidden, keep, cu_seqlens = example(lengths, offsets=offsets)
    opcheck(OPERATOR, (hidden.requires_grad_(requires_grad), keep, cu_seqlens))
    opcheck(OPERATOR, (hidden.detach(), torch.zeros_like(keep), cu_seqlens))


@pytest.mark.parametrize("lengths", [[1], [2, 0, 5]])
def test_the_gradient_is_that_of_finite_differences(lengths: list[int]):
    hidden, keep, cu_seqlens = example(lengths, dtype=torch.float64)
    keep[0] = True
    hidden = hidden.t().contiguous().t().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: compact(rows, keep, cu_seqlens)[0], hidden)
    assert torch.autograd.gradgradcheck(lambda rows: compact(rows, keep, cu_seqlens)[0].sin(), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_goes_back_to_where_the_rows_came_from(dtype: torch.dtype):
    hidden, _, cu_seqlens = example([2, 2], dtype=dtype)
    kept, offsets, index = compact(
        hidden.requires_grad_(), torch.tensor([False, True, False, True]), cu_seqlens
    )
    assert not offsets.requires_grad and not index.requires_grad
    (kept * torch.tensor([[2.0], [3.0]], dtype=dtype)).sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    assert hidden.grad.tolist() == [[0.0] * 3, [2.0] * 3, [0.0] * 3, [3.0] * 3]


def test_nothing_flows_back_where_nothing_stays():
    hidden, keep, cu_seqlens = example([3])
    kept, _, _ = compact(hidden.requires_grad_(), torch.zeros_like(keep), cu_seqlens)
    kept.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(3, 3))


def twice(hidden: Tensor, keep: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drops by the decisions given, then by what the rows say: its sizes depend on the data, twice."""
    kept, offsets, first = compact(hidden, keep, cu_seqlens)
    kept, offsets, second = compact(kept * 2, kept[:, 0] > 0, offsets)
    return kept.sin(), offsets, first[second]


@pytest.mark.parametrize("backend", ["counter", "inductor"])
def test_it_compiles_into_one_graph_whatever_the_number_of_rows(backend: str):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        twice, fullgraph=True, dynamic=True, backend=counter if backend == "counter" else "inductor"
    )
    for lengths in ([4, 5], [9, 0], [3, 30]):
        hidden, keep, cu_seqlens = example(lengths)
        ours, theirs = hidden.requires_grad_(), hidden.detach().clone().requires_grad_()
        expected, found = twice(theirs, keep, cu_seqlens), compiled(ours, keep, cu_seqlens)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[0], expected[0])
        found[0].sum().backward()
        expected[0].sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert backend == "inductor" or counter.frame_count == 1


def test_a_compiled_program_checks_the_number_of_decisions():
    torch.compiler.reset()
    compiled = torch.compile(compact, fullgraph=True, dynamic=True, backend="eager")
    hidden, keep, cu_seqlens = example([4])
    compiled(hidden, keep, cu_seqlens)
    with pytest.raises(RuntimeError):
        compiled(hidden, keep[:3], cu_seqlens)


def test_it_is_exported():
    class Dropping(torch.nn.Module):
        def forward(self, hidden: Tensor, keep: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return compact(hidden, keep, cu_seqlens)

    rows = torch.export.Dim("rows")
    exported = torch.export.export(
        Dropping(), example([4, 5]), dynamic_shapes=({0: rows}, {0: rows}, None)
    ).module()
    arguments = example([2, 11])
    for found, expected in zip(exported(*arguments), reference.compact(*arguments), strict=True):
        assert torch.equal(found, expected)


def test_wrong_arguments_are_named():
    hidden, keep, cu_seqlens = example([2, 2])
    with pytest.raises(TypeError, match=r"keep_N is torch\.int64: give bool"):
        compact(hidden, keep.long(), cu_seqlens)
    with pytest.raises(TypeError, match=r"cu_seqlens_B1 is torch\.float32: give int32 or int64"):
        compact(hidden, keep, cu_seqlens.float())
    with pytest.raises(ValueError, match=r"shaped \(2, 2, 3\), \(4,\), \(3,\): give \[N, D\]"):
        compact(hidden.view(2, 2, 3), keep, cu_seqlens)
    with pytest.raises(ValueError, match="4 rows but 3 decisions"):
        compact(hidden, keep[:3], cu_seqlens)
    with pytest.raises(ValueError, match="offsets, tensor"):
        compact(hidden, keep, cu_seqlens[:0])
    with pytest.raises(ValueError, match="on cpu, meta and cpu"):
        compact(hidden, keep.to("meta"), cu_seqlens)

"""Floats that stand for integers are equal to the integers, and gradients pass as if nothing had been rounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.fake_quantize import fake_block_matmul, fake_quantize
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_quantize import block_quantize

BLOCKS = [(1, 0), (0, 0), (2, 3), (1, 4), (32, 32), (3, 1)]
KINDS = ["normal", "zeros", "some zero", "constant", "outliers", "tiny"]


def matrix(rows: int, columns: int, seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    some = torch.rand(rows, columns, generator=generator) < 0.3
    return {
        "normal": x,
        "zeros": torch.zeros_like(x),
        "some zero": torch.where(some, 0.0, x),
        "constant": torch.full_like(x, -1.7),
        "outliers": torch.where(some, x * 1e8, x),
        "tiny": x * 1e-12,
    }[kind]


def integer_product(
    a: Tensor, b: Tensor, a_form: BlockFormat, b_form: BlockFormat, bias: Tensor | None, guard_bits: int
) -> Tensor:
    a_made = block_quantize(a, a_form.bits, a_form.block, a_form.factor)
    b_made = block_quantize(b, b_form.bits, b_form.block, b_form.factor)
    return block_matmul(*a_made, *b_made, bias, a_form.block, b_form.block, a_form.factor, guard_bits)


def test_elements_are_those_worked_by_hand():
    x = torch.tensor([[1.0, -2.5, 0.6], [14.0, 6.0, -5.0]])
    # qmax 7: exponents -1 and 1, halves to even
    expected = [[1.0, -2.5, 0.5], [14.0, 6.0, -4.0]]
    assert fake_quantize(x, BlockFormat(4, (1, 0), "shift")).tolist() == expected


@settings(deadline=None, max_examples=80)
@given(
    bits=st.integers(2, 8),
    block=st.sampled_from(BLOCKS),
    factor=st.sampled_from(["scale", "shift"]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_floats_hold_the_integers(bits: int, block: tuple[int, int], factor: str, kind: str, seed: int):
    x, form = matrix(4, 7, seed, kind), BlockFormat(bits, block, factor)  # type: ignore[arg-type]
    held = fake_quantize(x, form)
    assert torch.equal(held, block_dequantize(*block_quantize(x, bits, block, factor), block))
    if factor == "shift":
        assert torch.equal(fake_quantize(held, form), held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_stays_and_the_gradient_passes(dtype: torch.dtype):
    x = torch.randn(2, 3, 5).to(dtype).requires_grad_()
    weight = torch.randn(2, 3, 5).to(dtype)
    held = fake_quantize(x, BlockFormat(4, (1, 2), "shift"))
    assert held.dtype == dtype and torch.equal(
        held.float(), fake_quantize(x.float(), BlockFormat(4, (1, 2), "shift"))
    )
    (held * weight).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and torch.equal(x.grad, weight)


@settings(deadline=None, max_examples=120)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    blocks=st.sampled_from(
        [((1, 0), (1, 0)), ((1, 4), (4, 4)), ((2, 3), (1, 3)), ((0, 0), (1, 2)), ((1, 4), (0, 0))]
    ),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    bias=st.sampled_from([None, 1.0, 1e12]),
    guard_bits=st.sampled_from([0, 6, 16]),
    seed=st.integers(0, 2**31),
)
def test_with_powers_of_two_products_are_those_of_integers_bit_for_bit(
    shape: tuple[int, int, int],
    bits: tuple[int, int],
    blocks: tuple,
    kinds: tuple[str, str],
    bias: float | None,
    guard_bits: int,
    seed: int,
):
    rows, outputs, depth = shape
    a, b = matrix(rows, depth, seed, kinds[0]), matrix(outputs, depth, seed + 1, kinds[1])
    a_form, b_form = BlockFormat(bits[0], blocks[0], "shift"), BlockFormat(bits[1], blocks[1], "shift")
    added = None if bias is None else torch.randn(outputs) * bias
    found = fake_block_matmul(a, b, a_form, b_form, added, guard_bits)
    assert torch.equal(found, integer_product(a, b, a_form, b_form, added, guard_bits))


@pytest.mark.parametrize("block", [(1, 0), (1, 1500), (1, 64)])
def test_long_sums_are_those_of_integers_too(block: tuple[int, int]):
    a, b = (1.98 - torch.rand(rows, 3000) / 9 for rows in (9, 11))  # 120 times 1/64: sums beyond float32
    form = BlockFormat(8, block, "shift")
    assert torch.equal(fake_block_matmul(a, b, form, form), integer_product(a, b, form, form, None, 6))


@pytest.mark.parametrize("block", BLOCKS)
def test_with_scales_products_are_those_of_integers_to_rounding(block: tuple[int, int]):
    a, b, bias, form = (
        torch.randn(2, 4, 9),
        torch.randn(2, 5, 9),
        torch.randn(5),
        BlockFormat(8, block, "scale"),
    )
    found = fake_block_matmul(a, b, form, form, bias)
    torch.testing.assert_close(found, integer_product(a, b, form, form, bias, 6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_gradients_are_those_of_the_product_of_what_is_held(factor: str, leading: tuple[int, ...]):
    a_form, b_form = BlockFormat(8, (1, 4), factor), BlockFormat(4, (4, 4), factor)  # type: ignore[arg-type]
    a, b, bias = torch.randn(*leading, 3, 9), torch.randn(*leading, 5, 9), torch.randn(5)
    ours = [tensor.clone().requires_grad_() for tensor in (a, b, bias)]
    held = [fake_quantize(a, a_form), fake_quantize(b, b_form), bias.clone()]
    theirs = [tensor.requires_grad_() for tensor in held]
    weight = torch.randn(*leading, 3, 5)
    (fake_block_matmul(ours[0], ours[1], a_form, b_form, ours[2]) * weight).sum().backward()
    ((theirs[0] @ theirs[1].mT + theirs[2]) * weight).sum().backward()
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_aligning_exponents_takes_no_memory_for_every_pair_of_blocks():
    a, b, held = torch.randn(512, 512), torch.randn(512, 512), BlockFormat(8, (1, 16), "shift")
    profile = torch.profiler.profile(profile_memory=True)
    with profile:
        fake_block_matmul(a, b, held, held)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 512 * 512 * 16


@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_autocast_changes_no_product(factor: str):
    form = BlockFormat(8, (1, 4), factor)  # type: ignore[arg-type]
    a, b = torch.randn(3, 8), torch.randn(4, 8)
    expected = fake_block_matmul(a, b, form, form)
    with torch.autocast("cpu", torch.bfloat16):
        found = fake_block_matmul(a, b, form, form)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_bfloat16_operands_get_bfloat16_gradients():
    form = BlockFormat(8, (1, 0), "shift")
    a, b, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((3, 8), (4, 8), (4,)))
    fake_block_matmul(a, b, form, form, bias).sum().backward()
    assert [tensor.grad is not None and tensor.grad.dtype for tensor in (a, b, bias)] == [torch.bfloat16] * 3


def test_training_through_it_finds_weights():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    aim = x @ torch.randn(4, 8, generator=generator).T
    weight, form = torch.zeros(4, 8, requires_grad=True), BlockFormat(8, (1, 0), "shift")
    optimizer, losses = torch.optim.Adam([weight], lr=0.1), []
    for _ in range(60):
        loss = (fake_block_matmul(x, weight, form, form) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # the compiler does that
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_it_compiles_into_one_graph(factor: str):
    torch.compiler.reset()
    form = BlockFormat(8, (1, 4), factor)  # type: ignore[arg-type]

    def product(a: Tensor, b: Tensor) -> Tensor:
        return fake_block_matmul(fake_quantize(a, form).sin(), b, form, form)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    a, b = torch.randn(3, 8), torch.randn(4, 8)
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    found, expected = compiled(ours, b), product(theirs, b)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_wrong_arguments_are_named():
    a, form = torch.randn(3, 8), BlockFormat(8, (1, 4), "shift")
    with pytest.raises(ValueError, match="'shift' and 'scale': give both formats the same"):
        fake_block_matmul(a, a, form, BlockFormat())
    with pytest.raises(ValueError, match="blocks have 4 and 3 columns, of 8"):
        fake_block_matmul(a, a, form, BlockFormat(8, (1, 3), "shift"))
    with pytest.raises(ValueError, match="guard_bits=-1 is not from 0 to 16"):
        fake_block_matmul(a, a, form, form, guard_bits=-1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fake_quantize(a + torch.nan, form)

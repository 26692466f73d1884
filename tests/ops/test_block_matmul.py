"""The product of integers in blocks is that of whole numbers, and torch finds nothing wrong with the operator."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_matmul import block_matmul, reference
from lightning_compress.ops.block_quantize import block_quantize

OPERATOR = torch.ops.lightning_compress.block_matmul.default
BLOCKS = [
    ((1, 0), (1, 0)),
    ((1, 4), (4, 4)),
    ((1, 4), (1, 4)),
    ((2, 3), (3, 3)),
    ((0, 0), (1, 5)),
    ((1, 2), (0, 0)),
]


def slowly(
    a: Tensor, ea: Tensor, b: Tensor, eb: Tensor, bias: Tensor | None, blocks: tuple, guard_bits: int
) -> Tensor:
    """Output by output, in whole numbers and fractions; exponents only."""
    (ra, ka), (rb, kb) = blocks
    depth = a.shape[1]
    ra, ka, rb, kb = ra or len(a), ka or depth, rb or len(b), kb or depth
    out = torch.empty(len(a), len(b))
    for m in range(len(a)):
        for n in range(len(b)):
            products: dict[tuple[int, int], int] = {}
            for k in range(depth):
                products.setdefault((k // ka, k // kb), 0)
                products[k // ka, k // kb] += int(a[m, k]) * int(b[n, k])
            shifts = {at: int(ea[m // ra, at[0]]) + int(eb[n // rb, at[1]]) for at in products}
            largest = max(shifts.values())
            if bias is not None:
                while abs(Fraction(float(bias[n]))) * 2**guard_bits >= 2**30 * Fraction(2) ** largest:
                    largest += 1
            total = sum(
                round(Fraction(p) * 2**guard_bits / Fraction(2) ** (largest - shifts[at]))
                for at, p in products.items()
            )
            if bias is not None:
                total += round(Fraction(float(bias[n])) * 2**guard_bits / Fraction(2) ** largest)
            out[m, n] = float(torch.tensor(total)) * 2.0 ** (largest - guard_bits)
    return out


def operands(
    shape: tuple[int, int, int],
    blocks: tuple,
    seed: int,
    bits: int = 8,
    factor: str = "shift",
    spread: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrices whose elements differ in size by a lot, quantised."""
    generator = torch.Generator().manual_seed(seed)
    rows, outputs, depth = shape
    made = []
    for size, block in ((rows, blocks[0]), (outputs, blocks[1])):
        spreads = torch.exp(spread * torch.randn(size, depth, generator=generator))
        made += block_quantize(torch.randn(size, depth, generator=generator) * spreads, bits, block, factor)
    return tuple(made)  # type: ignore[return-value]


def test_products_are_those_worked_by_hand():
    a, b = torch.tensor([[3, 1, 5]], dtype=torch.int8), torch.tensor([[2, -5, 7]], dtype=torch.int8)
    ea, eb = torch.tensor([[0, -3]], dtype=torch.int8), torch.tensor([[1, 0]], dtype=torch.int8)
    # blocks of two: p = 6 - 5 = 1 at exponent 1, and 35 at -3. Aligned to 1 without guard bits: 1 + round(35 / 16) = 3
    assert block_matmul(a, ea, b, eb, None, (1, 2), (1, 2), "shift", guard_bits=0).tolist() == [[6.0]]
    # with 3: 8 + round(35 / 2 = 17.5, to even: 18) = 26, at exponent -2
    assert block_matmul(a, ea, b, eb, None, (1, 2), (1, 2), "shift", guard_bits=3).tolist() == [[6.5]]
    # with 4: 16 + 35 = 51 at -3; the bias 0.3 is round(2.4) = 2 there
    bias = torch.tensor([0.3])
    assert block_matmul(a, ea, b, eb, bias, (1, 2), (1, 2), "shift", guard_bits=4).tolist() == [[53 / 8]]
    # real factors: 1 * 0.5 * 2 + 35 * 0.25 * 4, plus 1
    sa, sb = torch.tensor([[0.5, 0.25]]), torch.tensor([[2.0, 4.0]])
    assert block_matmul(a, sa, b, sb, torch.ones(1), (1, 2), (1, 2), "scale").tolist() == [[37.0]]


@settings(deadline=None, max_examples=120)
@given(
    rows=st.integers(1, 4),
    outputs=st.integers(1, 4),
    depth=st.integers(1, 9),
    bits=st.integers(2, 8),
    blocks=st.sampled_from(BLOCKS),
    guard_bits=st.sampled_from([0, 3, 6, 16]),
    bias=st.sampled_from([None, 0.0, 1.0, 1e-20, 1e9, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_with_exponents_it_equals_a_slow_loop_over_whole_numbers(
    rows: int,
    outputs: int,
    depth: int,
    bits: int,
    blocks: tuple,
    guard_bits: int,
    bias: float | None,
    seed: int,
):
    made = operands((rows, outputs, depth), blocks, seed, bits)
    added = None if bias is None else torch.randn(outputs) * bias
    found = block_matmul(*made, added, *blocks, "shift", guard_bits)
    assert torch.equal(found, slowly(*made, added, blocks, guard_bits))


@pytest.mark.parametrize("exponent", [-32, 31])
@pytest.mark.parametrize("guard_bits", [0, 16])
def test_exponents_may_be_the_smallest_and_the_largest(exponent: int, guard_bits: int):
    a, b = torch.tensor([[3]], dtype=torch.int8), torch.tensor([[-5]], dtype=torch.int8)
    both = torch.tensor([[exponent]], dtype=torch.int8)
    found = block_matmul(a, both, b, both, None, (1, 0), (1, 0), "shift", guard_bits)
    assert found.item() == -15 * 2.0 ** (2 * exponent)


def test_a_bias_is_below_two_to_the_thirtieth_and_not_below_the_twenty_ninth():
    bias = torch.tensor([1.0, -0.75, 1e-20, 3e38, 1 - 2**-24])
    for guard_bits in (0, 6, 16):
        whole = bias.double().abs() * 2.0 ** (
            guard_bits - reference.bias_exponents(bias, guard_bits).double()
        )
        assert bool(((whole >= 2**29) & (whole < 2**30)).all())
    # far below any product, so that it raises no exponent
    assert bool((reference.bias_exponents(torch.tensor([0.0, 1e-45]), 16) < -64).all())


@settings(deadline=None, max_examples=60)
@given(
    depth=st.integers(1, 9),
    blocks=st.sampled_from(BLOCKS),
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
)
def test_with_scales_it_is_the_product_of_what_the_integers_stand_for(
    depth: int, blocks: tuple, seed: int, bits: int
):
    a, sa, b, sb = operands((3, 4, depth), blocks, seed, bits, "scale", spread=0.5)
    bias = torch.randn(4)
    found = block_matmul(a, sa, b, sb, bias, *blocks, "scale")
    real_a, real_b = block_dequantize(a, sa, blocks[0]).double(), block_dequantize(b, sb, blocks[1]).double()
    bound = 1e-6 * (real_a.abs() @ real_b.abs().T + bias.abs())
    assert bool(((found - (real_a @ real_b.T + bias)).abs() <= bound).all())


@pytest.mark.parametrize(("depth", "edge"), [(1040, 0), (1041, 0), (3000, 0), (3000, 1500), (600, 0)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_no_product_is_lost_where_float32_would_lose_it(depth: int, edge: int, dtype: torch.dtype):
    largest = torch.iinfo(dtype).max
    a = torch.randint(largest - 3, largest + 1, (2, depth)).to(dtype)
    b = torch.randint(124, 128, (3, depth)).to(torch.int8)
    exact = a.double() @ b.double().T
    blocks = (1, edge), (1, edge)
    size = 1 if not edge else 2
    zeros = torch.zeros(2, size, dtype=torch.int8), torch.zeros(3, size, dtype=torch.int8)
    found = block_matmul(a, zeros[0], b, zeros[1], None, *blocks, "shift")
    assert torch.equal(found, exact.float())
    scaled = block_matmul(a, torch.ones(2, size), b, torch.ones(3, size), None, *blocks, "scale")
    assert torch.equal(scaled, exact.float()) if size == 1 else torch.allclose(scaled, exact.float())


@pytest.mark.skipif(not reference._is_exact_here(), reason="this processor multiplies no 8-bit integers")
@pytest.mark.parametrize("blocks", [((1, 0), (1, 0)), ((1, 64), (64, 64)), ((0, 0), (1, 100))])
@pytest.mark.parametrize("shape", [(1, 5, 1536), (70, 33, 200), (40, 3, 3000)])
def test_products_of_integers_are_those_of_floats_bit_for_bit(shape: tuple, blocks: tuple, monkeypatch):
    bias = torch.randn(shape[1])
    a, sa, b, sb = operands(shape, blocks, seed=3, factor="scale", spread=0.5)
    a[0], b[0] = 127, -127
    found = block_matmul(a, sa, b, sb, bias, *blocks, "scale")
    monkeypatch.setattr(reference, "_is_exact_here", lambda: False)
    assert torch.equal(found, block_matmul(a, sa, b, sb, bias, *blocks, "scale"))


@pytest.mark.parametrize("which", ["a", "b"])
def test_rows_may_share_their_memory(which: str):
    a, sa, b, sb = operands((7, 8, 130), ((1, 0), (1, 0)), seed=1, factor="scale")
    a, b = (a[:1].expand(7, -1), b) if which == "a" else (a, b[:1].expand(8, -1))
    expected = block_matmul(a.contiguous(), sa, b.contiguous(), sb, None, (1, 0), (1, 0), "scale")
    assert torch.equal(block_matmul(a, sa, b, sb, None, (1, 0), (1, 0), "scale"), expected)
    exact = (a.double() @ b.double().T) * sa.double() * sb.double().T
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_processor_that_saturates_or_has_no_such_product_multiplies_floats(monkeypatch):
    probe = reference._is_exact_here.__wrapped__
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    exact = lambda a, b: (a.double() @ b.double()).int()  # noqa: E731
    monkeypatch.setattr(reference, "_int_mm", exact)
    assert probe()
    monkeypatch.setattr(reference, "_int_mm", lambda a, b: exact(a, b).clamp(max=4_000_000))
    assert not probe()
    monkeypatch.setattr(reference, "_int_mm", None)
    assert not probe()
    monkeypatch.setattr(reference, "_int_mm", exact)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not probe()


def test_probabilities_are_unsigned_with_one_fixed_exponent():
    p, v = torch.tensor([[255, 1, 0]], dtype=torch.uint8), torch.tensor([[127, -127, 5]], dtype=torch.int8)
    fixed, exponent = torch.tensor([[-8]], dtype=torch.int8), torch.tensor([[0, 2]], dtype=torch.int8)
    # blocks of two of v: 255 * 127 - 127 = 32258 at -8, and 0
    found = block_matmul(p, fixed, v, exponent, None, (0, 0), (1, 2), "shift", guard_bits=2)
    assert found.tolist() == [[32258 / 256]]


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_batch_is_its_matrices_and_its_rows_bit_for_bit(blocks: tuple, factor: str, monkeypatch):
    x, y, bias = torch.randn(2, 3, 5, 9), torch.randn(2, 3, 4, 9), torch.randn(4)
    a, b = block_quantize(x, 8, blocks[0], factor), block_quantize(y, 8, blocks[1], factor)
    together = block_matmul(*a, *b, bias, *blocks, factor)
    assert together.shape == (2, 3, 5, 4) and together.is_contiguous()
    alone = block_matmul(a[0][1, 2], a[1][1, 2], b[0][1, 2], b[1][1, 2], bias, *blocks, factor)
    assert torch.equal(together[1, 2], alone)
    monkeypatch.setattr(reference, "TILE", 1)
    monkeypatch.setattr(reference, "MIN_ROWS", 2)
    assert torch.equal(block_matmul(*a, *b, bias, *blocks, factor), together)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_there_may_be_nothing_to_multiply(shape: tuple[int, int, int], factor: str):
    blocks = (1, 2), (1, 2)
    found = block_matmul(*operands(shape, blocks, 0, factor=factor), torch.ones(shape[1]), *blocks, factor)
    assert torch.equal(found, torch.ones(shape[:2]))


@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_autocast_changes_nothing(factor: str):
    blocks = (1, 4), (1, 4)
    made = operands((3, 4, 8), blocks, 0, factor=factor)
    expected = block_matmul(*made, None, *blocks, factor)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_matmul(*made, None, *blocks, factor), expected)


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_torch_finds_nothing_wrong_with_the_operator(factor: str, has_bias: bool):
    made = operands((3, 4, 9), BLOCKS[1], 0, factor=factor)
    bias = torch.randn(4, requires_grad=True) if has_bias else None
    opcheck(OPERATOR, (*made, bias, *BLOCKS[1][0], *BLOCKS[1][1], 6))


def test_the_gradient_of_the_bias_is_summed_over_rows():
    x = torch.randn(2, 3, 5)
    a, b = block_quantize(x, 8, (1, 0), "scale"), block_quantize(x, 8, (1, 0), "scale")
    bias = torch.zeros(3, requires_grad=True)
    (block_matmul(*a, *b, bias, (1, 0), (1, 0), "scale") * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [6.0, 12.0, 18.0]


def test_it_compiles_for_any_number_of_rows():
    torch.compiler.reset()

    def product(x: Tensor, b: Tensor, sb: Tensor) -> Tensor:
        a, sa = block_quantize(x, 8, (1, 4), "scale")
        return block_matmul(a, sa, b, sb, None, (1, 4), (1, 4), "scale")

    b, sb = block_quantize(torch.randn(3, 8), 8, (1, 4), "scale")
    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 8, 5):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x, b, sb), product(x, b, sb))


def test_wrong_arguments_are_named():
    blocks = (1, 4), (1, 4)
    a, sa, b, sb = operands((3, 4, 8), blocks, 0, factor="scale")
    bias = torch.zeros(4)
    with pytest.raises(ValueError, match="factor='int' is not one of"):
        block_matmul(a, sa, b, sb, bias, *blocks, "int")
    with pytest.raises(ValueError, match="guard_bits=17 is not from 0 to 16"):
        block_matmul(a, sa, b, sb, bias, *blocks, "scale", guard_bits=17)
    with pytest.raises(TypeError, match=r"bias_N is torch\.bfloat16: give float32"):
        block_matmul(a, sa, b, sb, bias.bfloat16(), *blocks, "scale")
    with pytest.raises(TypeError, match=r"b_NK is torch\.uint8: give int8; only a_MK"):
        block_matmul(a, sa, b.view(torch.uint8), sb, bias, *blocks, "scale")
    with pytest.raises(TypeError, match=r"'shift' wants torch\.int8"):
        block_matmul(a, sa, b, sb, bias, *blocks, "shift")
    with pytest.raises(ValueError, match=r"a_MK is shaped \(3, 8\), .* b_NK \(4, 7\)"):
        block_matmul(a, sa, b[:, :7], sb, bias, *blocks, "scale")
    with pytest.raises(ValueError, match="have 4 columns and those of b_NK 2, of 8"):
        block_matmul(a, sa, b, sb.repeat(1, 2), bias, (1, 4), (1, 2), "scale")
    with pytest.raises(ValueError, match=r"bias_N is shaped \(3,\), on cpu: give \[4\]"):
        block_matmul(a, sa, b, sb, bias[:3], *blocks, "scale")
    deep = torch.zeros(1, 65_537, dtype=torch.int8)
    with pytest.raises(ValueError, match="65537 columns: at most 65536"):
        block_matmul(deep, sa[:1, :1], deep, sb[:1, :1], None, (1, 0), (1, 0), "scale")
    shifted = operands((3, 4, 8), blocks, 0)
    with pytest.raises(ValueError, match="bias_N has an element that is NaN or infinite"):
        block_matmul(*shifted, bias + torch.nan, *blocks, "shift")

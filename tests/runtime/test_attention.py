import math

import pytest
import torch
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_attention import BlockAttention
from lightning_compress.nn.segments import Segments
from lightning_compress.runtime.attention import packed_attention, padded_attention

LENGTHS = [[5], [4, 4, 4], [1, 1, 1], [3, 1, 7, 2], [1], [31, 30], [31, 31], [47, 2, 22, 16]]
BOTH = pytest.mark.parametrize("attention", [packed_attention, padded_attention])


def segments_of(lengths: list[int]) -> Segments:
    longest = max(lengths)
    return Segments.of(torch.arange(longest) < torch.tensor(lengths)[:, None])


def rows(count: int, seed: int, heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, heads, width, generator=generator, dtype=dtype) * 2


def row_by_row(query: Tensor, key: Tensor, value: Tensor, of_query: Segments, of_key: Segments) -> Tensor:
    """Softmax and sums spelled out, one query and head at a time."""
    out = torch.zeros_like(query)
    for row, sequence in enumerate(of_query.sequence_N.tolist()):
        mine = of_key.sequence_N == sequence
        for head in range(query.shape[1]):
            weights = (key[mine, head] @ query[row, head] / math.sqrt(query.shape[2])).exp()
            out[row, head] = (weights[:, None] * value[mine, head]).sum(0) / weights.sum()
    return out


@BOTH
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_row_attends_to_the_rows_of_its_own_sequence(attention, lengths):
    segments = segments_of(lengths)
    query, key, value = (rows(sum(lengths), seed) for seed in range(3))
    attended = attention(query, key, value, segments, segments)
    torch.testing.assert_close(
        attended, row_by_row(query, key, value, segments, segments), rtol=1e-10, atol=1e-12
    )


@BOTH
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_fewer_rows_may_query_than_serve_as_keys(attention, lengths):
    keys, queries = segments_of(lengths), segments_of([1] * len(lengths))
    query, key, value = rows(len(lengths), 0), rows(sum(lengths), 1), rows(sum(lengths), 2)
    attended = attention(query, key, value, queries, keys)
    torch.testing.assert_close(attended, row_by_row(query, key, value, queries, keys), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_in_integers_is_to_the_rows_of_ones_own_sequence_too(lengths):
    attend, segments = BlockAttention(BlockFormat(8, factor="shift"), softmax=True), segments_of(lengths)
    query, key, value = (rows(sum(lengths), seed, dtype=torch.float32) for seed in range(3))
    attended = padded_attention(query, key, value, segments, segments, attend=attend)
    each = zip(*(part.transpose(0, 1)[None].split(lengths, 2) for part in (query, key, value)), strict=True)
    alone = torch.cat([attend(*parts)[0].squeeze(0).transpose(0, 1) for parts in each])
    assert torch.equal(attended, alone)


def test_queries_of_sequences_with_one_key_get_its_value():
    queries, keys = segments_of([2, 1, 3]), segments_of([1, 1, 1])
    value = rows(3, 2)
    attended = packed_attention(rows(6, 0), rows(3, 1), value, queries, keys)
    assert torch.equal(attended, value[[0, 0, 1, 2, 2, 2]])


@BOTH
@pytest.mark.parametrize("lengths", [[3, 1, 7, 2], [22, 30], [24, 24]], ids=str)
def test_gradients_are_those_of_the_formula(attention, lengths):
    segments = segments_of(lengths)
    inputs = [rows(sum(lengths), seed).requires_grad_() for seed in range(3)]
    weight = rows(sum(lengths), 3)
    (attention(*inputs, segments, segments) * weight).sum().backward()
    gradients = [part.grad.clone() for part in inputs]
    for part in inputs:
        part.grad = None
    attended = torch.cat([dense(*[part[mine] for part in inputs]) for mine in rows_of_each(segments)])
    (attended * weight).sum().backward()
    for found, part in zip(gradients, inputs, strict=True):
        torch.testing.assert_close(found, part.grad, rtol=1e-9, atol=1e-12)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.einsum("qhe,khe->hqk", query, key).div(math.sqrt(query.shape[2])).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, value)


def rows_of_each(segments: Segments) -> list[slice]:
    return [slice(*ends) for ends in zip(segments.offsets, segments.offsets[1:], strict=False)]


@BOTH
def test_a_scale_of_ones_own_replaces_the_usual_one(attention):
    segments = segments_of([3, 5])
    query, key, value = (rows(8, seed) for seed in range(3))
    scaled = attention(query, key, value, segments, segments, scale=0.1)
    usual = attention(query * (0.1 * 2.0), key, value, segments, segments)  # sqrt(4) = 2
    torch.testing.assert_close(scaled, usual)


@BOTH
@pytest.mark.parametrize("lengths", [[3, 5], [4, 4], [1, 1]], ids=str)
def test_dropout_changes_the_result_and_keeps_its_mean(attention, lengths):
    torch.manual_seed(0)
    segments = segments_of(lengths)
    query, key, value = (rows(sum(lengths), seed) for seed in range(3))
    samples = torch.stack([attention(query, key, value, segments, segments, dropout=0.5) for _ in range(800)])
    exact = attention(query, key, value, segments, segments)
    assert (samples[0] - exact).abs().max() > 0.1
    assert (samples.mean(0) - exact).abs().max() < 0.6
    assert samples.std(0).max() > 0.1


def test_a_sequence_gets_the_same_result_alone_and_in_company():
    lengths = [3, 40, 22, 40]
    segments = segments_of(lengths)
    inputs = [rows(sum(lengths), seed) for seed in range(3)]
    together = packed_attention(*inputs, segments, segments)
    for length, mine in zip(lengths, rows_of_each(segments), strict=True):
        single = segments_of([length])
        alone = packed_attention(*[part[mine] for part in inputs], single, single)
        assert torch.equal(together[mine], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[30, 31], [127]], ids=str)
def test_low_precision_stays_near_the_exact_result(lengths, dtype):
    segments = segments_of(lengths)
    inputs = [rows(sum(lengths), seed, dtype=dtype) for seed in range(3)]
    attended = packed_attention(*inputs, segments, segments)
    assert attended.dtype == dtype
    exact = packed_attention(*[part.double() for part in inputs], segments, segments)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(attended.double(), exact, rtol=tolerance, atol=tolerance)


def test_no_sequence_gives_no_row():
    segments = Segments.of(torch.ones(0, 4, dtype=torch.bool))
    empty = rows(0, 0)
    assert packed_attention(empty, empty, empty, segments, segments).shape == (0, 2, 4)
    assert packed_attention(empty, empty, empty, segments, segments, dropout=0.1).shape == (0, 2, 4)

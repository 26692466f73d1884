import copy
import pickle

import pytest
import torch

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_attention import IMPLEMENTATION, BlockAttention, block_attention_forward
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.fixed_point import align_rows
from lightning_compress.ops.integer_softmax import integer_softmax_by_row, softmax_factor

SHIFT, SCALE = BlockFormat(8, factor="shift"), BlockFormat(8)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(heads: int = 4, groups: int = 4, queries: int = 5, keys: int = 5) -> list[torch.Tensor]:
    return [
        rows(2, n, t, 8, seed=s)
        for s, (n, t) in enumerate([(heads, queries), (groups, keys), (groups, keys)])
    ]


def exact(query, key, value, seen=None):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True
    )


LAYERWISE = BlockAttention(BlockFormat(8, (0, 0)), softmax=True)
SETTINGS = [
    BlockAttention(SCALE, softmax=True),
    BlockAttention(SHIFT, softmax=True),
    LAYERWISE,
    BlockAttention(BlockFormat(8, (1, 4), "shift"), softmax=True),
    BlockAttention(SCALE),
    BlockAttention(softmax=True),
]


@pytest.mark.parametrize("attend", SETTINGS, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_in_8_bits_is_near_the_exact_one(attend, groups):
    query, key, value = operands(groups=groups)
    attended, weights = attend(query, key, value)
    torch.testing.assert_close(attended, exact(query, key, value), rtol=0.0, atol=0.06)
    largest = weights.amax(-1, keepdim=True)
    unit = 2.0 ** (torch.frexp(largest).exponent - 8)  # of a row: its largest weight takes 8 bits
    assert torch.equal(weights / unit, (weights / unit).round()) and (largest < 256 * unit).all()
    assert attended.shape == query.shape and weights.shape == (2, 4, 5, 5)


@pytest.mark.parametrize("block", [(1, 0), (0, 0)])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_shifts_every_bit_is_that_of_integer_arithmetic(bits, block):
    held, (query, key, value) = BlockFormat(bits, block, "shift"), operands()
    attended, weights = BlockAttention(held, softmax=True)(query, key, value)
    for place in [(b, h) for b in range(2) for h in range(4)]:
        (q, eq), (k, ek), (v, ev) = (
            block_quantize(x[place], bits, block, "shift") for x in (query, key, value)
        )
        eq, ek, ev = (e.long().expand(5, 1) for e in (eq, ek, ev))
        lowest = int(eq.min() + ek.min())
        logits = (q.long() @ k.long().T) << (eq + ek.T - lowest)  # int64
        value_RC, exponent_R = align_rows(logits.double() * 2.0**lowest, 31)
        p, ep = integer_softmax_by_row(value_RC, exponent_R, softmax_factor(8**-0.5))
        total = p.long() @ (v.long() << (ev - ev.min()))
        expected = total.double() * 2.0 ** (int(ev.min()) + ep[:, None].double())
        assert torch.equal(weights[place], p.float() * 2.0 ** ep[:, None].float())
        assert torch.equal(attended[place], expected.float())


@pytest.mark.parametrize("attend", SETTINGS, ids=str)
@pytest.mark.parametrize("keys", [64, 600])
def test_rows_that_spread_over_many_keys_keep_their_digits(attend, keys):
    query, key, value = operands(keys=keys)
    truth = exact(query / 8, key, value)  # nearly even weights: under 1/256 where keys are hundreds
    error = attend(query / 8, key, value)[0] - truth
    assert error.norm() / truth.norm() < 0.01


@pytest.mark.parametrize("attend", SETTINGS, ids=str)
def test_training_computes_what_inference_does_and_passes_gradients_straight_through(attend):
    query, key, value = (part.requires_grad_() for part in operands())
    attended, _ = attend(query, key, value)
    with torch.no_grad():
        torch.testing.assert_close(attend(query, key, value)[0], attended, rtol=1e-5, atol=1e-6)
    upstream = rows(2, 4, 5, 8, seed=9)
    gradients = torch.autograd.grad(attended, (query, key, value), upstream)
    expected = torch.autograd.grad(exact(query, key, value), (query, key, value), upstream)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.1)
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.995


@pytest.mark.parametrize("attend", [attend for attend in SETTINGS if attend != LAYERWISE], ids=str)
def test_what_nobody_sees_changes_nothing_even_if_it_is_not_finite(attend):
    query, key, value = operands()
    short, _ = attend(query[..., :3, :], key[..., :3, :], value[..., :3, :])
    for part in (query, key, value):
        part[..., 3:, :] = 1e4
    key[..., 4, :] = torch.nan
    value[..., 4, :] = torch.inf
    seen = (torch.arange(5) < 3)[None, None, None]
    attended, weights = attend(query, key, value, seen)
    torch.testing.assert_close(attended[..., :3, :], short, rtol=0.0, atol=1e-6)
    assert (weights[..., 3:] == 0).all()


@pytest.mark.parametrize("attend", SETTINGS, ids=str)
def test_a_query_that_sees_nothing_gets_zeros(attend):
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    seen[:, :, 2] = False
    attended, weights = attend(*operands(), seen)
    assert (attended[:, :, 2] == 0).all() and (weights[:, :, 2] == 0).all()
    assert (attended[:, :, 1] != 0).any()


def test_later_tokens_change_no_bit_of_earlier_ones():
    attend, parts = BlockAttention(SHIFT, softmax=True), operands()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    before = attend(*parts, causal)[0]
    for part in parts:
        part[..., 3:, :] *= 1000.0
    assert torch.equal(attend(*parts, causal)[0][..., :3, :], before[..., :3, :])


def test_dropout_drops_weights_and_scales_the_others():
    torch.manual_seed(0)
    attend, parts = BlockAttention(SCALE), operands(keys=64)
    plain, dropped = attend(*parts)[1], attend(*parts, dropout=0.5)[1]
    assert 0.3 < ((dropped == 0) & (plain != 0)).sum() / (plain != 0).sum() < 0.7
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_the_queries(dtype):
    attended, weights = BlockAttention(SCALE, softmax=True)(*(part.to(dtype) for part in operands()))
    assert attended.dtype == weights.dtype == dtype


class Module(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2

    def __init__(self, attend: BlockAttention | None) -> None:
        super().__init__()
        if attend is not None:
            self.block_attention = attend


def test_the_function_of_the_interface_takes_masks_as_transformers_gives_them():
    attend, parts = BlockAttention(SCALE, softmax=True), operands(groups=2, queries=3)
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    expected = attend(*parts, causal)
    for mask in (None, causal):
        attended, weights = block_attention_forward(Module(attend), *parts, mask)
        assert torch.equal(attended, expected[0].transpose(1, 2)) and torch.equal(weights, expected[1])
    everything = block_attention_forward(Module(attend), *parts, None, is_causal=False)[1]
    assert (everything[:, :, 0] > 0).all()
    one = block_attention_forward(Module(attend), parts[0][:, :, -1:], *parts[1:], None)[1]
    assert (one > 0).all()


def test_modules_without_it_attend_as_usual():
    parts = operands(groups=2)
    attended, weights = block_attention_forward(Module(None), *parts, None)
    query, key, value = parts
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(attended, expected.transpose(1, 2))
    assert weights is None


def test_dropout_is_for_training():
    module, parts = Module(BlockAttention(SCALE)), operands(groups=2)
    assert torch.equal(
        block_attention_forward(module.eval(), *parts, None, dropout=0.9)[0],
        block_attention_forward(module, *parts, None)[0],
    )
    assert (block_attention_forward(module.train(), *parts, None, dropout=0.999)[1] == 0).all()


def test_biases_and_settings_that_quantise_nothing_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        block_attention_forward(Module(BlockAttention(SCALE)), *operands(), torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="neither"):
        BlockAttention()
    with pytest.raises(ValueError, match="32 tokens"):
        BlockAttention(BlockFormat(8, (32, 32)))


def test_the_registry_of_transformers_knows_it_and_a_config_that_names_it_can_be_copied(tiny):
    model = tiny("bert", "BertModel")
    model.config._attn_implementation = IMPLEMENTATION
    with torch.device("meta"):
        copied = type(model)(copy.deepcopy(model.config))
    assert copied.config._attn_implementation == IMPLEMENTATION
    assert IMPLEMENTATION not in str(model.config.to_dict())
    assert pickle.loads(pickle.dumps(SETTINGS[0])) == SETTINGS[0]

"""Weights that make up for each other's rounding: held exactly by their format, and nearer in what they put out."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.compensated_rounding import compensated_weight, gather_moments
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize.reference import split_blocks
from lightning_compress.ops.block_round import block_round
from lightning_compress.runtime import pack
from tests.toys import tiny_bert
from tests.toys_dropping import dropping_model, ragged_batch

BLOCKS = [(1, 0), (1, 8), (4, 4), (0, 0), (0, 5), (3, 7)]


def rounded(weight: Tensor, form: BlockFormat) -> Tensor:
    return block_round(weight, form.bits, form.block, form.factor)


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return mixed * torch.rand(columns, generator=generator)


def slowly(weight: Tensor, moment: Tensor, form: BlockFormat, damping: float) -> Tensor:
    """Row by row, the inverse of what is left computed anew for each column; the largest of a row stays."""
    damped = moment.double() + damping * moment.double().diagonal().mean() * torch.eye(len(moment))
    out = torch.empty_like(weight)
    for n, row in enumerate(weight.double()):
        left, step, top = row.clone(), row.abs().max() / form.largest, int(row.abs().argmax())
        for k in range(len(row)):
            inverse = torch.linalg.inv(damped[k:, k:])
            integer = (left[k] / step).round().clamp(-form.largest, form.largest)
            if k == top:
                integer = form.largest * row[k].sign()
            out[n, k] = integer * step
            left[k:] -= (left[k] - integer * step) / inverse[0, 0] * inverse[0]
    return out


def test_it_equals_a_slow_loop_over_the_inverse_of_what_is_left() -> None:
    weight, x = torch.randn(5, 12), correlated(40, 12)
    form = BlockFormat(bits=4)
    expected = slowly(weight, x.T @ x, form, 0.01)
    torch.testing.assert_close(compensated_weight(weight, x.T @ x, form), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=80)
@given(
    shape=st.sampled_from([(6, 20), (1, 9), (9, 1), (4, 150)]),
    bits=st.integers(2, 8),
    block=st.sampled_from(BLOCKS),
    factor=st.sampled_from(["scale", "shift"]),
    kind=st.sampled_from(["normal", "zeros", "outlier", "equal", "half zeros"]),
    seed=st.integers(0, 2**16),
)
def test_rounding_again_changes_nothing(
    shape: tuple, bits: int, block: tuple, factor: Any, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight = {"zeros": weight * 0, "equal": weight.sign() * 0.3}.get(kind, weight)
    if kind == "outlier":
        weight[0, 0] = 1e4
    if kind == "half zeros":
        weight[:, weight.shape[1] // 2 :] = 0.0
        weight *= 10
    x, form = correlated(7, shape[1], seed), BlockFormat(bits, block, factor)
    found = compensated_weight(weight, x.T @ x, form)
    torch.testing.assert_close(rounded(found, form), found, rtol=1e-6, atol=0.0)
    amax = split_blocks(weight.abs(), *block).amax(dim=(-3, -1))
    is_empty = block_dequantize(torch.ones(shape, dtype=torch.int8), amax, block) == 0
    assert bool((found[is_empty] == 0).all())


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_outputs_are_nearer_than_with_plain_rounding(bits: int, block: tuple, factor: Any) -> None:
    weight, x = torch.randn(24, 140, generator=torch.Generator().manual_seed(1)), correlated(600, 140)
    form = BlockFormat(bits, block, factor)
    found = compensated_weight(weight, x.T @ x, form)
    errors = [float(((held - weight) @ x.T).square().mean()) for held in (found, rounded(weight, form))]
    assert errors[0] < 0.9 * errors[1]


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_plainly() -> None:
    weight, form = torch.randn(6, 30), BlockFormat(bits=4, block=(1, 8))
    for moment in (torch.eye(30), torch.zeros(30, 30)):
        torch.testing.assert_close(compensated_weight(weight, moment, form), rounded(weight, form))


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite: calibrate with batches"):
        compensated_weight(torch.ones(2, 3), torch.full((3, 3), torch.inf), BlockFormat())
    with pytest.raises(ValueError, match=r"damping=0\.0 is not positive"):
        compensated_weight(torch.ones(2, 3), torch.ones(3, 3), BlockFormat(), damping=0.0)


def linears_of(model: nn.Module) -> list[str]:
    return [slot.path for slot in describe(model).linears]


def test_moments_are_those_of_what_is_no_padding() -> None:
    model, paths = tiny_bert().train(), linears_of(tiny_bert())
    model.bert.embeddings.eval()
    short = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "text": ["a", "b"],
    }
    other = {"input_ids": torch.tensor([[8, 9]])}
    together = gather_moments(model, paths, iter([padded]))
    alone = gather_moments(model, paths, [short, other])
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert model.training and model.bert.encoder.training and not model.bert.embeddings.training
    assert list(together) == paths
    for path in paths:
        torch.testing.assert_close(together[path], alone[path], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[path], together[path].T)


@pytest.mark.parametrize("batches", [[], itertools.islice(iter([]), 4)], ids=["list", "islice"])
def test_there_has_to_be_a_batch(batches: Any) -> None:
    with pytest.raises(ValueError, match="there is no batch"):
        gather_moments(tiny_bert(), linears_of(tiny_bert()), batches)


def test_batches_are_mappings() -> None:
    with pytest.raises(TypeError, match="a calibration batch is a Tensor: give mappings"):
        gather_moments(tiny_bert(), linears_of(tiny_bert()), [torch.ones(2, 3)])  # type: ignore[list-item]


@pytest.mark.parametrize("method", [ContributionTokenDroppingConfig, BottleneckTokenDroppingConfig])
def test_tokens_that_leave_and_padding_do_not_count(method: type) -> None:
    model = dropping_model(tiny_bert(), method)
    padded = ragged_batch([6, 2, 4], padded=8)
    alone = [
        {"input_ids": ids[None, : int(mask.sum())]}
        for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    paths = linears_of(model)
    together, apart = (gather_moments(model, paths, batches) for batches in ([padded], alone))
    for path in paths:
        torch.testing.assert_close(together[path], apart[path], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": torch.ones(1, 2)}, r"holds \['ids'\], of which the model knows no tensor"),
        ({"input_ids": [[1, 2]]}, "knows no tensor"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": [[1, 1]]}, r"no tensor \[B, T\]"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 1, 2, 2)},
            "zeros where padding",
        ),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}, "there is no batch"),
    ],
)
def test_what_cannot_be_read_is_refused(batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_moments(tiny_bert(), linears_of(tiny_bert()), [batch])


def test_one_batch_is_to_be_in_a_list() -> None:
    with pytest.raises(TypeError, match=r"calibration=\[batch\]"):
        gather_moments(tiny_bert(), [], {"input_ids": torch.ones(1, 2)})  # type: ignore[arg-type]


def test_a_packed_model_sees_the_same_up_to_the_last_layer() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    paths = linears_of(tiny_bert())[:6]
    plain = gather_moments(tiny_bert().eval(), paths, [batch])
    packed = gather_moments(pack(tiny_bert()), paths, [batch])
    for path in paths:
        torch.testing.assert_close(packed[path], plain[path], rtol=1e-4, atol=1e-4)


def test_a_linear_that_did_not_run_is_named() -> None:
    model = tiny_bert()
    model.spare = nn.Linear(32, 2)
    with pytest.raises(ValueError, match="no text came as far as spare"):
        gather_moments(model, [*linears_of(model), "spare"], [{"input_ids": torch.tensor([[5, 6]])}])
    assert not any(part._forward_pre_hooks for part in model.modules())

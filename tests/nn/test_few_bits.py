"""Few-bit teachers: what is quantised, what gradients it gives, and what it leaves behind."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from lightning_compress.nn.few_bits import dense_state_dict, quantize_linears
from lightning_compress.nn.saliency import gradient_saliency
from tests.toys import tiny_bert

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 64}


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def spread_out(model: nn.Module) -> nn.Module:
    """Larger weights than at initialisation, so that saliencies of tokens differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dense.weight") or ".self." in name:
                parameter.mul_(4.0)
    return model.eval()


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.95)])
def test_saliencies_of_the_quantised_teacher_correlate_with_the_exact_ones(bits: int, least: float) -> None:
    exact = spread_out(tiny_bert(**WIDE))
    coarse = quantize_linears(copy.deepcopy(exact), bits)
    labels = torch.arange(6)
    expected = gradient_saliency(exact, inputs(), labels)
    got = gradient_saliency(coarse, inputs(), labels)
    real = inputs()["attention_mask"].bool()
    assert torch.equal(got[~real], expected[~real])
    correlation = torch.corrcoef(torch.stack([got[real], expected[real]]))[0, 1]
    assert least < float(correlation) < 1.0


@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_and_linears_of_odd_sizes_stay_as_they_are(bits: int) -> None:
    model = quantize_linears(tiny_bert(**{**WIDE, "intermediate_size": 36}), bits)
    layer = model.bert.encoder.layer[0]
    assert type(model.classifier) is nn.Linear
    assert type(layer.intermediate.dense) is nn.Linear and type(layer.output.dense) is nn.Linear
    assert (
        type(layer.attention.self.query) is not nn.Linear and type(model.bert.pooler.dense) is not nn.Linear
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_it_runs_without_gradients_and_in_either_mode(bits: int) -> None:
    model = quantize_linears(spread_out(tiny_bert(**WIDE)), bits)
    with_gradients = model(**inputs()).logits.detach()
    with torch.no_grad():
        assert torch.allclose(model.train()(**inputs()).logits, with_gradients, atol=0.01)
        assert torch.allclose(model.eval()(**inputs()).logits, with_gradients, atol=0.01)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_state_written_out_has_the_names_of_the_dense_model_and_quantises_to_the_same(bits: int) -> None:
    dense = tiny_bert(**WIDE)
    names = list(dense.state_dict())
    model = quantize_linears(copy.deepcopy(dense), bits)
    again = tiny_bert(seed=5, **WIDE)
    state = dense_state_dict(model)
    assert sorted(state) == sorted(names)
    again.load_state_dict(state)
    again = quantize_linears(again, bits)
    assert torch.equal(model.eval()(**inputs()).logits, again.eval()(**inputs()).logits)


def test_a_model_that_cannot_be_quantised_and_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits=3 is not one of \[4, 8\]"):
        quantize_linears(tiny_bert(), 3)
    with pytest.raises(ValueError, match="no linear whose sizes are multiples of 64"):
        quantize_linears(tiny_bert(), 4)


def test_nobody_hears_of_kernels_and_casts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = quantize_linears(tiny_bert(**WIDE), 8)
        model(**inputs())
    assert caplog.messages == []

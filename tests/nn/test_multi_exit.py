"""Exit heads: what they read, what they say, and how they sit in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import (
    ExitHead,
    SharedExits,
    chosen_exits,
    exit_logits,
    exit_states,
    has_exits,
    install_exits,
    remove_exits,
    share_head,
)
from lightning_compress.nn.segments import Segments
from lightning_compress.runtime import pack
from tests.toys import tiny_bert
from tests.toys_dropping import ragged_batch

SETTINGS: dict[str, Any] = {"pooling": "cls", "pooler": False, "dropout": 0.0}
REAL_BT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()


def head(**settings: Any) -> ExitHead:
    torch.manual_seed(0)
    return ExitHead(3, 2, **settings).double().eval()


# one head


def test_a_head_is_a_linear_of_the_tanh_of_the_first_token() -> None:
    exit_ = ExitHead(2, 1, pooling="cls").eval()
    with torch.no_grad():
        exit_.classifier.weight.copy_(torch.tensor([[2.0, -1.0]]))
        exit_.classifier.bias.fill_(0.5)
    hidden_BTD = torch.tensor([[[0.3, -0.2], [9.0, 9.0]]])
    expected = 2 * torch.tensor(0.3).tanh() - torch.tensor(-0.2).tanh() + 0.5
    assert exit_(exit_.pool(hidden_BTD)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_dense_layer_comes_before_the_tanh() -> None:
    exit_, pooled_BD = head(pooler=True), torch.randn(4, 3, dtype=torch.float64)
    dense, linear = exit_.pooler, exit_.classifier
    assert dense is not None and head().pooler is None
    by_hand = (pooled_BD @ dense.weight.T + dense.bias).tanh() @ linear.weight.T + linear.bias
    assert torch.allclose(exit_(pooled_BD), by_hand, atol=1e-12)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_reads_tokens_only_and_rows_as_it_reads_padded_batches(pooling: Any) -> None:
    exit_, hidden_BTD = head(pooling=pooling), torch.randn(3, 4, 3, dtype=torch.float64)
    slow = []
    for states_TD, real_T in zip(hidden_BTD, REAL_BT, strict=True):
        tokens = [state for state, is_real in zip(states_TD, real_T.tolist(), strict=True) if is_real]
        slow.append(tokens[0] if pooling == "cls" else sum(tokens[1:], start=tokens[0]) / len(tokens))
    loud = hidden_BTD.masked_fill(~REAL_BT.unsqueeze(-1), torch.nan)
    segments = Segments.of(REAL_BT)
    for found in (
        exit_.pool(loud, REAL_BT),
        exit_.pool_rows(hidden_BTD.flatten(0, 1)[segments.origin_N], segments),
    ):
        assert torch.allclose(found, torch.stack(slow), atol=1e-12)
    full = exit_.pool(hidden_BTD)
    assert torch.allclose(full, exit_.pool(hidden_BTD, torch.ones(3, 4).bool()), atol=1e-12)


def test_padding_gets_no_gradient_from_the_mean() -> None:
    hidden_BTD = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    head(pooling="mean").pool(hidden_BTD, REAL_BT).sum().backward()
    assert hidden_BTD.grad is not None
    assert torch.equal(hidden_BTD.grad.abs().sum(-1) > 0, REAL_BT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_tokens_is_exact_to_the_last_digit_of_its_own_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    real_BT = torch.arange(700).expand(2, -1) < torch.tensor([[700], [600]])
    hidden_BTD = (1.0 + 0.1 * torch.randn(2, 700, 3)).to(dtype)
    exact_BD = torch.stack([hidden_BTD[0].double().mean(0), hidden_BTD[1, :600].double().mean(0)]).to(dtype)
    exit_, segments = ExitHead(3, 2), Segments.of(real_BT)
    padded_BD = exit_.pool(hidden_BTD, real_BT)
    packed_BD = exit_.pool_rows(hidden_BTD.flatten(0, 1)[segments.origin_N], segments)
    assert padded_BD.dtype == packed_BD.dtype == dtype
    assert torch.equal(padded_BD, exact_BD) and torch.equal(packed_BD, exact_BD)
    assert torch.equal(exit_.pool(hidden_BTD[:1]), exact_BD[:1])


def test_a_head_reads_by_default_what_the_method_lets_it_read() -> None:
    assert ExitHead(2, 1).pooling == MultiExitConfig.pooling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is not one of"),
        ({"dropout": 1.0}, r"dropout=1.0 is outside \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitHead(2, 2, **settings)


# in a model


def test_every_exit_has_weights_of_its_own() -> None:
    model = tiny_bert(num_hidden_layers=4)
    exits = install_exits(model, [0, 1, 2], **{**SETTINGS, "pooler": True})
    parameters = list(exits.parameters())
    assert len(parameters) == len({p.data_ptr() for p in parameters}) == 3 * 4
    assert sum(p.numel() for p in parameters) == 3 * (32 * 32 + 32 + 32 * 2 + 2)
    classifiers = [exits[str(layer)].classifier.weight for layer in range(3)]  # type: ignore[union-attr]
    assert not torch.equal(classifiers[0], classifiers[1]) and not torch.equal(classifiers[1], classifiers[2])
    assert abs(float(torch.cat(classifiers).detach().std()) - 0.02) < 0.005


def test_heads_are_saved_with_the_model_by_layer() -> None:
    model = tiny_bert(num_hidden_layers=3)
    install_exits(model, [1], **SETTINGS)
    names = [name for name in model.state_dict() if name.startswith("exits")]
    assert names == ["exits.1.classifier.weight", "exits.1.classifier.bias"] and has_exits(model)
    remove_exits(model)
    assert list(model.state_dict()) == list(tiny_bert(num_hidden_layers=3).state_dict()) and not has_exits(
        model
    )
    remove_exits(model)


def test_poolers_start_from_the_models_own() -> None:
    model = tiny_bert(num_hidden_layers=3)
    exits: Any = install_exits(model, [0, 1], **{**SETTINGS, "pooler": True})
    assert torch.equal(exits["0"].pooler.weight, model.bert.pooler.dense.weight)
    assert exits["0"].pooler.weight is not model.bert.pooler.dense.weight


def test_heads_follow_device_dtype_and_mode() -> None:
    model = tiny_bert().to(torch.bfloat16).eval()
    exits = install_exits(model, [0], **SETTINGS)
    assert {p.dtype for p in exits.parameters()} == {torch.bfloat16} and not exits.training
    empty = tiny_bert().to("meta")
    assert {p.device.type for p in install_exits(empty, [0], **SETTINGS).parameters()} == {"meta"}


def test_a_model_gets_exits_once() -> None:
    model = tiny_bert()
    install_exits(model, [0], **SETTINGS)
    for again in (lambda: install_exits(model, [0], **SETTINGS), lambda: share_head(model, [0])):
        with pytest.raises(ValueError, match="has exits already"):
            again()


@pytest.mark.parametrize("exits", [(-1,), (3,), (0, 3), ()])
def test_layers_that_cannot_have_an_exit_are_refused(exits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must name layers from 0 to 2"):
        chosen_exits(describe(tiny_bert(num_hidden_layers=4)), exits)


def test_one_layer_has_no_room_for_exits() -> None:
    with pytest.raises(ValueError, match="one layer has no room for exits"):
        chosen_exits(describe(tiny_bert(num_hidden_layers=1)), None)


def test_exits_are_sorted_and_after_all_but_the_last_by_default() -> None:
    anatomy = describe(tiny_bert(num_hidden_layers=4))
    assert chosen_exits(anatomy, None) == (0, 1, 2) and chosen_exits(anatomy, (2, 0, 2)) == (0, 2)


# what exits say of the latest pass


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_logits_are_those_of_hand_made_heads_on_transformers_own_states(pooling: Any) -> None:
    model = tiny_bert(num_hidden_layers=4).double()
    install_exits(model, [0, 2], **{**SETTINGS, "pooling": pooling})
    LayerTaps.of(model)
    batch = ragged_batch([5, 2, 4])
    states = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].double()
    found = exit_logits(model)
    assert list(found) == [0, 2]
    for layer, logits_BC in found.items():
        hidden_BTD, exit_ = states[layer + 1], model.exits[str(layer)]
        mean_BD = (hidden_BTD * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        pooled_BD = hidden_BTD[:, 0] if pooling == "cls" else mean_BD
        assert torch.allclose(logits_BC, exit_.classifier(pooled_BD.tanh()), atol=1e-12)


def test_texts_that_are_padded_on_the_left_are_read_from_their_first_token() -> None:
    model = tiny_bert(num_hidden_layers=3)
    install_exits(model, [0], **SETTINGS)
    taps = LayerTaps.of(model)
    model(torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]]))
    assert torch.equal(exit_states(model)[0], taps.latest[0][:, 2])


def test_asked_twice_exits_say_the_same_even_with_dropout_and_forget_with_the_pass() -> None:
    model = tiny_bert(num_hidden_layers=3).train()
    install_exits(model, [0, 1], **{**SETTINGS, "dropout": 0.5})
    LayerTaps.of(model)
    model(**ragged_batch([3, 4]))
    first, second = exit_logits(model), exit_logits(model)
    assert all(first[layer] is second[layer] for layer in (0, 1))
    model(**ragged_batch([3, 4]))
    assert exit_logits(model)[0] is not first[0]


def test_dropped_tokens_are_no_part_of_the_mean() -> None:
    model = tiny_bert(num_hidden_layers=3)
    install_exits(model, [1], **{**SETTINGS, "pooling": "mean"})
    taps = LayerTaps.of(model)
    model(**ragged_batch([4, 4]))
    bias = torch.zeros(2, 1, 1, 4)
    bias[0, ..., 2:] = -torch.inf
    taps.masks[1] = bias
    hidden_BTD = taps.latest[1]
    expected = torch.stack([hidden_BTD[0, :2].mean(0), hidden_BTD[1].mean(0)])
    assert torch.allclose(exit_states(model)[1], expected, atol=1e-6)


def test_a_model_without_exits_or_states_says_so() -> None:
    model = tiny_bert(num_hidden_layers=3)
    with pytest.raises(LookupError, match="has no exits"):
        exit_logits(model)
    install_exits(model, [0], **SETTINGS)
    with pytest.raises(LookupError, match=r"no states left layers \[0\]"):
        exit_logits(model)
    pack(model)(**ragged_batch([3]))
    with pytest.raises(LookupError, match="not packed"):
        exit_logits(model)


# shared exits of decoders


@pytest.mark.parametrize(("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")])
def test_a_decoders_exits_read_through_its_own_norm_and_head(family: str, name: str, tiny: Any) -> None:
    model: Any = tiny(family, name)
    before = [key for key, _ in model.named_parameters()]
    share_head(model, [0])
    LayerTaps.of(model)
    ids = torch.randint(2, 50, (2, 5))
    states = model(ids, output_hidden_states=True).hidden_states
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    found = exit_logits(model)
    assert list(found) == [0] and torch.allclose(found[0], model.lm_head(norm(states[1])), atol=1e-6)
    assert [key for key, _ in model.named_parameters()] == before
    assert isinstance(model.exits, SharedExits) and model.exits.layers == (0,)


def test_only_decoders_of_text_share_their_head(tiny: Any) -> None:
    for model in (tiny_bert(), tiny("llama", "LlamaModel")):
        with pytest.raises(ValueError, match="no final norm and head"):
            share_head(model, [0])


def test_gradients_reach_the_layers_through_every_exit() -> None:
    model = tiny_bert(num_hidden_layers=3)
    exits = install_exits(model, [0, 1], **SETTINGS)
    LayerTaps.of(model)
    model(**ragged_batch([3, 4]))
    sum(logits_BC.sum() for logits_BC in exit_logits(model).values()).backward()  # type: ignore[union-attr]

    def reached(module: nn.Module) -> bool:
        gradients: list[Tensor | None] = [p.grad for p in module.parameters()]
        return any(g is not None and bool(g.abs().sum() > 0) for g in gradients)

    layers = model.bert.encoder.layer
    assert [reached(layer) for layer in layers] == [True, True, False]
    assert all(p.grad is not None for p in exits.parameters())

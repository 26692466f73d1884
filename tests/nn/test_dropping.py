"""The encoder in training form: it adds nothing while idle, and hides exactly the tokens that left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.bottleneck_token_dropping import SoftBottleneckPolicy
from lightning_compress.nn.contribution_token_dropping import SoftContributionPolicy
from lightning_compress.nn.dropping import (
    DroppingEncoder,
    InputRecorder,
    KeepPolicy,
    compute_dtype,
    real_tokens,
)
from lightning_compress.nn.surgery import get_module, replace_module
from lightning_compress.nn.tape import Tape, TokensKept

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}


class Listed(nn.Module):
    """Keeps the same tokens of every text, layer by layer: a policy as far as the training form asks for it."""

    def __init__(self, keep_LT: Tensor) -> None:
        super().__init__()
        self.keep_LT, self.is_active = keep_LT, True
        self.seen: list[Tensor] = []

    def begin(self, real_BT: Tensor) -> Tensor:
        self.seen = []
        return real_BT

    def remove(self, layer: int, hidden_BTD: Tensor, state: Tensor) -> Tensor:
        self.seen.append(hidden_BTD)
        return torch.zeros(state.shape).masked_fill(~(state & self.keep_LT[layer]), -1e4)


@pytest.fixture
def classifier(tiny):
    def build(family: str, **changes) -> nn.Module:
        return tiny(family, f"{FAMILIES[family]}ForSequenceClassification", initializer_range=0.3, **changes)

    return build


def install(model: nn.Module, keep_LT: Tensor) -> Listed:
    path, policy = describe(model).encoder, Listed(keep_LT)
    replace_module(model, path, DroppingEncoder(get_module(model, path), policy))
    return policy


def texts() -> dict[str, Tensor]:
    ids = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_idle_or_lenient_policy_changes_nothing(classifier, family: str, attention: str) -> None:
    model = classifier(family)
    model.set_attn_implementation(attention)
    expected = model(**texts()).logits
    names = list(model.state_dict())
    policy = install(model, torch.ones(2, 6).bool())
    assert torch.allclose(model(**texts()).logits, expected, atol=1e-5)
    assert len(policy.seen) == 2 and list(model.state_dict()) == names
    policy.is_active = False
    assert torch.equal(model(**texts()).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_left_before_the_first_layer_is_as_if_it_were_padding(classifier, family: str) -> None:
    model, keep = classifier(family), torch.tensor([True, True, False, True, False, True])
    inputs = texts()
    masked = {**inputs, "attention_mask": inputs["attention_mask"] * keep}
    if family == "roberta":  # whose positions are counted from the ids
        assert (inputs["input_ids"] != 1).sum() == inputs["attention_mask"].sum()
    expected = model(**masked).logits
    install(model, keep.expand(2, 6))
    got = model(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_token_that_left_later_was_seen_before(classifier) -> None:
    model = classifier("bert")
    dense, early = model(**texts()).logits, copy.deepcopy(model)
    keep = torch.tensor([True, False, False, False, False, False])
    install(early, keep.expand(2, 6))
    policy = install(model, torch.stack([torch.ones(6).bool(), keep]))
    late = model(**texts()).logits
    assert not torch.allclose(late[:2], dense[:2]) and not torch.allclose(
        late[:2], early(**texts()).logits[:2]
    )
    assert torch.allclose(late[2], dense[2], atol=1e-6)
    assert policy.seen[0].shape == (3, 6, 32)


def test_what_left_comes_out_as_zeros_in_evaluation_as_it_will_from_the_packed_engine(classifier) -> None:
    model, inputs = classifier("bert"), texts()
    keep = torch.tensor([True, True, False, True, False, True])
    install(model, keep.expand(2, 6))
    for is_training in (False, True):
        model.bert.train(is_training)
        out_BTD = model.bert(**inputs).last_hidden_state
        left_BT = inputs["attention_mask"].bool() & ~keep
        assert left_BT.any() and bool((out_BTD[left_BT] == 0).all()) is not is_training
        assert bool((out_BTD[~left_BT] != 0).any(dim=-1).all())


def test_hidden_states_of_all_layers_can_still_be_had_while_training(classifier) -> None:
    model = classifier("bert")
    expected = model(**texts(), output_hidden_states=True).hidden_states
    install(model, torch.ones(2, 6).bool())
    got = model(**texts(), output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradients_reach_the_bias_with_checkpointing_as_without(classifier) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = classifier("bert").train()
        model.set_attn_implementation("sdpa")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = install(model, torch.ones(2, 6).bool())
        bias = torch.zeros(3, 6, requires_grad=True)
        policy.remove = lambda layer, hidden, state, bias=bias: bias
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**texts()).logits.square().sum().backward()
        gradients.append(bias.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6) and gradients[0].abs().sum() > 0


def test_a_mask_is_read_in_every_form_that_transformers_gives_it() -> None:
    hidden, real = torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    forms = [
        real,
        real.long(),
        real.float(),
        real[:, None, None].expand(2, 1, 3, 3),
        additive,
        additive.half(),
    ]
    assert all(torch.equal(real_tokens(form, hidden), real) for form in forms)
    assert real_tokens(None, hidden).all()


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 3), "causal"], ids=["3-d", "an object"])
def test_a_mask_of_another_form_is_refused_with_the_remedy(mask) -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        real_tokens(mask, torch.zeros(2, 3, 4))


def test_the_compute_dtype_is_that_of_autocast_where_it_is_on() -> None:
    hidden = torch.zeros(2)
    assert compute_dtype(hidden) == torch.float32 and compute_dtype(hidden.half()) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(hidden) == torch.bfloat16


class Pair(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        return input_ids


def test_the_recorder_knows_arguments_by_name_however_they_were_given() -> None:
    model, recorder = Pair(), InputRecorder()
    recorder.attach(model)
    model(torch.ones(1), torch.zeros(1), labels=torch.ones(2))
    assert {name: value.tolist() for name, value in recorder.inputs.items()} == {
        "input_ids": [1.0],
        "attention_mask": [0.0],
        "labels": [1.0, 1.0],
    }
    model(input_ids=torch.ones(3))
    assert list(recorder.inputs) == ["input_ids"]
    recorder.detach()
    model(torch.ones(1))
    assert recorder.inputs == {} and not model._forward_pre_hooks


def test_copies_of_a_model_have_recorders_of_their_own() -> None:
    model, recorder = Pair(), InputRecorder()
    recorder.attach(model)
    model(torch.ones(1))
    twin, its_recorder = copy.deepcopy((model, recorder))
    twin(torch.zeros(2))
    assert recorder.inputs["input_ids"].shape == (1,) and its_recorder.inputs["input_ids"].shape == (2,)
    its_recorder.detach()
    assert not twin._forward_pre_hooks and model._forward_pre_hooks
    alone = copy.deepcopy(recorder)
    alone.detach()
    assert model._forward_pre_hooks and pickle.loads(pickle.dumps(recorder)).inputs == {}


def test_policies_are_known_by_what_they_can_do() -> None:
    soft = SoftBottleneckPolicy(8, (0,), 4, 1, tape=Tape())
    assert isinstance(soft, KeepPolicy) and not isinstance(nn.Linear(1, 1), KeepPolicy)
    assert not isinstance(Listed(torch.ones(1, 1)), KeepPolicy), "it hides tokens, and cannot remove them"


def test_heads_find_the_first_token_of_texts_that_are_padded_on_the_left(classifier) -> None:
    model = classifier("bert")
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
    left = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
    }
    alone = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    install(model, torch.ones(2, 5).bool())
    assert torch.allclose(model(**left).logits[:1], alone, atol=1e-5)


def padding_in_row_1() -> dict[str, Tensor]:
    mask_BT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    return {"input_ids": torch.tensor([[5, 6, 0], [0, 0, 0], [5, 6, 7]]), "attention_mask": mask_BT}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_all_padding_is_refused_where_looking_is_free(
    classifier, family: str, training: bool
) -> None:
    model = classifier(family).train(training)
    policy = install(model, torch.ones(2, 3).bool())
    with pytest.raises(
        ValueError, match=r"rows \[1\] of the batch hold no token, only padding: leave them out"
    ):
        model(**padding_in_row_1())
    policy.is_active = False
    assert model(**padding_in_row_1()).logits.isfinite().all(), "as the dense model"


@pytest.mark.parametrize("policy", [SoftBottleneckPolicy, SoftContributionPolicy])
@pytest.mark.parametrize("training", [False, True])
def test_elsewhere_a_text_that_is_all_padding_has_no_nan_and_changes_no_other(
    classifier, training: bool, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = (
        {"threshold": 0.9, "shares_reach_encoder": False} if policy is SoftContributionPolicy else {}
    )
    model = classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    path = describe(model).encoder
    soft = policy(model.config.hidden_size, (0, 1), 4, 1, tape=Tape(), **settings)
    soft.is_active, soft.noise = True, 0.0
    replace_module(model, path, DroppingEncoder(get_module(model, path), soft))
    inputs = padding_in_row_1()
    others = {name: value[[0, 2]] for name, value in inputs.items()}
    expected = model.train(training)(**others).logits
    monkeypatch.setattr(
        torch.compiler, "is_compiling", lambda: True
    )  # nothing is looked at then, as on a GPU
    logits = model(**inputs).logits
    logits.sum().backward()
    assert torch.allclose(logits[[0, 2]], expected, atol=1e-5) and logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(bool((record.keep_BT.sum(dim=1) >= 1).all()) for record in soft.tape.read(TokensKept))

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.bottleneck_token_dropping import SoftBottleneckPolicy
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.layer_taps import EMBEDDINGS, LayerTaps, exits_above, scale_gradient
from lightning_compress.nn.surgery import get_module, replace_module
from lightning_compress.nn.tape import Tape
from tests.toys import tiny_bert

CLASSIFIERS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(2, 40, (batch, length), generator=torch.Generator().manual_seed(3))


def hooks_of(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_states_are_those_that_transformers_itself_returns(family: str, tiny):
    model = tiny(family, CLASSIFIERS[family])
    expected = model(ids(), output_hidden_states=True).hidden_states
    taps = LayerTaps.of(model)
    model(ids())
    assert list(taps.latest) == [EMBEDDINGS, 0, 1]
    for layer in (EMBEDDINGS, 0):
        assert torch.equal(taps.latest[layer], expected[layer + 1])
    norm = describe(model).final_norm
    last = taps.latest[1] if norm is None else get_module(model, norm)(taps.latest[1])
    assert torch.equal(last, expected[2])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_outputs_stay_bit_for_bit_with_and_without_equilibrium(family: str, tiny):
    model = tiny(family, CLASSIFIERS[family])
    expected = model(ids()).logits
    taps = LayerTaps.of(model)
    assert torch.equal(model(ids()).logits, expected)
    taps.equilibrium = exits_above([0], 2)
    assert torch.equal(model(ids()).logits, expected)


def test_a_model_has_one_set_of_taps_until_it_is_detached():
    model = tiny_bert()
    assert LayerTaps.on(model) is None
    taps = LayerTaps.of(model)
    assert LayerTaps.of(model) is taps and LayerTaps.on(model) is taps
    taps.detach()
    taps.detach()
    assert LayerTaps.on(model) is None and hooks_of(model) == 0
    assert LayerTaps.of(model) is not taps


def test_a_model_whose_hooks_were_cleared_gets_new_taps():
    model = tiny_bert()
    before = LayerTaps.of(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    assert LayerTaps.on(model) is None
    taps = LayerTaps.of(model)
    model(ids())
    assert taps is not before and list(taps.latest) == [EMBEDDINGS, 0, 1]


def test_detaching_leaves_other_hooks_alone():
    model = tiny_bert()
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(True))
    LayerTaps.of(model).detach()
    model(ids())
    assert seen == [True]


def test_arguments_are_known_by_name_and_forgotten_with_the_pass():
    model = tiny_bert()
    taps = LayerTaps.of(model)
    mask = torch.ones_like(ids())
    model(ids(), mask, labels=torch.tensor([0, 1]))
    taps.memo["x"] = 1
    assert (
        set(taps.inputs) == {"input_ids", "attention_mask", "labels"}
        and taps.inputs["attention_mask"] is mask
    )
    model(ids())
    assert set(taps.inputs) == {"input_ids"} and taps.memo == {}


def test_a_pass_of_the_base_model_alone_leaves_nothing_of_the_pass_before():
    model = tiny_bert()
    taps = LayerTaps.of(model)
    model(ids(batch=3))
    last = model.bert(ids(batch=2)).last_hidden_state
    assert {len(hidden) for hidden in taps.latest.values()} == {2} and taps.inputs == {}
    assert torch.equal(taps.latest[1], last)


def test_masks_are_those_that_layers_get():
    model = tiny_bert()
    taps = LayerTaps.of(model)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model(ids(), mask)
    assert [bool((taps.masks[layer][:, 0, 0] == mask.bool()).all()) for layer in (0, 1)] == [True, True]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_changes_neither_states_nor_gradients(family: str, tiny):
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny(family, CLASSIFIERS[family]).train()
        for module in model.modules():
            module.p = 0.0 if isinstance(module, nn.Dropout) else None
        if is_checkpointed:
            model.activation_checkpointing_enable()
        taps = LayerTaps.of(model)
        taps.equilibrium = exits_above([0], 2)
        out = model(ids(), use_cache=False).logits
        states = dict(taps.latest)
        (out.pow(2).sum() + states[0].pow(2).sum()).backward()
        assert all(taps.latest[layer] is states[layer] for layer in states)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


class Replaying(nn.Module):
    """An encoder that checkpoints around its layers, hooks included, as older releases did."""

    def __init__(self, layers: nn.ModuleList, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layers, use_reentrant

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_):
        for layer in self.layer:
            hidden_states = checkpoint(layer, hidden_states, attention_mask, use_reentrant=self.use_reentrant)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def test_hooks_inside_a_checkpoint_keep_the_states_of_the_first_run():
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_bert().train()
        if is_checkpointed:
            replace_module(model, "bert.encoder", Replaying(model.bert.encoder.layer, use_reentrant=False))
        taps = LayerTaps.of(model)
        taps.equilibrium = exits_above([0], 2)
        hidden = model.bert(ids())[0]
        states = dict(taps.latest)
        (hidden.pow(2).sum() + states[0].pow(3).sum()).backward()
        assert all(taps.latest[layer] is states[layer] for layer in states)
        gradients.append([p.grad for p in model.bert.encoder.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_reentrant_checkpoints_around_hooks_are_refused_but_passes_without_gradients_are_not():
    model = tiny_bert().train()
    replace_module(model, "bert.encoder", Replaying(model.bert.encoder.layer, use_reentrant=True))
    for layer in model.bert.encoder.layer:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda run, *args: run(*args)
    LayerTaps.of(model)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.bert(ids())
    with torch.no_grad(), pytest.warns(UserWarning, match="requires_grad"):
        model.bert(ids())


def test_token_droppings_encoder_is_tapped_too():
    model = tiny_bert()
    expected = model(ids()).logits
    policy = SoftBottleneckPolicy(32, [0, 1], 8, 1, tape=Tape())
    replace_module(model, "bert.encoder", DroppingEncoder(model.bert.encoder, policy))
    taps = LayerTaps.of(model)
    assert torch.allclose(model(ids()).logits, expected, atol=1e-6)
    assert list(taps.latest) == [EMBEDDINGS, 0, 1]


def test_a_deep_copy_has_taps_of_its_own():
    model = tiny_bert()
    taps = LayerTaps.of(model)
    taps.equilibrium = {0: 2, 1: 1}
    model(ids())
    twin = copy.deepcopy(model)
    twins = LayerTaps.on(twin)
    assert (
        twins is not None and twins is not taps and twins.latest == {} and twins.equilibrium == {0: 2, 1: 1}
    )
    twin(ids(batch=4))
    assert len(twins.latest[0]) == 4 and len(taps.latest[0]) == 2
    twins.detach()
    assert hooks_of(twin) == 0 and hooks_of(model) > 0


def test_the_copy_of_a_lone_layer_does_not_pull_the_model_in():
    model = tiny_bert()
    taps = LayerTaps.of(model)
    layer = copy.deepcopy(model.bert.encoder.layer[0])
    layer(torch.zeros(1, 2, 32))
    assert taps.latest == {}


def test_a_pickled_model_is_as_large_as_before():
    model = tiny_bert()
    LayerTaps.of(model)
    empty = len(pickle.dumps(model))
    model(ids(batch=8, length=16))
    assert len(pickle.dumps(model)) == empty
    again = pickle.loads(pickle.dumps(model))
    again(ids())
    assert len(LayerTaps.of(again).latest[0]) == 2


def test_exits_above_counts_the_head_and_refuses_layers_that_do_not_exist():
    assert exits_above([], 3) == {0: 1, 1: 1, 2: 1}
    assert exits_above([0, 1, 2], 3) == {0: 3, 1: 2, 2: 1}
    assert exits_above([1], 4) == {0: 2, 1: 2, 2: 1, 3: 1}
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="from 0 to 2"):
            exits_above([wrong], 3)


def test_a_scaled_gradient_is_the_identity_forward():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.equal(x.grad, 0.5 * x.detach())
    assert scale_gradient(x, 1.0) is x


@pytest.mark.parametrize("exits", [(0, 1, 2, 3), (0, 2), (1,), ()])
@pytest.mark.parametrize("dropping", [False, True])
def test_each_layer_gets_the_mean_gradient_of_the_exits_at_or_above_it(
    exits: tuple[int, ...], dropping: bool
):
    model = tiny_bert(num_hidden_layers=4).double()
    if dropping:
        policy = SoftBottleneckPolicy(32, [1, 2], 8, 1, tape=Tape()).double()
        policy.noise = 0.0
        replace_module(model, "bert.encoder", DroppingEncoder(model.bert.encoder, policy))
    places = sorted({*exits, 3})
    readers = {
        layer: torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
        for layer in places
    }
    taps = LayerTaps.of(model)

    def run(asked: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        model.bert(ids())
        loss = sum((taps.latest[layer][:, 0] @ readers[layer]).tanh().pow(2).sum() for layer in asked)
        loss.backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.bert.named_parameters()
        }

    alone = {layer: run([layer]) for layer in places}
    taps.equilibrium = exits_above(exits, 4)
    joint = run(places)
    for name, gradient in joint.items():
        parts = name.split(".")
        above = [layer for layer in places if parts[1] != "layer" or layer >= int(parts[2])]
        mean = sum(alone[layer][name] for layer in above) / len(above)
        if name.startswith(("embeddings", "encoder.layer")):
            assert torch.allclose(gradient, mean, rtol=0, atol=1e-12 * float(mean.abs().max() + 1)), name
            assert name.startswith("embeddings") or "key.bias" in name or mean.abs().max() > 0

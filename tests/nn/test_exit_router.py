"""Examples leave by exits in training form: against one example at a time, and against the packed engine."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.nn.bottleneck_token_dropping import SoftBottleneckPolicy
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.exit_rules import make_exit_rule
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import install_exits
from lightning_compress.nn.surgery import replace_module
from lightning_compress.nn.tape import Tape
from lightning_compress.runtime import pack, packed_encoder
from tests.toys_dropping import ragged_batch
from tests.toys_exits import EVERYBODY_OF_TWO

LENGTHS = [9, 1, 5, 12, 3, 5, 7, 2]
LAYERS = 4
SOME_LEAVE = {"entropy": 0.55, "max_prob": 0.72, "margin": 0.45, "patience": 1, "learned": 0.45}
CLASSIFIERS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}


@pytest.fixture
def exiting(tiny: Any) -> Any:
    """Return a builder of models in training form with exits that are sure of some examples."""

    def build(
        rule: str = "entropy", family: str = "bert", dtype: torch.dtype = torch.float64, **changes: Any
    ) -> Any:
        pooling, labels = changes.pop("pooling", "cls"), changes.pop("num_labels", 2)
        threshold = changes.pop("threshold", SOME_LEAVE[rule])
        depth = "n_layers" if family == "distilbert" else "num_hidden_layers"
        model = tiny(family, CLASSIFIERS[family], initializer_range=0.3, num_labels=labels, **{depth: LAYERS})
        install_exits(model, range(LAYERS - 1), pooling=pooling, pooler=False, dropout=0.1)
        torch.manual_seed(1)
        for head in model.exits.values():
            nn.init.normal_(head.classifier.weight, std=0.3)
        model.exit_rule = make_exit_rule(
            rule, range(LAYERS - 1), num_labels=labels, threshold=threshold, hidden_size=32
        )
        if rule == "learned":
            nn.init.normal_(model.exit_rule.guess.weight, std=0.2)
        ExitRouter(model)
        LayerTaps.of(model)
        return model.to(dtype).eval()

    return build


@torch.no_grad()
def alone(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """What each example gets by itself: states of all layers from transformers, exits and rule asked one by one."""
    plain, heads, rule = copy.deepcopy(model), model.exits, copy.deepcopy(model.exit_rule)
    router = ExitRouter.on(plain)
    assert router is not None
    router.detach()
    logits, depth = [], []
    for ids_T, mask_T in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        out = plain(input_ids=ids_T[None, mask_T.bool()], output_hidden_states=True)
        found, layers = out.logits[0], LAYERS
        rule.start(1, "cpu")
        for layer in range(LAYERS - 1):
            hidden_1TD = out.hidden_states[layer + 1]
            pooled_1D = hidden_1TD[:, 0] if heads[str(layer)].pooling == "cls" else hidden_1TD.mean(1)
            says_1C = heads[str(layer)].classifier(pooled_1D.tanh())
            if bool(rule.leaves(layer, says_1C, pooled_1D)):
                found, layers = says_1C[0], layer + 1
                break
        logits.append(found)
        depth.append(layers)
    return torch.stack(logits), depth


def packed(model: Any) -> Any:
    """The same model as it will be deployed."""
    twin = copy.deepcopy(model)
    LayerTaps.of(twin).detach()
    encoder = packed_encoder(pack(twin))
    assert encoder is not None
    encoder.exits = ExitRouter.on(twin)  # type: ignore[assignment]
    return twin


@pytest.mark.parametrize("rule", SOME_LEAVE)
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_training_form_decides_as_single_examples_and_as_the_packed_engine(
    rule: str, family: str, exiting: Any
) -> None:
    model, batch = exiting(rule, family), ragged_batch(LENGTHS)
    expected, depth = alone(model, batch)
    assert len(set(depth)) > 1, "the test is about examples that leave at different layers"
    for form in (model, packed(model)):
        with torch.no_grad():
            out = form(batch["input_ids"], batch["attention_mask"])
        assert out.exit_depth.tolist() == depth and out.exit_depth.dtype == torch.int64
        assert torch.allclose(out.logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_single_precision_agrees_to_rounding(pooling: str, exiting: Any) -> None:
    model, batch = exiting(dtype=torch.float32, pooling=pooling), ragged_batch(LENGTHS)
    expected, depth = alone(model, batch)
    for form in (model, packed(model)):
        with torch.no_grad():
            out = form(batch["input_ids"], batch["attention_mask"])
        assert out.exit_depth.tolist() == depth
        assert torch.allclose(out.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_familys_loss_is_that_of_the_answers_that_were_given(
    labels: int, family: str, exiting: Any
) -> None:
    threshold = 0.8 * float(torch.tensor(float(labels)).log())
    model, batch = exiting(family=family, num_labels=labels, threshold=threshold), ragged_batch(LENGTHS)
    for form in (model, packed(model)):
        with torch.no_grad():
            out = form(**batch)
        assert len(set(out.exit_depth.tolist())) > 1
        assert torch.allclose(out.loss, F.cross_entropy(out.logits, batch["labels"]), atol=1e-12)


def test_regression_leaves_by_patience_and_its_loss_is_that_of_the_answers(exiting: Any) -> None:
    model, batch = exiting("patience", num_labels=1, threshold=1), ragged_batch(LENGTHS)
    model.exit_rule.tolerance = 0.3
    labels = batch["labels"].double()
    for form in (model, packed(model)):
        with torch.no_grad():
            out = form(batch["input_ids"], batch["attention_mask"], labels=labels)
        assert len(set(out.exit_depth.tolist())) > 1
        assert torch.allclose(out.loss, F.mse_loss(out.logits.squeeze(), labels), atol=1e-12)


def test_with_exits_off_outputs_are_bit_for_bit_those_without(exiting: Any) -> None:
    model, batch = exiting(threshold=None), ragged_batch(LENGTHS)
    with torch.no_grad():
        out, deployed = model(**batch), packed(model)(**batch)
        router = ExitRouter.on(model)
        assert router is not None
        router.detach()
        plain = model(**batch)
        assert torch.equal(out.logits, plain.logits) and torch.equal(out.loss, plain.loss)
        assert torch.equal(deployed.logits, pack(model)(**batch).logits)
    assert out.exit_depth.tolist() == deployed.exit_depth.tolist() == [LAYERS] * len(LENGTHS)
    assert "exit_depth" not in plain


def test_a_larger_threshold_never_lets_examples_run_deeper(exiting: Any) -> None:
    model, batch = exiting(), ragged_batch(LENGTHS)
    before = torch.full((len(LENGTHS),), LAYERS)
    for threshold in (0.1, 0.3, 0.5, 0.6, 0.69, 0.7):
        model.exit_rule.threshold.fill_(threshold)
        with torch.no_grad():
            depth = model(**batch).exit_depth
        assert bool((depth <= before).all())
        before = depth
    assert before.tolist() == [1] * len(LENGTHS)


def test_nobody_leaves_while_the_model_trains(exiting: Any) -> None:
    model, batch = exiting(threshold=EVERYBODY_OF_TWO).train(), ragged_batch(LENGTHS)
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = model(**batch)
    assert "exit_depth" not in trained
    model.exit_rule.threshold.fill_(0.0)
    assert torch.equal(model.eval()(**batch).logits, trained.logits)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_dropped_tokens_and_exits_go_together_in_both_forms(pooling: str, exiting: Any) -> None:
    model, batch = exiting(pooling=pooling), ragged_batch(LENGTHS)
    torch.manual_seed(2)
    policy = SoftBottleneckPolicy(32, range(1, LAYERS), 8, 1, tape=Tape().attach(model)).double()
    with torch.no_grad():
        for sampler in policy.samplers.values():
            sampler[4].weight *= 60.0  # type: ignore[index]
        policy.threshold.fill_(10.0)
    deployed = packed(model)
    encoder = packed_encoder(deployed)
    assert encoder is not None
    encoder.policy = copy.deepcopy(policy)
    replace_module(model, "bert.encoder", DroppingEncoder(model.bert.encoder, policy))
    model.eval()
    with torch.no_grad():
        soft, hard = model(**batch), deployed.eval()(**batch)
    kept = torch.stack([segments.lengths_B for segments in encoder.latest], dim=1)
    assert bool((kept[:, 1] < torch.tensor(LENGTHS)).any()) and len(set(hard.exit_depth.tolist())) > 1
    assert soft.exit_depth.tolist() == hard.exit_depth.tolist()
    assert torch.allclose(soft.logits, hard.logits, rtol=0, atol=1e-10)


def test_tuples_stay_as_they_are(exiting: Any) -> None:
    model, batch = exiting(), ragged_batch(LENGTHS)
    with torch.no_grad():
        out = model(**batch)
        loss, logits_BC = model(**batch, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits_BC, out.logits)


def test_detaching_leaves_no_hook(exiting: Any) -> None:
    model = exiting()
    LayerTaps.of(model).detach()
    router = ExitRouter.on(model)
    assert router is not None
    router.detach()
    assert ExitRouter.on(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_decide_for_themselves(exiting: Any) -> None:
    model, batch = exiting(), ragged_batch(LENGTHS)
    with torch.no_grad():
        expected = model(**batch).exit_depth.tolist()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.exit_rule.threshold.fill_(0.7)
            assert twin(**batch).exit_depth.tolist() == [1] * len(LENGTHS)
        assert model(**batch).exit_depth.tolist() == expected


@pytest.mark.parametrize("has_labels", [False, True])
def test_code_compiled_for_a_model_without_exits_never_goes_unnoticed(has_labels: bool, exiting: Any) -> None:
    """``torch.compile`` reuses code among models and does not look at hooks; answers are repaired, losses refused."""
    model, batch = exiting(), ragged_batch(LENGTHS)
    deployed = packed(model)
    router = ExitRouter.on(deployed)
    assert router is not None
    deployed.classifier._forward_hooks.clear()  # what compiled code does not see
    with torch.no_grad():
        if has_labels:
            with pytest.raises(RuntimeError, match=r"torch.compiler.reset\(\)"):
                deployed(**batch)
        else:
            batch.pop("labels")
            assert torch.allclose(deployed(**batch).logits, model(**batch).logits, atol=1e-10)


def test_a_single_example_and_one_class_of_answer_are_no_special_case(exiting: Any) -> None:
    model = exiting(threshold=EVERYBODY_OF_TWO)
    with torch.no_grad():
        out = model(torch.tensor([[5, 6]]))
        assert out.exit_depth.tolist() == [1] and out.logits.shape == (1, 2)
        assert packed(model)(torch.tensor([[5, 6]])).exit_depth.tolist() == [1]


@pytest.mark.parametrize("rule", ["entropy", "patience"])
def test_threads_that_share_a_packed_model_get_their_own_answers(exiting, rule):
    model, batch = pack(exiting(rule)), ragged_batch(LENGTHS)

    @torch.no_grad()
    def answer(example: int) -> tuple[Tensor, int]:
        place = slice(example % 8, example % 8 + 1)
        out = model(**{name: value[place] for name, value in batch.items()})
        return out.logits[0], int(out.exit_depth)

    alone = [answer(example) for example in range(8)]
    assert len({depth for _, depth in alone}) > 1
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(answer, range(160)))
    for example, (logits_C, depth) in enumerate(together):
        assert depth == alone[example % 8][1]
        torch.testing.assert_close(logits_C, alone[example % 8][0])

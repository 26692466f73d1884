"""MultiExit from settings to the deployed model, alone and beside other methods; and decoders that draft early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertForTokenClassification, BertModel

from lightning_compress.callbacks import MultiExit
from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, load, save_pretrained
from lightning_compress.methods import multi_exit, restore
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import exit_logits, exit_states
from lightning_compress.plan import CompressionPlan, PlanError
from lightning_compress.runtime import is_packed, pack, packed_encoder
from lightning_compress.runtime.exit_dial import choose_exit_threshold, set_exit_threshold
from tests.toys import tiny_bert
from tests.toys_dropping import ragged_batch
from tests.toys_training import training_steps

STEM = "multi_exit"
LENGTHS = [9, 1, 5, 12, 3, 5, 7, 2]
RULES = {"entropy": 0.6, "max_prob": 0.7, "margin": 0.4, "patience": 1, "learned": 0.5}
FAMILIES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}


def prepared(model: Any = None, *others: Any, **settings: Any) -> tuple[Compressor, Any]:
    model = model if model is not None else tiny_bert(num_hidden_layers=4)
    compressor = Compressor(model, [MultiExitConfig(**settings), *others])
    compressor.prepare()
    return compressor, compressor.handles[STEM]


def make_sure(model: Any) -> None:
    """Give exits opinions that differ from text to text."""
    torch.manual_seed(1)
    for head in model.exits.values():
        nn.init.normal_(head.classifier.weight, std=0.5)
    if hasattr(model.exit_rule, "guess"):
        nn.init.normal_(model.exit_rule.guess.weight, std=0.3)


def let_some_leave(model: Any) -> None:
    """Put the threshold where half of the texts leave by the first exit that is asked."""
    taps = LayerTaps.of(model)
    run(model)
    with torch.no_grad():
        states_BD, layer = exit_states(model)[0], 0
        measure_B = model.exit_rule.measure(layer, exit_logits(model)[layer], states_BD)
    model.exit_rule.threshold.fill_(float(measure_B.median()) * (1 + 1e-5))
    assert taps is LayerTaps.on(model)


def train(compressor: Compressor, steps: int = 8) -> list[float]:
    torch.manual_seed(0)
    return [
        float(loss) for loss in training_steps(compressor, lambda _: ragged_batch(LENGTHS), steps, lr=2e-3)
    ]


@torch.no_grad()
def run(model: Any, **batch: Tensor) -> Any:
    batch = batch or ragged_batch(LENGTHS)
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.1, "max_drop": 0.01}, "threshold and max_drop are different ways"),
        ({"target_flops": 0.5, "max_drop": 0.01}, "target_flops and max_drop are different ways"),
        ({"target_flops": 0.0}, r"target_flops=0.0 is outside \(0, 1\]"),
        ({"max_drop": 1.0}, r"max_drop=1.0 is outside \[0, 1\)"),
        ({"rule": "luck"}, "rule='luck' is not one of"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"rule": "max_prob", "threshold": 1.5}, "threshold=1.5"),
        ({"rule": "patience", "threshold": 0.5}, "threshold=0.5"),
        ({"rule": "patience", "tolerance": 0.0}, "tolerance=0.0"),
        (
            {"rule": "patience", "threshold": 2, "exits": (0, 1)},
            "threshold=2 .* of 2 exits, 1: give a smaller",
        ),
        ({"pooling": "last"}, "pooling='last' is not one of"),
        ({"dropout": 1.0}, r"dropout=1.0 is outside \[0, 1\)"),
        ({"label_weight": -1.0}, "label_weight=-1.0 is not a number from 0"),
        ({"final_weight": float("inf")}, "final_weight=inf is not a number from 0"),
        ({"warmup": 1.0}, r"warmup=1.0 is outside \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiExitConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": "low"}, "threshold='low' is of type str, but stands for a number"),
        (
            {"exits": 3},
            r"exits=3 is of type int, but lists whole numbers: give a list of them, .* e.g. \[1\]",
        ),
        ({"exits": (0, 1.5)}, r"exits=\(0, 1.5\) is of type tuple, but lists whole numbers"),
        ({"label_weight": None}, "label_weight=None is of type NoneType, but stands for a number"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    for takes in (MultiExitConfig, MultiExit):
        with pytest.raises(TypeError, match=message):
            takes(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.7}, r"threshold=0.7 .* outside \[0, 0.6931\], what it measures of 2 classes"),
        ({"rule": "max_prob", "threshold": 0.4}, r"threshold=0.4 .* outside \[0.5, 1\]"),
        ({"rule": "patience", "threshold": 3}, "of 3 exits, 2: give a smaller one"),
    ],
)
def test_a_threshold_beyond_what_can_be_measured_is_refused_before_training(
    settings: dict[str, Any], message: str
) -> None:
    model = tiny_bert(num_hidden_layers=4)
    with pytest.raises(ValueError, match=message):
        multi_exit.prepare(model, MultiExitConfig(**settings))
    assert not hasattr(model, "exits") and not hasattr(model, "exit_rule")


# preparing


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_stay_bit_for_bit_until_there_is_a_threshold(family: str, tiny: Any) -> None:
    model = tiny(family, FAMILIES[family])
    dense = run(model).logits
    prepared(model)
    out = run(model)
    assert torch.equal(out.logits, dense) and out.exit_depth.tolist() == [2] * len(LENGTHS)


def test_layers_get_the_mean_of_the_gradients_of_their_exits_unless_told_otherwise() -> None:
    assert prepared(exits=(1,))[1].taps.equilibrium == {0: 2, 1: 2, 2: 1, 3: 1}
    assert prepared(exits=(1,), equilibrium=False)[1].taps.equilibrium is None


def test_the_loss_of_all_exits_falls_and_each_exit_learns() -> None:
    compressor, handle = prepared(dropout=0.0)
    before = {layer: head.classifier.weight.clone() for layer, head in handle.model.exits.items()}
    losses = train(compressor, 20)
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        float((head.classifier.weight - before[layer]).detach().abs().max()) > 1e-3
        for layer, head in handle.model.exits.items()
    )


@pytest.mark.parametrize("rule", ["entropy", "max_prob", "margin"])
def test_rules_that_compare_classes_are_refused_for_numbers(rule: str) -> None:
    with pytest.raises(ValueError, match="rule='patience' or rule='learned' for regression"):
        prepared(tiny_bert(num_labels=1), rule=rule)
    for known in ("patience", "learned"):
        prepared(tiny_bert(num_labels=1), rule=known)


def test_models_that_do_not_answer_once_per_text_are_refused(tiny: Any) -> None:
    config = tiny_bert().config
    for model, message in (
        (BertForTokenClassification(config), "no head that answers once per text"),
        (BertModel(config), "no head that answers once per text"),
        (tiny("llama", "LlamaForSequenceClassification"), "decoder without a language-model head"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(model)
    with pytest.raises(ValueError, match="one class or one number per text"):
        prepared(tiny_bert(problem_type="multi_label_classification"))


def test_packed_models_and_models_with_exits_are_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        prepared(pack(tiny_bert(num_hidden_layers=3)))
    compressor, _ = prepared()
    with pytest.raises(ValueError, match="has exits already"):
        multi_exit.prepare(compressor.model, MultiExitConfig())


# evaluation decides as the converted model does


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_while_training_decides_as_the_converted_model(rule: str, dtype: torch.dtype) -> None:
    compressor, handle = prepared(
        tiny_bert(num_hidden_layers=4, initializer_range=0.3).to(dtype), rule=rule, threshold=RULES[rule]
    )
    make_sure(handle.model)
    before = run(handle.model)
    assert len(set(before.exit_depth.tolist())) > 1
    compressor.convert()
    after = run(handle.model)
    assert is_packed(handle.model) and after.exit_depth.tolist() == before.exit_depth.tolist()
    assert torch.allclose(after.logits, before.logits, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_head_survives_saving(
    family: str, pooler: bool, pooling: Any, tiny: Any, tmp_path: Path
) -> None:
    model = tiny(family, FAMILIES[family], initializer_range=0.3, num_labels=3)
    compressor, _ = prepared(model, pooling=pooling, pooler=pooler, normalized=True)
    make_sure(model)
    let_some_leave(model)
    attach_plan(model, compressor.convert())
    expected = run(model)
    save_pretrained(model, tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    out = run(again)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.exit_depth, expected.exit_depth)
    assert len(set(out.exit_depth.tolist())) > 1


def test_nobody_waits_for_gradients_of_deployed_exits() -> None:
    compressor, handle = prepared(rule="learned", threshold=0.5)
    compressor.convert()
    parts = [*handle.model.exits.parameters(), *handle.model.exit_rule.parameters()]
    assert parts and not any(p.requires_grad for p in parts)
    fresh = tiny_bert(num_hidden_layers=4)
    restore(fresh, compressor.plan)
    assert not any(p.requires_grad for p in fresh.exits.parameters())  # type: ignore[union-attr]


def test_the_threshold_is_chosen_on_data_after_conversion_and_saved(tmp_path: Path) -> None:
    compressor, handle = prepared(tiny_bert(num_hidden_layers=4, initializer_range=0.3))
    make_sure(handle.model)
    attach_plan(handle.model, compressor.convert())
    batches = [ragged_batch(LENGTHS, seed=seed) for seed in range(3)]
    point = choose_exit_threshold(handle.model, batches, target_flops=0.8)
    assert 0.4 < point.flops_ratio <= 0.8
    expected = run(handle.model)
    assert len(set(expected.exit_depth.tolist())) > 1
    save_pretrained(handle.model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(run(again).exit_depth, expected.exit_depth)
    set_exit_threshold(again, None)
    assert run(again).exit_depth.tolist() == [4] * len(LENGTHS)


# plans


def test_reverting_takes_everything_away_again() -> None:
    compressor, handle = prepared(threshold=0.5)
    compressor.apply_plan(CompressionPlan("bert"))
    model = handle.model
    assert list(model.state_dict()) == list(tiny_bert(num_hidden_layers=4).state_dict())
    assert ExitRouter.on(model) is None and LayerTaps.on(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    compressor, handle = prepared(model, threshold=0.5)
    assert list(model.exits) == ["0", "1", "2"]
    compressor.convert()
    compressor.apply_plan(CompressionPlan("bert"))
    assert list(model.state_dict()) == list(tiny_bert(num_hidden_layers=4).state_dict())
    assert not is_packed(model) and ExitRouter.on(model) is None


def test_the_dense_skeleton_has_no_exits_and_the_model_keeps_its_own() -> None:
    compressor, handle = prepared(threshold=0.5)
    for _ in range(2):
        skeleton = compressor.dense_skeleton()
        assert list(skeleton.state_dict()) == list(tiny_bert(num_hidden_layers=4).state_dict())
        assert list(handle.model.exits) == ["0", "1", "2"] and ExitRouter.on(handle.model) is not None
        if compressor.is_prepared:
            compressor.convert()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": [0, 3]}, "layers from 0 to 2"),
        ({"exits": "all"}, "list of whole numbers"),
        ({"rule": "luck"}, "rule='luck'"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"normalized": None}, "does not fit"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    compressor, _ = prepared()
    data = compressor.convert().to_dict()
    record = data["methods"][0]["structure"]
    record.update(change)
    if change.get("normalized", 0) is None:
        record.pop("normalized")
    with pytest.raises(PlanError, match=message):
        restore(tiny_bert(num_hidden_layers=4), CompressionPlan.from_dict(data))


def test_a_base_model_cannot_hold_the_exits_of_a_classifier(tmp_path: Path) -> None:
    compressor, handle = prepared()
    attach_plan(handle.model, compressor.convert())
    save_pretrained(handle.model, tmp_path)
    with pytest.raises(PlanError, match="AutoModelForSequenceClassification"):
        AutoModel.from_pretrained(tmp_path)


# beside other methods


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_low_ranks_dropped_tokens_and_exits_in_one_run(pooling: Any, tmp_path: Path) -> None:
    drop = BottleneckTokenDroppingConfig(removal_weight=9.0, warmup=0.0, sampler_lr=0.05)
    rank = SoftThresholdRankConfig(target_params=0.5, rank_multiple=4)
    model = tiny_bert(num_hidden_layers=4, initializer_range=0.3)
    compressor, _ = prepared(model, drop, rank, pooling=pooling, dropout=0.0)
    train(compressor, 10)
    make_sure(model)
    let_some_leave(model)
    before = run(model)
    attach_plan(model, compressor.convert())
    after = run(model)
    encoder = packed_encoder(model)
    assert encoder is not None and encoder.policy is not None and encoder.exits is not None
    assert after.exit_depth.tolist() == before.exit_depth.tolist() and len(set(after.exit_depth.tolist())) > 1
    assert torch.allclose(after.logits, before.logits, atol=1e-4)
    save_pretrained(model, tmp_path)
    assert torch.equal(run(load(tmp_path)).logits, after.logits)


def test_exits_of_a_model_that_trains_are_found_by_other_methods() -> None:
    _, handle = prepared(dropout=0.3)
    handle.model.train()(**ragged_batch([3, 4]))
    first = exit_logits(handle.model)
    assert sorted(first) == [0, 1, 2] and all(logits_BC.requires_grad for logits_BC in first.values())


# decoders


DECODERS = {"gpt2": ("GPT2LMHeadModel", "n_layer"), "llama": ("LlamaForCausalLM", "num_hidden_layers")}


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoders_exits_train_without_weights_of_their_own_and_leave_it_as_it_was(
    family: str, tiny: Any, tmp_path: Path
) -> None:
    name, depth = DECODERS[family]
    model = tiny(family, name, **{depth: 3})
    ids_BT = torch.randint(2, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    compressor, handle = prepared(model, exits=(0, 1))
    names, losses = [n for n, _ in model.named_parameters()], []
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=5e-3)
    model.train()
    for _ in range(15):
        compressor.begin_step()
        task = model(ids_BT, labels=ids_BT).loss
        terms = compressor.take_loss_terms()
        (task + sum(terms.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(terms["multi_exit/labels"].detach()))
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(ids_BT).logits
    attach_plan(model, compressor.convert())
    assert torch.equal(model(ids_BT).logits, expected) and not hasattr(model, "exits")
    assert [n for n, _ in model.named_parameters()] == names and handle.router is None
    save_pretrained(model, tmp_path)
    assert torch.allclose(load(tmp_path).eval()(ids_BT).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_gradient_equilibrium_holds_in_decoders(family: str, tiny: Any) -> None:
    name, depth = DECODERS[family]
    model = tiny(family, name, **{depth: 4}).double().train()
    model.set_attn_implementation("sdpa")
    near = 1e-12 if family == "gpt2" else 1e-6  # Llama's norms are computed in fp32
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _, handle = prepared(model, exits=(0, 2))
    ids_BT = torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    layers = model.transformer.h if family == "gpt2" else model.model.layers

    def gradients(asked: list[int], counts: dict[int, int] | None) -> list[dict[str, Tensor]]:
        handle.taps.equilibrium = counts
        model.zero_grad()
        out = model(ids_BT).logits
        said = {**exit_logits(model), 3: out}
        sum(said[layer].log_softmax(-1)[..., 0].sum() for layer in asked).backward()
        return [{n: p.grad.clone() for n, p in l.named_parameters() if p.grad is not None} for l in layers]  # noqa: E741

    counts = dict(handle.taps.equilibrium)
    alone, joint = {at: gradients([at], None) for at in (0, 2, 3)}, gradients([0, 2, 3], counts)
    for layer, found in enumerate(joint):
        above = [at for at in (0, 2, 3) if at >= layer]
        assert found and counts[layer] == len(above)
        for parameter, gradient in found.items():
            mean = sum(alone[at][layer][parameter] for at in above) / len(above)
            assert torch.allclose(gradient, mean, rtol=near, atol=near)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_generation_that_drafts_with_an_exit_is_lossless(exit_layer: int, tiny: Any) -> None:
    """``assistant_early_exit=n`` drafts with the first n layers, whose last has the exit n - 1."""
    model = tiny("llama", "LlamaForCausalLM", num_hidden_layers=3)
    compressor, _ = prepared(model, exits=(exit_layer - 1,))
    compressor.convert()
    model.eval().generation_config.pad_token_id = 0
    calls = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    ids_1T = torch.randint(2, 50, (1, 5), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids_1T)}
    expected = model.generate(ids_1T, **settings)
    assert expected.shape == (1, 15) and calls == [10, 10, 10]
    assert torch.equal(model.generate(ids_1T, assistant_early_exit=exit_layer, **settings), expected)
    assert calls[exit_layer - 1] > calls[exit_layer], "earlier layers drafted alone"


@pytest.mark.parametrize("goal", [{"threshold": 0.1}, {"target_flops": 0.5}, {"max_drop": 0.01}])
def test_no_token_of_a_decoder_leaves_early(goal: dict[str, float], tiny: Any) -> None:
    with pytest.raises(ValueError, match="assistant_early_exit"):
        prepared(tiny("llama", "LlamaForCausalLM"), **goal)

"""Examples leave the packed engine early, against one example at a time through the family's own model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_compress import load, save_pretrained
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.runtime.exit_dial import choose_exit_threshold, exit_threshold
from lightning_compress.runtime.packing import is_packed, pack, packed_encoder, unpack
from lightning_compress.runtime.static import make_static, static_counts
from tests.runtime.conftest import FAMILIES, HalfPolicy, MaskedEncoder, ragged
from tests.toys_exits import EVERYBODY_OF_TWO, ToyExits, add_exits, alone, exiting_model, together

LENGTHS = [9, 1, 5, 12, 3, 5, 7, 2]
LAYERS = 4
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SOME_LEAVE = {"entropy": 0.6, "max_prob": 0.65, "margin": 0.35, "patience": 1, "learned": 0.5}
"""Thresholds at which some of the random examples leave at every exit."""


@pytest.fixture
def deep(classifier):
    """Return a builder of models with four layers and logits large enough to be sure of something."""

    def build(family: str = "bert", dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
        depth = {"n_layers": LAYERS} if family == "distilbert" else {"num_hidden_layers": LAYERS}
        return classifier(family, **depth, **changes).to(dtype)

    return build


def exiting(model: nn.Module, exits: ToyExits) -> nn.Module:
    packed_encoder(pack(model)).exits = exits
    return model


def counts(model: nn.Module) -> list[list[int]]:
    """Rows of each example at each layer."""
    return [segments.lengths_B.tolist() for segments in packed_encoder(model).latest]


@EACH_FAMILY
@pytest.mark.parametrize("rule", SOME_LEAVE)
def test_a_batch_equals_the_familys_own_model_one_example_at_a_time(deep, family, rule):
    model, batch = deep(family), ragged(LENGTHS)
    exits = add_exits(model, rule, threshold=SOME_LEAVE[rule])
    expected, depth = alone(model, exits, batch)
    found, layers = together(exiting(model, exits), exits, batch)
    assert layers == depth
    assert len(set(depth)) > 1, "the test is about examples that leave at different layers"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@EACH_FAMILY
def test_single_precision_agrees_to_rounding(deep, family):
    model, batch = deep(family, torch.float32), ragged(LENGTHS)
    exits = add_exits(model, threshold=0.6)
    expected, depth = alone(model, exits, batch)
    found, layers = together(exiting(model, exits), exits, batch)
    assert layers == depth
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_more_classes_and_exits_that_read_the_mean_of_all_tokens(deep):
    model, batch = deep(num_labels=5), ragged(LENGTHS)
    exits = add_exits(model, "entropy", "mean", threshold=1.45)
    expected, depth = alone(model, exits, batch)
    found, layers = together(exiting(model, exits), exits, batch)
    assert layers == depth and len(set(depth)) > 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@EACH_FAMILY
def test_order_and_padding_change_nothing(deep, family):
    model, batch, order = deep(family), ragged(LENGTHS), torch.tensor([4, 0, 7, 5, 2, 6, 1, 3])
    exits = add_exits(model, threshold=0.6)
    exiting(model, exits)
    expected, depth = together(model, exits, batch)
    wide = {
        name: nn.functional.pad(value, (0, 7), value=name == "input_ids") for name, value in batch.items()
    }
    for changed, places in (
        (wide, torch.arange(len(order))),
        ({n: v[order] for n, v in batch.items()}, order),
    ):
        found, layers = together(model, exits, changed)
        torch.testing.assert_close(found, expected[places], rtol=1e-10, atol=1e-10)
        assert layers == [depth[place] for place in places.tolist()]


@pytest.mark.parametrize("lengths", [[1], [7], [1, 1, 1], [4, 4]], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.6, EVERYBODY_OF_TWO])
def test_single_examples_single_tokens_and_equal_lengths_run(deep, lengths, threshold):
    model, batch = deep(), ragged(lengths)
    exits = add_exits(model, threshold=threshold)
    expected, depth = alone(model, exits, batch)
    found, layers = together(exiting(model, exits), exits, batch)
    assert layers == depth
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@EACH_FAMILY
@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_off_is_bit_equal_to_the_packed_forward_without_exits(classifier, family, head):
    model, batch = classifier(family, head).float(), ragged(LENGTHS)
    pack(model)
    with torch.no_grad():
        expected = model(**batch)[0]
        exits = add_exits(model)
        found = exiting(model, exits)(**batch)[0]
        exits.rule.threshold.fill_(1e-9)  # on, and nobody is that sure
        nobody = model(**batch)[0]
    assert torch.equal(found, expected) and torch.equal(nobody, expected)
    assert exits.looked == [(0, list(range(len(LENGTHS))))]


def test_when_all_leave_at_the_first_exit_no_later_layer_runs(deep):
    model, batch = deep(), ragged(LENGTHS)
    exits = add_exits(model, threshold=EVERYBODY_OF_TWO)
    seen = []
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.output.dense.register_forward_hook(lambda *_, index=index: seen.append(index))
    _, depth = together(exiting(model, exits), exits, batch)
    assert depth == [1] * len(LENGTHS)
    assert seen == [0]
    assert counts(model) == [LENGTHS] + [[0] * len(LENGTHS)] * (LAYERS - 1)
    assert exits.looked == [(0, list(range(len(LENGTHS))))]


def test_counts_of_tokens_are_of_all_examples_and_zero_after_leaving(deep):
    model, batch = deep(), ragged(LENGTHS)
    exits = add_exits(model, threshold=0.6)
    _, depth = together(exiting(model, exits), exits, batch)
    by_hand = [
        [length * (layers > layer) for length, layers in zip(LENGTHS, depth, strict=True)]
        for layer in range(LAYERS)
    ]
    assert counts(model) == by_hand
    places = [segments.origin_N.tolist() for segments in packed_encoder(model).latest]
    real = batch["attention_mask"].flatten()
    for layer, found in enumerate(places):
        there = torch.tensor([layers > layer for layers in depth]).repeat_interleave(max(LENGTHS))
        assert found == (real.bool() & there).nonzero().flatten().tolist()
    assert [layer for layer, _ in exits.looked] == list(exits.layers)[: len(exits.looked)]
    for layer, examples in exits.looked:
        assert examples == [example for example, layers in enumerate(depth) if layers > layer]


def test_mean_depth_falls_as_the_threshold_of_entropy_rises(deep):
    model, batch = deep(), ragged([5] * 24)
    exits = add_exits(model)
    exiting(model, exits)
    means = []
    for threshold in [0.0, 0.2, 0.4, 0.5, 0.6, 0.65, 0.69, 0.7]:
        exits.rule.threshold.fill_(threshold)
        means.append(sum(together(model, exits, batch)[1]) / 24)
    assert means == sorted(means, reverse=True)
    assert means[0] == LAYERS and means[-1] == 1.0 and len(set(means)) > 3


def test_a_single_exit_may_be_left_unasked(deep):
    model, batch = deep(), ragged(LENGTHS)
    exits = add_exits(model, threshold=EVERYBODY_OF_TWO)
    exits.rule.is_checked_K[0] = False
    _, depth = together(exiting(model, exits), exits, batch)
    assert depth == [2] * len(LENGTHS)
    assert [layer for layer, _ in exits.looked] == [1]


def test_exits_and_dropped_tokens_share_one_encoder(deep):
    model, batch = deep(), ragged(LENGTHS)
    slow, policy = copy.deepcopy(model), HalfPolicy(layers=LAYERS)
    exits = add_exits(model, threshold=0.6)
    exiting(model, exits)
    packed_encoder(model).policy = policy
    found, depth = together(model, exits, batch)
    assert len(set(depth)) > 1
    truth = MaskedEncoder.install(slow, policy, batch["attention_mask"])
    states = []
    for layer in slow.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: states.append(out[:, 0]))
    with torch.no_grad():
        expected = slow(**batch).logits
        for example, layers in enumerate(depth):
            says = [exits.heads[str(layer)](states[layer][example]) for layer in exits.layers]
            sure = [exits.rule.measure(0, logits[None], logits[None]).item() < 0.6 for logits in says]
            assert layers == (sure.index(True) + 1 if any(sure) else LAYERS)
            expected[example] = says[layers - 1] if layers < LAYERS else expected[example]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    kept = [seen_BT.sum(dim=1).tolist() for seen_BT in truth.kept]
    there = [
        [n * (layers > layer) for n, layers in zip(kept[layer], depth, strict=True)]
        for layer in range(LAYERS)
    ]
    assert counts(model) == there
    assert sum(map(sum, there)) < sum(map(sum, kept)) < LAYERS * sum(LENGTHS)


def test_base_models_give_the_states_that_examples_left_with(classifier):
    model, batch = classifier("bert", "Model", num_hidden_layers=LAYERS), ragged(LENGTHS)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        exits = add_exits(model, threshold=0.6)
        found = exiting(model, exits)(**batch).last_hidden_state
    real_BT = batch["attention_mask"].bool()
    depth = [
        exits.left[example][0] + 1 if example in exits.left else LAYERS for example in range(len(LENGTHS))
    ]
    assert len(set(depth)) > 1
    for example, layers in enumerate(depth):
        torch.testing.assert_close(
            found[example][real_BT[example]],
            states[layers][example][real_BT[example]],
            rtol=1e-10,
            atol=1e-10,
        )
    assert found[~real_BT].abs().max() == 0.0


def test_while_training_nobody_leaves_and_gradients_are_those_without_exits(deep):
    model, batch = deep(), ragged(LENGTHS)
    pack(model)
    batch["labels"] = torch.arange(len(LENGTHS)) % 2
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    exits = add_exits(model, threshold=EVERYBODY_OF_TWO)
    exiting(model, exits)(**batch).loss.backward()
    assert exits.looked == []
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_gradients_reach_the_layers_that_ran_when_nobody_left_in_evaluation(deep):
    model, batch = deep(), ragged(LENGTHS)
    exits = add_exits(model)
    exiting(model, exits)(**batch).logits.sum().backward()
    assert all(layer.output.dense.weight.grad.abs().sum() > 0 for layer in model.bert.encoder.layer)


def test_an_empty_batch_gives_empty_outputs(deep):
    model = deep()
    exits = add_exits(model, threshold=0.6)
    exiting(model, exits)
    batch = {name: torch.ones(0, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert model(**batch).logits.shape == (0, 2)
    assert exits.looked == []


def test_low_precision_runs_with_its_spare_rows(deep):
    model, batch = deep(dtype=torch.bfloat16), ragged(LENGTHS)
    exits = add_exits(model, threshold=0.6)
    found, depth = together(exiting(model, exits), exits, batch)
    assert len(set(depth)) > 1
    for example, length in enumerate(LENGTHS):
        single = {name: value[example : example + 1, :length] for name, value in batch.items()}
        assert together(model, exits, single)[1] == [depth[example]]
    assert found.isfinite().all()


def test_copies_of_a_model_leave_by_exits_of_their_own(deep):
    model, batch = deep(), ragged(LENGTHS)
    exits = add_exits(model, threshold=0.6)
    expected, depth = together(exiting(model, exits), exits, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = packed_encoder(twin).exits
        assert theirs is not exits and theirs.heads is twin.exits
        found, layers = together(twin, theirs, batch)
        assert torch.equal(found, expected) and layers == depth
    assert [name for name in model.state_dict() if "exits" in name] == [
        f"exits.{layer}.{part}" for layer in exits.layers for part in ("weight", "bias")
    ]


@EACH_FAMILY
@pytest.mark.parametrize("is_fresh", [False, True])
def test_unpacking_and_packing_again_change_no_answer(deep, family, is_fresh, tmp_path):
    model, batch = exiting_model(deep(family, torch.float32)), ragged(LENGTHS)
    choose_exit_threshold(model, [batch], target_flops=0.7)
    if is_fresh:
        save_pretrained(model, tmp_path)
        model = load(tmp_path)
    with torch.no_grad():
        expected = model(**batch)
        assert len(set(expected.exit_depth.tolist())) > 1
        slow = unpack(model)(**batch)
        assert not is_packed(model)
        again = pack(model)(**batch)
    for found in (slow, again):
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert found.exit_depth.tolist() == expected.exit_depth.tolist()
    rows = [segments.num_rows for segments in packed_encoder(model).latest]
    assert rows[-1] < rows[0] == sum(LENGTHS)


def test_nobody_leaves_a_static_model_and_it_can_be_exported(deep):
    model = exiting_model(deep(dtype=torch.float32), threshold=0.5)
    batch, exits = ragged([5, 3, 5]), packed_encoder(model).exits
    static = make_static(model)
    exits.rule.threshold.fill_(exits.rule.off)
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(static(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        program = torch.export.export(static, (), batch).module()
        torch.testing.assert_close(program(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_counts_for_a_static_model_are_of_texts_that_run_all_layers(deep):
    model = exiting_model(
        deep(dtype=torch.float32), ContributionTokenDroppingConfig(), threshold=EVERYBODY_OF_TWO
    )
    batch, encoder = ragged(LENGTHS), packed_encoder(model)
    exits, encoder.exits = encoder.exits, None
    expected = static_counts(model, [batch])
    encoder.exits = exits
    assert static_counts(model, [batch]) == expected and expected[-1] >= 1
    assert encoder.exits is exits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_threshold_opens_as_it_was_saved_whatever_the_precision(deep, dtype, tmp_path):
    model = exiting_model(deep(dtype=torch.float32), rule="max_prob", threshold=0.999)
    packed_encoder(model).exits.rule.is_checked_K[1] = False
    exact = exit_threshold(model)
    save_pretrained(model, tmp_path)
    opened = load(tmp_path, dtype=dtype)
    assert next(opened.parameters()).dtype == dtype
    assert exit_threshold(opened) == exact < 1.0
    assert packed_encoder(opened).exits.rule.asked_layers() == [0, 2]
    save_pretrained(opened, tmp_path / "again")
    assert exit_threshold(load(tmp_path / "again")) == exact

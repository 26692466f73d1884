import copy

import pytest
import torch
from torch import nn

from lightning_compress.nn import row_buckets
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.segments import Segments
from lightning_compress.runtime import encoder
from lightning_compress.runtime.encoder import reads_first_token
from lightning_compress.runtime.packing import pack, packed_encoder, unpack
from tests.runtime.conftest import FAMILIES, HalfPolicy, MaskedEncoder, ragged

LENGTHS = [9, 1, 5, 12, 3, 5]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def dropping(model: nn.Module, policy: nn.Module | None = None) -> nn.Module:
    """Pack a model and give it a policy."""
    packed_encoder(pack(model)).policy = HalfPolicy() if policy is None else policy
    return model


def origins(model: nn.Module) -> list[list[int]]:
    return [segments.origin_N.tolist() for segments in packed_encoder(model).latest]


@EACH_FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_are_those_of_transformers(classifier, family, dtype, tolerance, implementation):
    model = classifier(family).to(dtype)
    model.set_attn_implementation(implementation)
    batch = ragged(LENGTHS)
    with torch.no_grad():
        expected = model(**batch).logits
        found = pack(model)(**batch).logits
        whole = pack(model)(input_ids=batch["input_ids"][3:4]).logits
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(whole, expected[3:4], rtol=tolerance, atol=tolerance)


@EACH_FAMILY
def test_a_base_model_returns_real_tokens_in_place_and_zeros_elsewhere(classifier, family):
    model, batch = classifier(family, "Model"), ragged(LENGTHS)
    real_BT = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        found = pack(model)(**batch).last_hidden_state
    torch.testing.assert_close(found[real_BT], expected[real_BT], **EXACT)
    assert found.shape == expected.shape
    assert found[~real_BT].abs().max() == 0.0


@EACH_FAMILY
def test_token_level_heads_read_every_token(classifier, family):
    model, batch = classifier(family, "ForTokenClassification"), ragged(LENGTHS)
    real_BT = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(pack(model)(**batch).logits[real_BT], expected[real_BT], **EXACT)


@EACH_FAMILY
@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_dropping_equals_hiding_the_dropped_tokens_as_keys(classifier, family, head):
    model, batch = classifier(family, head), ragged(LENGTHS)
    slow = copy.deepcopy(model)
    truth = MaskedEncoder.install(slow, HalfPolicy(), batch["attention_mask"])
    dropping(model)
    with torch.no_grad():
        expected, found = slow(**batch), model(**batch)
    kept = [seen.flatten().nonzero().flatten().tolist() for seen in truth.kept]
    assert origins(model) == kept
    assert len(LENGTHS) < len(kept[1]) < len(kept[0]) < sum(LENGTHS)
    if head == "Model":
        seen_BT = truth.kept[-1]
        torch.testing.assert_close(
            found.last_hidden_state[seen_BT], expected.last_hidden_state[seen_BT], **EXACT
        )
        assert found.last_hidden_state[~seen_BT].abs().max() == 0.0
    else:
        torch.testing.assert_close(found.logits, expected.logits, **EXACT)


@EACH_FAMILY
@pytest.mark.parametrize("drops", [False, True])
def test_a_batch_equals_its_texts_one_by_one(classifier, family, drops):
    model, batch = classifier(family), ragged(LENGTHS)
    model = dropping(model) if drops else pack(model)
    with torch.no_grad():
        together = model(**batch).logits
        alone = [
            model(input_ids=ids[None, :length]).logits
            for ids, length in zip(batch["input_ids"], LENGTHS, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@EACH_FAMILY
def test_order_and_padding_change_nothing(classifier, family):
    model = dropping(classifier(family))
    batch, order = ragged(LENGTHS), torch.tensor([4, 0, 5, 2, 1, 3])
    wide = {
        name: torch.nn.functional.pad(value, (0, 7), value=name == "input_ids")
        for name, value in batch.items()
    }
    with torch.no_grad():
        expected = model(**batch).logits
        kept = [len(rows) for rows in origins(model)]
        torch.testing.assert_close(model(**wide).logits, expected, **EXACT)
        assert [len(rows) for rows in origins(model)] == kept
        permuted = model(**{name: value[order] for name, value in batch.items()}).logits
    torch.testing.assert_close(permuted, expected[order], **EXACT)
    assert [len(rows) for rows in origins(model)] == kept


@EACH_FAMILY
def test_the_first_token_alone_is_enough(classifier, family):
    model, batch = classifier(family), ragged(LENGTHS)
    slow = copy.deepcopy(model)
    MaskedEncoder.install(slow, HalfPolicy(threshold=torch.inf), batch["attention_mask"])
    dropping(model, HalfPolicy(threshold=torch.inf))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, slow(**batch).logits, **EXACT)
    assert origins(model) == [[0, 12, 24, 36, 48, 60]] * 2


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [7], [4, 4]], ids=str)
@pytest.mark.parametrize("drops", [False, True])
def test_single_texts_single_tokens_and_equal_lengths_run(classifier, lengths, drops):
    model, batch = classifier("bert"), ragged(lengths)
    slow = copy.deepcopy(model)
    if drops:
        MaskedEncoder.install(slow, HalfPolicy(), batch["attention_mask"])
    model = dropping(model) if drops else pack(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, slow(**batch).logits, **EXACT)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
@pytest.mark.parametrize("drops", [False, True])
def test_an_empty_batch_gives_empty_outputs(classifier, head, drops):
    model = classifier("bert", head)
    model = dropping(model) if drops else pack(model)
    batch = {name: torch.ones(0, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert model(**batch)[0].shape == ((0, 2) if head == "ForSequenceClassification" else (0, 5, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drops", [False, True])
def test_half_precision_stays_near_and_finite(classifier, dtype, drops):
    model, batch = classifier("bert", initializer_range=0.1), ragged(LENGTHS)
    model = dropping(model) if drops else pack(model)
    with torch.no_grad():
        expected = model(**batch).logits
        kept = origins(model)
        low = model.to(dtype)(**batch).logits
    assert low.dtype == dtype
    assert low.isfinite().all()
    if not drops or kept == origins(model):
        torch.testing.assert_close(low.double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_spare_rows_change_no_result(classifier, head, monkeypatch):
    model, batch = dropping(classifier("bert", head)), ragged(LENGTHS)
    seen: list[int] = []

    def bucket(num_rows: int, like: torch.Tensor) -> int:
        return -(-num_rows // 16) * 16

    with torch.no_grad():
        expected, kept = model(**batch)[0], origins(model)
        monkeypatch.setattr(encoder, "bucket_of", bucket)
        monkeypatch.setattr(row_buckets, "bucket_of", bucket)
        model.get_submodule(describe(model).layers[0].linears[4].path).register_forward_hook(
            lambda module, args, output: seen.append(len(output))
        )
        torch.testing.assert_close(model(**batch)[0], expected, **EXACT)
    assert origins(model) == kept
    assert seen == [bucket(len(kept[0]), expected)] != [len(kept[0])]


def test_left_padding_puts_the_first_real_token_where_heads_read(classifier):
    model = pack(classifier("bert"))
    left = ragged([5, 3], width=6, left=True)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(**left, position_ids=positions).logits
        for row, length in enumerate([5, 3]):
            alone = model(input_ids=left["input_ids"][row : row + 1, 6 - length :]).logits
            torch.testing.assert_close(found[row : row + 1], alone, **EXACT)


@EACH_FAMILY
def test_gradients_are_those_of_the_padded_model(classifier, family):
    model, batch = classifier(family), ragged(LENGTHS)
    labels = torch.arange(len(LENGTHS)) % 2
    slow = copy.deepcopy(model)
    slow(**batch, labels=labels).loss.backward()
    pack(model)(**batch, labels=labels).loss.backward()
    expected = dict(slow.named_parameters())
    for name, parameter in model.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-9)


def test_gradients_flow_through_dropping_as_through_hiding(classifier):
    model, batch = classifier("bert"), ragged(LENGTHS)
    slow = copy.deepcopy(model)
    MaskedEncoder.install(slow, HalfPolicy(), batch["attention_mask"])
    slow(**batch).logits.square().sum().backward()
    dropping(model)(**batch).logits.square().sum().backward()
    expected = dict(slow.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-8)


def test_training_after_a_packed_evaluation_updates_what_the_next_one_runs(classifier):
    model, batch = pack(classifier("bert")), ragged(LENGTHS)
    with torch.inference_mode():
        before = model(**batch).logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(**batch, labels=torch.ones(6, dtype=torch.long)).loss.backward()
    optimizer.step()
    model.eval()
    with torch.inference_mode():
        after = model(**batch).logits
        torch.testing.assert_close(unpack(model)(**batch).logits, after, **EXACT)
    assert (after - before).abs().max() > 1e-3


@EACH_FAMILY
def test_dropout_applies_while_training_and_not_in_evaluation(classifier, family):
    model, batch = pack(classifier(family)), ragged(LENGTHS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(classifier):
    model, batch = pack(classifier("bert")), ragged(LENGTHS)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    plain, checkpointed = copy.deepcopy(model), model
    plain(**batch).logits.sum().backward()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    layer = checkpointed.bert.encoder.layer[0]
    layer.intermediate.dense.register_forward_hook(lambda *args: calls.append(1))
    checkpointed(**batch).logits.sum().backward()
    assert len(calls) == 2  # forward, and again for the backward
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_gives_the_same_logits_and_gradients(classifier):
    model = dropping(classifier("bert"))
    compiled = torch.compile(model, backend="eager")
    for lengths in ([9, 1, 5], [2, 9, 9]):
        batch = ragged(lengths)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **EXACT)
    compiled(**batch).logits.sum().backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@EACH_FAMILY
def test_outputs_that_are_not_kept_are_refused_by_argument_and_by_config(classifier, name, family):
    model, batch = pack(classifier(family)), ragged([3, 2])
    with pytest.raises(ValueError, match=f"{name}=True.*unpack"):
        model(**batch, **{name: True})
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name}=True.*unpack"):
        model(**batch)
    assert model(**batch, **{name: False}).logits.shape == (2, 2)


def test_masks_that_are_not_padding_are_refused(classifier):
    model, batch = pack(classifier("bert")), ragged([4, 4])
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="differs from query to query"):
        model(batch["input_ids"], attention_mask=causal)
    per_head = torch.ones(2, 4, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="head to head"):
        model(batch["input_ids"], attention_mask=per_head)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_four_dimensional_padding_masks_are_read(classifier, dtype):
    model, batch = pack(classifier("bert")), ragged([4, 2])
    seen = batch["attention_mask"].bool()[:, None, None].expand(2, 1, 4, 4)
    mask = (
        seen if dtype == torch.bool else torch.zeros(2, 1, 4, 4, dtype=dtype).masked_fill(~seen, -torch.inf)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"], mask).logits, model(**batch).logits, **EXACT)


def test_texts_of_padding_only_are_named(classifier):
    batch = ragged([3, 2])
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"\[1\]"):
        pack(classifier("bert"))(**batch)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "past_key_values"])
def test_what_only_decoders_use_is_refused(classifier, name):
    packed = packed_encoder(pack(classifier("bert", "Model")))
    hidden = torch.zeros(1, 3, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=name):
        packed(hidden, **{name: hidden})
    with pytest.raises(ValueError, match="is_causal"):
        packed(hidden, is_causal=True)


def test_the_latest_segments_are_those_that_entered_each_attention(classifier):
    model = pack(classifier("bert"))
    with torch.no_grad():
        model(**ragged([2, 3]))
    latest = packed_encoder(model).latest
    assert [type(segments) for segments in latest] == [Segments, Segments]
    assert origins(model) == [[0, 1, 3, 4, 5]] * 2
    assert latest[0].offsets == [0, 2, 5]


def test_layers_that_are_removed_or_replaced_after_packing_are_seen(classifier):
    model, batch = classifier("bert", num_hidden_layers=3), ragged(LENGTHS)
    slow = copy.deepcopy(model)
    pack(model)
    with torch.no_grad():
        full = model(**batch).logits
        for each in (model, slow):
            del each.bert.encoder.layer[1]
        torch.testing.assert_close(model(**batch).logits, slow(**batch).logits, **EXACT)
    assert not torch.equal(model(**batch).logits, full)


def test_a_copy_has_its_own_weights_and_policy(classifier):
    model, batch = dropping(classifier("bert")), ragged(LENGTHS)
    with torch.no_grad():
        before = model(**batch).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch).logits, before)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(twin(**batch).logits, before)
        with pytest.raises(ValueError, match=r"would lose the networks.*set_threshold_scale"):
            unpack(twin)


@pytest.mark.parametrize(
    ("family", "head", "expected"),
    [
        ("bert", "ForSequenceClassification", True),
        ("bert", "ForMultipleChoice", True),
        ("bert", "Model", False),
        ("bert", "ForMaskedLM", False),
        ("electra", "ForMultipleChoice", True),
        ("distilbert", "ForQuestionAnswering", False),
    ],
)
def test_only_heads_that_read_the_first_token_get_it_alone(classifier, family, head, expected):
    model = classifier(family, head)
    assert reads_first_token(model, describe(model)) is expected


def test_heads_that_read_more_get_every_token(classifier):
    mean = classifier("electra", "ForMultipleChoice", summary_type="mean")
    assert not reads_first_token(mean, describe(mean))
    model = classifier("bert")
    model.__class__ = type(
        "Mine", (type(model),), {"forward": lambda self, **batch: self.bert(**batch)[0].mean(1)}
    )
    assert not reads_first_token(model, describe(model))

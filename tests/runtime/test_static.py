"""Shape legend: B sequences, T padded length, K tokens that stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import load, save_pretrained, set_threshold_scale
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime import pack, packed_encoder
from lightning_compress.runtime.static import is_static, make_static, static_counts
from tests.runtime.conftest import FAMILIES, ragged
from tests.toys_dropping import dropping_bert, dropping_model, ragged_batch

LENGTHS = [9, 4, 12, 1]


def exported(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    sizes = {name: {0: torch.export.Dim("batch")} for name in batch}
    return torch.export.export(model, (), batch, dynamic_shapes=sizes).module()


def by_hand(model: nn.Module, batch: dict[str, Tensor], counts: tuple[int, ...]) -> Tensor:
    """One text at a time, unpadded, by the family's own layers over the tokens with the largest scores."""
    policy: Any = packed_encoder(model).policy
    answers = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        anatomy, length = describe(model), int(mask.sum())
        hidden_1KD = get_module(model, anatomy.embeddings)(ids[None, :length])
        for layer, count in zip(anatomy.layers, counts, strict=True):
            scores = policy.scores(layer.index, hidden_1KD)[0].tolist()
            others = sorted(range(1, len(scores)), key=lambda place: -scores[place])[: count - 1]
            hidden_1KD = hidden_1KD[:, [0, *sorted(others)]]
            hidden_1KD = get_module(model, layer.path)(hidden_1KD)
        pooled = get_module(model, anatomy.pooler)(hidden_1KD)
        answers.append(model.classifier(pooled))
    return torch.cat(answers)


@pytest.mark.parametrize("counts", [(6, 3), (12, 1), (5, 5), (1, 1), (99, 4)])
@pytest.mark.parametrize("method", [ContributionTokenDroppingConfig, BottleneckTokenDroppingConfig])
def test_the_tokens_with_the_largest_scores_stay_whatever_the_padding(method, counts):
    model = dropping_bert(method=method, initializer_range=0.3).double()
    batch = ragged_batch(LENGTHS)
    del batch["labels"]
    with torch.no_grad():
        expected = by_hand(model, batch, counts)
        logits = make_static(model, counts)(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    padded = ragged_batch(LENGTHS, padded=16)
    with torch.no_grad():
        wider = make_static(model, counts)(padded["input_ids"], padded["attention_mask"]).logits
    torch.testing.assert_close(wider, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_at_least_the_length_are_the_dense_model(classifier, family):
    dense, batch = classifier(family), ragged(LENGTHS)
    dropping = dropping_model(classifier(family)).double()
    with torch.no_grad():
        expected = dense(**batch).logits
        for static in (make_static(dropping, (12, 12)), make_static(dense), make_static(pack(dense))):
            torch.testing.assert_close(static(**batch).logits, expected, rtol=1e-9, atol=1e-9)


def test_where_thresholds_keep_exactly_the_counts_the_answers_are_those_of_the_packed_engine():
    model = dropping_bert(initializer_range=0.3).double()
    for length in (9, 12):
        batch = ragged_batch([length])
        with torch.no_grad():
            dynamic = model(batch["input_ids"]).logits
            counts = static_counts(model, [batch])
            static = make_static(model, counts)(batch["input_ids"]).logits
        assert counts[-1] < length
        torch.testing.assert_close(static, dynamic, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_program_gives_the_logits_of_the_static_model_for_any_batch(classifier, family):
    static = make_static(dropping_model(classifier(family)).float(), (6, 3))
    program = exported(static, ragged(LENGTHS))
    for lengths in ([12], [2, 12], [3, 12, 1, 1, 5]):
        batch = ragged(lengths, width=12)
        with torch.no_grad():
            torch.testing.assert_close(program(**batch).logits, static(**batch).logits, rtol=1e-5, atol=1e-5)


def test_protected_tokens_stay_before_others_also_when_exported():
    model = dropping_bert({"protect_first": 2, "protect_tokens": (39,)}, initializer_range=0.3)
    batch = ragged_batch([10, 7])
    del batch["labels"]
    batch["input_ids"][:, 5] = 39
    batch["input_ids"][0, 8] = 39
    model(**batch)  # leaves its protected tokens on the policy
    static = make_static(model, (4, 4))
    with torch.no_grad():
        torch.testing.assert_close(static(**batch).logits[:1], _dense_over(model, batch, [0, 1, 5, 8]))
        program = exported(static, batch)
        torch.testing.assert_close(program(**batch).logits, static(**batch).logits, rtol=1e-5, atol=1e-5)


def _dense_over(model: nn.Module, batch: dict[str, Tensor], places: list[int]) -> Tensor:
    anatomy = describe(model)
    hidden = get_module(model, anatomy.embeddings)(batch["input_ids"][:1])[:, places]
    for layer in anatomy.layers:
        hidden = get_module(model, layer.path)(hidden)
    return model.classifier(get_module(model, anatomy.pooler)(hidden))


def test_layers_that_do_not_decide_keep_what_gets_there():
    model = dropping_bert({"layers": (1,)}, initializer_range=0.3)
    batch = ragged_batch([9, 12])
    with torch.no_grad():
        low = make_static(model, (3, 3))(batch["input_ids"], batch["attention_mask"]).logits
        high = make_static(model, (12, 3))(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(low, high)


def test_the_model_it_was_made_from_stays_as_it_was():
    model = dropping_bert({"protect_tokens": (39,)})
    batch = ragged_batch(LENGTHS)
    del batch["labels"]
    with torch.no_grad():
        before = model(**batch).logits
        static = make_static(model, (3, 2))
        static(**batch)
        static.classifier.weight.zero_()
        assert torch.equal(model(**batch).logits, before)
    assert is_static(static)
    assert not is_static(model)


def test_saving_it_saves_the_model_it_was_made_from(tmp_path):
    model, batch = dropping_bert(), ragged_batch(LENGTHS)
    save_pretrained(make_static(model, (3, 2)), tmp_path / "model")
    again = load(tmp_path / "model")
    assert not is_static(again)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_a_base_model_without_dropping_keeps_its_shape(classifier):
    model, batch = classifier("bert", "Model"), ragged(LENGTHS)
    real_BT = batch["attention_mask"].bool()
    with torch.no_grad():
        states = make_static(model)(**batch).last_hidden_state
        expected = model(**batch).last_hidden_state
    torch.testing.assert_close(states[real_BT], expected[real_BT], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("quantile", "expected"), [(1.0, (12, 12)), (0.75, (9, 9)), (0.5, (4, 4)), (0.51, (9, 9))]
)
def test_counts_cover_the_share_of_texts_that_is_asked_for(quantile, expected):
    model = dropping_bert()
    set_threshold_scale(model, 0.0)
    model.train()
    assert static_counts(model, [ragged_batch([9, 4]), ragged_batch([12, 1])], quantile) == expected
    assert model.training


def test_counts_follow_the_dial():
    model = dropping_bert()
    set_threshold_scale(model, 1e6)
    assert static_counts(model, [ragged_batch([9, 4])]) == (1, 1)


@pytest.mark.parametrize("quantile", [0.0, 1.01])
def test_a_quantile_out_of_range_is_refused(quantile):
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        static_counts(dropping_bert(), [ragged_batch([3])], quantile)


def test_counting_needs_data():
    with pytest.raises(ValueError, match="there are no batches"):
        static_counts(dropping_bert(), [])


@pytest.mark.parametrize("counts", [(3,), (2, 3), (1, 0), (5, 4, 3)])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="must be 2 numbers of at least 1"):
        make_static(dropping_bert(), counts)


def test_counts_without_a_policy_are_refused(classifier):
    with pytest.raises(ValueError, match="need a policy that tells which tokens stay"):
        make_static(classifier("bert"), (3, 3))


def test_a_static_model_is_not_made_static_again():
    with pytest.raises(ValueError, match="static already"):
        make_static(make_static(dropping_bert(), (3, 3)))


def test_a_decoder_is_refused(tiny):
    with pytest.raises(ValueError, match="cannot run packed"):
        make_static(tiny("gpt2", "GPT2ForSequenceClassification"))

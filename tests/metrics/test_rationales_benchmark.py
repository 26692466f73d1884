"""What ``benchmarks/rationales.py`` measures with: alignment, explanations, sets of equal size.

Shape legend: B documents, T padded length.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from lightning_compress.nn.contribution_token_dropping import ContributionPolicy
from lightning_compress.runtime import pack, packed_encoder
from tests.benchmark_scripts import load_benchmark
from tests.toys import tiny_bert

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "##ness", "bad", "film", "a", ",", "very"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    return load_benchmark("rationales")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    pieces = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def dropping():
    """A model whose policy keeps about half of the tokens at each of two layers."""
    model = tiny_bert(max_position_embeddings=32, attn_implementation="sdpa").eval()
    encoder = packed_encoder(pack(model))
    assert encoder is not None
    encoder.policy = ContributionPolicy(32, layers=(0, 1), width=8)
    for module in encoder.policy.predictors.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return model


def test_every_piece_of_a_marked_word_is_a_rationale_and_special_tokens_are_not(script, tokenizer):
    document = script.align("a goodness , very bad,bad film", "1:3;4:5", 1, tokenizer, 512)
    pieces = ["[CLS]", "a", "good", "##ness", ",", "very", "bad", ",", "bad", "film", "[SEP]"]
    assert [PIECES[i] for i in document.ids] == pieces
    marked = [piece for piece, is_marked in zip(pieces, document.is_rationale, strict=True) if is_marked]
    assert marked == ["good", "##ness", ",", "bad", ",", "bad"]
    assert document.is_rationale.index(True) == 2
    assert [piece for piece, special in zip(pieces, document.is_special, strict=True) if special] == [
        "[CLS]",
        "[SEP]",
    ]


def test_documents_are_cut_and_what_is_beyond_the_cut_is_lost(script, tokenizer):
    document = script.align("very good film", "0:1;2:3", 0, tokenizer, 4)
    assert [PIECES[i] for i in document.ids] == ["[CLS]", "very", "good", "[SEP]"]
    assert document.is_rationale == [False, True, False, False]
    assert script.align("very good", "", 0, tokenizer, 9).is_rationale == [False] * 4


def test_the_rollout_is_the_first_row_of_the_product_of_mixed_attentions(script):
    torch.manual_seed(0)
    attentions = tuple(torch.rand(2, 3, 5, 5).softmax(dim=-1) for _ in range(3))
    product_BTT = torch.eye(5).expand(2, 5, 5)
    for attention in attentions:
        mixed_BTT = 0.5 * attention.mean(dim=1) + 0.5 * torch.eye(5)
        product_BTT = mixed_BTT @ product_BTT
    torch.testing.assert_close(script.attention_rollout(attentions), product_BTT[:, 0])
    by_hand_BT = sum(attentions[-1][:, head, 0] for head in range(3)) / 3
    torch.testing.assert_close(script.cls_attention(attentions), by_hand_BT)


def test_top_tokens_are_as_many_as_asked_for_and_valid(script):
    scores_BT = torch.tensor([[9.0, 1.0, 3.0, 3.0], [9.0, 1.0, 2.0, 9.0]])
    valid_BT = torch.tensor([[False, True, True, True], [False, True, True, False]])
    top_BT = script.top_tokens(scores_BT, valid_BT, torch.tensor([2, 0]))
    assert top_BT.tolist() == [[False, False, True, True], [False] * 4]
    one_BT = script.top_tokens(scores_BT, valid_BT, torch.tensor([1, 1]))
    assert one_BT.tolist() == [[False, False, True, False], [False, False, True, False]]


def test_tokens_that_leave_later_score_higher_and_ties_are_broken_by_shares(script, dropping):
    encoder = script.dropping_encoder(dropping)
    ids_BT, mask_BT = torch.randint(4, 30, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask_BT[1, 7:] = 0
    with torch.no_grad(), script.predicted_logits(encoder) as logits:
        dropping(input_ids=ids_BT, attention_mask=mask_BT)
    first_BT, second_BT = script.kept_tokens(encoder, mask_BT)
    assert first_BT.sum() > second_BT.sum() > 3 and first_BT.sum() < mask_BT.sum()
    assert bool((second_BT <= first_BT).all()) and bool((first_BT <= mask_BT.bool()).all())
    scores_BT = script.survival_scores(encoder, logits, mask_BT)
    assert torch.equal(scores_BT.floor().long(), first_BT.long() + second_BT.long())
    for row in range(3):
        left_T = mask_BT[row].bool() & ~first_BT[row]
        shares_T = torch.zeros(12)
        shares_T[mask_BT[row].bool()] = logits[0][script_rows(mask_BT, row)].softmax(dim=0)
        torch.testing.assert_close(scores_BT[row][left_T], shares_T[left_T])


def script_rows(mask_BT: torch.Tensor, row: int) -> slice:
    lengths = mask_BT.sum(dim=1).tolist()
    return slice(sum(lengths[:row]), sum(lengths[: row + 1]))


def test_methods_are_compared_at_equal_counts_and_the_row_holds_every_layer(script, tokenizer, dropping):
    dense = tiny_bert(max_position_embeddings=32, attn_implementation="eager").eval()
    texts = [("a good film , very good", "1:3"), ("bad , very bad film", "0:1;2:4"), ("a film", "0:1")]
    documents = [script.align(text, spans, 1, tokenizer, 16) for text, spans in texts]
    row = script.compare(dense, dropping, documents, batch_size=2, class_of="predicted")
    assert len(row["layers"]) == len(row["kept"]) == 2
    assert row == json.loads(json.dumps(row))
    for methods in row["layers"]:
        assert list(methods) == list(script.METHODS)
        kept = {  # rationale tokens are the same for all, so equal counts mean precision / recall are
            method: (values["precision"] or 0.0) / (values["recall"] or 1.0)
            for method, values in methods.items()
        }
        found = [ratio for ratio in kept.values() if ratio]
        assert found == pytest.approx([found[0]] * len(found), rel=1e-3)
    assert (
        row["layers"][0]["saliency"]["average_precision"] == row["layers"][1]["saliency"]["average_precision"]
    )
    script.print_table(
        [
            {
                **row,
                **script._statistics(documents),
                **dict.fromkeys(["part", "commit"], "x"),
                "max_length": 16,
                "class_of": "predicted",
                "dense": ["d", ""],
                "dropping": ["k", ""],
            }
        ]
    )


def test_a_pair_of_models_is_measured_once(script, tokenizer, dropping, tmp_path: Path, monkeypatch, capsys):
    reviews = tmp_path / "movies_rationales"
    reviews.mkdir()
    header = "label\tid\trationale_spans\tsentence_lengths\ttext\n"
    (reviews / "test.tsv").write_text(header + '1\tx\t0:1\t3\tgood " film\n0\ty\t\t2\tbad film\n')
    for name in ("dense", "dropping"):
        tiny_bert(max_position_embeddings=32).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setenv("LIGHTNING_COMPRESS_DATA", str(tmp_path))
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results" / "rationales.jsonl")
    monkeypatch.setattr(script.lightning_compress, "load", lambda folder: dropping)
    folders = ["--dense", str(tmp_path / "dense"), "--dropping", str(tmp_path / "dropping")]
    arguments = ["rationales.py", "run", *folders, "--max-length", "16"]
    for more in (["--limit", "1"], [], []):
        monkeypatch.setattr(sys, "argv", arguments + more)
        script.main()
    (row,) = [json.loads(line) for line in script.RESULTS.read_text().splitlines()]
    assert (row["documents"], row["without_rationale"], row["part"]) == (2, 1, "test")
    assert row["dense"][0] == "dense" and str(tmp_path) not in json.dumps(row)
    assert capsys.readouterr().out.count("dropping against dense") == 2
    monkeypatch.setattr(sys, "argv", ["rationales.py", "table"])
    script.main()
    assert "2 documents (test), cut at 16 tokens" in capsys.readouterr().out


def test_a_model_that_drops_nothing_is_refused(script):
    with pytest.raises(SystemExit, match="this one drops nothing"):
        script.dropping_encoder(pack(tiny_bert()))

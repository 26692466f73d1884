import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
)

from lightning_compress.nn.operator_formats import preset
from lightning_compress.nn.quantization_plan import quantize_model
from lightning_compress.report.latency_inputs import (
    check_clock,
    check_lengths,
    load_any,
    name_folders,
    random_batch,
)


def test_the_saved_architecture_decides_which_class_opens_a_folder(tmp_path: Path, models):
    models["dense"].save_pretrained(tmp_path / "classifier")
    models["dense"].bert.save_pretrained(tmp_path / "encoder")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16)).save_pretrained(
        tmp_path / "decoder"
    )
    assert isinstance(load_any(tmp_path / "classifier"), BertForSequenceClassification)
    assert isinstance(load_any(tmp_path / "encoder"), BertModel)
    assert isinstance(load_any(tmp_path / "decoder"), GPT2LMHeadModel)


def test_what_was_saved_in_bf16_opens_in_fp32_and_eval_mode(tmp_path: Path, models):
    models["dense"].to(torch.bfloat16).save_pretrained(tmp_path)
    opened = load_any(tmp_path)
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    assert not opened.training


def test_a_compressed_folder_opens_through_deploy(tmp_path: Path, monkeypatch):
    config = {"architectures": ["BertModel"], "quantization_config": {"quant_method": "lightning_compress"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    opened = nn.Linear(1, 1)
    calls = []
    module = importlib.import_module("lightning_compress.deploy.load")
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: calls.append((args, kwargs)) or opened)
    assert load_any(tmp_path) is opened
    assert calls == [((tmp_path,), {"dtype": torch.float32})]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no config.json"), ("{", "is not JSON"), ("[]", "holds a list")]
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_any(tmp_path / "absent")


def test_folders_go_by_their_last_name_unless_two_share_it(tmp_path: Path):
    a, b = tmp_path / "one" / "model", tmp_path / "two" / "model"
    assert name_folders([a, tmp_path / "dense"]) == {"model": a, "dense": tmp_path / "dense"}
    assert name_folders([a, b]) == {str(a): a, str(b): b}


def test_a_folder_against_itself_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="twice"):
        name_folders([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_ids_are_seeded_int32_known_to_every_model_and_never_padding(models):
    models["small"].config.vocab_size = 4
    batch = random_batch(models, 8, 16, seed=3, device="cpu")
    ids = batch["input_ids"]
    assert ids.dtype == torch.int32
    assert ids.shape == (8, 16)
    assert set(ids.unique().tolist()) == {1, 2, 3}  # 0 is padding, 4 and more are not known to both
    assert torch.equal(ids, random_batch(models, 8, 16, seed=3, device="cpu")["input_ids"])
    assert not torch.equal(ids, random_batch(models, 8, 16, seed=4, device="cpu")["input_ids"])
    assert bool((batch["attention_mask"] == 1).all())


def test_lengths_end_where_the_positions_end(models):
    check_lengths("dense", models["dense"], [32])
    with pytest.raises(ValueError, match=r"'dense' has 32 positions"):
        check_lengths("dense", models["dense"], [8, 33])


def test_positions_that_roberta_keeps_for_padding_do_not_count():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = RobertaModel(
        RobertaConfig(vocab_size=20, max_position_embeddings=18, pad_token_id=1, **sizes)
    ).eval()
    check_lengths("roberta", model, [16])
    model(input_ids=torch.full((1, 16), 5))
    for formats in (None, preset("w8a8")):
        if formats is not None:
            quantize_model(model, formats)
        with pytest.raises(ValueError, match="16 positions"):
            check_lengths("roberta", model, [17])


def test_a_module_without_a_vocabulary_is_refused():
    with pytest.raises(TypeError, match="Linear without config"):
        check_lengths("x", nn.Linear(1, 1), [1])


def test_the_processor_clock_is_refused_where_it_would_add_up_threads():
    check_clock("cpu", 1, "cpu")
    with pytest.raises(ValueError, match="threads=1"):
        check_clock("cpu", 2, "cpu")
    with pytest.raises(ValueError, match="unknown clock 'sun'"):
        check_clock("sun", 1, "cpu")

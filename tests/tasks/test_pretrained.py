import json
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
)

from lightning_compress.tasks.pretrained import build_model, load_config
from tests.tiny_pretrained import save_tiny_decoder, save_tiny_encoder


def test_weights_are_loaded_in_fp32_under_fused_attention(tmp_path):
    folder = save_tiny_encoder(tmp_path)
    config = load_config(folder, 0.0, num_labels=3)
    model = build_model(AutoModelForSequenceClassification, folder, config)
    assert isinstance(model, BertForSequenceClassification)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.config._attn_implementation, model.config.num_labels) == ("sdpa", 3)
    saved = BertForSequenceClassification.from_pretrained(folder, num_labels=3).bert.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.bert.state_dict().items())


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (DistilBertConfig(), "attention_dropout"),
        (GPT2Config(), "attn_pdrop"),
        (None, "attention_probs_dropout_prob"),
    ],
)
def test_attention_dropout_is_set_by_whatever_name_the_family_has_for_it(tmp_path, config, field):
    if config is None:
        save_tiny_encoder(tmp_path)
    else:
        config.save_pretrained(tmp_path)
    assert getattr(load_config(str(tmp_path), 0.25), field) == 0.25
    assert getattr(load_config(str(tmp_path), None), field) == 0.1


def test_a_folder_with_a_configuration_only_gives_fresh_weights(tmp_path):
    folder = save_tiny_decoder(tmp_path, with_weights=False)
    config = load_config(folder, 0.0)
    assert config.pad_token_id == 3
    torch.manual_seed(1)
    first = build_model(AutoModelForCausalLM, folder, config)
    second = build_model(AutoModelForCausalLM, folder, config)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_loading_says_nothing_about_the_fresh_head(tmp_path, caplog, capsys):
    folder = save_tiny_encoder(tmp_path)
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        build_model(AutoModelForSequenceClassification, folder, load_config(folder, 0.0))
    assert "MISSING" not in caplog.text + capsys.readouterr().err


def test_a_saved_classifier_of_another_size_is_refused(tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder")
    config = load_config(folder, 0.0, num_labels=3)
    build_model(AutoModelForSequenceClassification, folder, config).save_pretrained(tmp_path / "classifier")
    folder = str(tmp_path / "classifier")
    with pytest.raises(ValueError, match="with 5 labels"):
        build_model(AutoModelForSequenceClassification, folder, load_config(folder, 0.0, num_labels=5))


def test_weights_that_lack_a_part_of_the_encoder_are_refused(tmp_path):
    folder = save_tiny_encoder(tmp_path)
    config = load_config(folder, 0.0)
    config.num_hidden_layers = 3
    with pytest.raises(
        ValueError, match=r"lacks 16 weights of the bert encoder, such as 'bert\.encoder\.layer\.2"
    ):
        build_model(AutoModelForSequenceClassification, folder, config)


def test_what_is_not_a_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_config(str(tmp_path), 0.0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ValueError, match="no-such-family"):
        load_config(str(tmp_path), 0.0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_config(str(tmp_path), 0.0)

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress.data import TextClassificationData
from lightning_compress.tasks import TextClassifier
from tests.tiny_pretrained import save_tiny_encoder
from tests.toys import toy_trainer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def table(path: Path, labels: list[str]) -> str:
    """Texts of which every label has its own word."""
    words = ("good", "bad", "fine")
    rows = [f"{words[i % len(labels)]} film a b\t{labels[i % len(labels)]}" for i in range(24)]
    path.write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    return str(path)


def data(encoder: str, tmp_path: Path, labels: list[str], **settings) -> TextClassificationData:
    path = table(tmp_path / "rows.tsv", labels)
    files = dict.fromkeys(("train", "validation", "test"), path)
    return TextClassificationData(**files, tokenizer=encoder, batch_size=8, max_length=8, **settings)


def test_it_learns_takes_its_labels_from_the_data_and_logs_accuracy(encoder, tmp_path):
    torch.manual_seed(0)
    module, rows = (
        TextClassifier(encoder, learning_rate=5e-3),
        data(encoder, tmp_path, ["no", "yes", "maybe"]),
    )
    trainer = toy_trainer(max_epochs=25)
    trainer.fit(module, datamodule=rows)
    assert {"train/loss", "val/loss", "val/acc"} <= set(trainer.callback_metrics)
    assert module.model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    (metrics,) = trainer.test(module, datamodule=rows, verbose=False)
    assert metrics["test/acc"] == 1.0
    assert metrics["test/loss"] < 0.3


def test_regression_logs_the_correlation_and_predicts_numbers(encoder, tmp_path):
    module = TextClassifier(encoder)
    rows = data(encoder, tmp_path, ["0.5", "2", "3.5"], regression=True)
    trainer = toy_trainer(max_epochs=1)
    trainer.fit(module, datamodule=rows)
    assert module.model.config.problem_type == "regression"
    assert -1 <= trainer.callback_metrics["val/pearson"] <= 1
    predicted = trainer.predict(module, datamodule=rows)
    assert [batch["predictions"].shape for batch in predicted] == [(8,)] * 3
    assert "probabilities" not in predicted[0]


def test_predictions_are_probabilities_in_the_order_of_the_rows(encoder, tmp_path):
    module, rows = TextClassifier(encoder), data(encoder, tmp_path, ["0", "1"])
    trainer = toy_trainer(max_epochs=1)
    trainer.fit(module, datamodule=rows)
    first, *_ = trainer.predict(module, datamodule=rows)
    assert torch.allclose(first["probabilities"].sum(-1), torch.ones(8))
    assert torch.equal(first["probabilities"].argmax(-1), first["predictions"])
    batch = next(iter(rows.predict_dataloader()))
    with torch.no_grad():
        expected = module.model.eval()(**batch).logits.softmax(-1)
    torch.testing.assert_close(first["probabilities"], expected)


def test_a_checkpoint_opens_without_trainer_or_data(encoder, tmp_path):
    module, rows = TextClassifier(encoder), data(encoder, tmp_path, ["no", "yes", "maybe"])
    saver = ModelCheckpoint(tmp_path / "saved", filename="last")
    toy_trainer(max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, datamodule=rows)
    again = TextClassifier.load_from_checkpoint(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert (again.num_labels, again.label_names) == (3, ["maybe", "no", "yes"])
    batch = next(iter(rows.test_dataloader()))
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, module.eval()(**batch).logits)


def test_it_resumes_in_mid_epoch_bit_for_bit(encoder, tmp_path):
    def run(ckpt_path=None):
        torch.manual_seed(0)
        module, rows = TextClassifier(encoder, num_labels=2), data(encoder, tmp_path, ["0", "1"])
        module.configure_model()
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        toy_trainer(max_epochs=2, callbacks=[saver], enable_checkpointing=True).fit(
            module, datamodule=rows, ckpt_path=ckpt_path
        )
        return module.state_dict()

    whole = run()
    for step in (2, 3, 4):
        resumed = run(str(tmp_path / "steps" / f"step={step}.ckpt"))
        assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_attention_dropout_is_off_unless_asked_for(encoder):
    module = TextClassifier(encoder, num_labels=2)
    module.configure_model()
    assert module.model.config.attention_probs_dropout_prob == 0.0
    module = TextClassifier(encoder, num_labels=2, attention_dropout=0.2)
    module.configure_model()
    assert module.model.bert.encoder.layer[0].attention.self.dropout.p == 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 3}, "`num_labels=3`, but the data have 2 labels"),
        ({"label_names": ["a", "b", "c"]}, "`label_names` has 3 names for 2 labels"),
    ],
)
def test_labels_that_contradict_the_data_are_refused_before_training(encoder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        toy_trainer().fit(TextClassifier(encoder, **settings), datamodule=data(encoder, tmp_path, ["0", "1"]))


def test_labels_must_be_known(encoder):
    with pytest.raises(ValueError, match="there is no data module to take it from"):
        TextClassifier(encoder).configure_model()
    with pytest.raises(ValueError, match="`num_labels` must be at least 1, got 0"):
        TextClassifier(encoder, num_labels=0)


def test_with_a_number_of_labels_the_parameters_are_there_at_once(encoder, tmp_path):
    module = TextClassifier(encoder, num_labels=2)
    before = module.model
    assert len(list(module.parameters())) > 30
    rows = data(encoder, tmp_path, ["no", "yes"])
    toy_trainer(max_steps=1).fit(module, datamodule=rows)
    assert module.model is before
    assert module.model.config.id2label == {0: "no", 1: "yes"}
    assert list(TextClassifier(encoder).parameters()) == []


def test_a_folder_that_is_not_a_model_is_refused_before_training(encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        toy_trainer().fit(
            TextClassifier(str(tmp_path / "empty")), datamodule=data(encoder, tmp_path, ["0", "1"])
        )

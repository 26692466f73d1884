import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_compress.data import TextClassificationData
from lightning_compress.data.sampling import LengthBucketedSampler


def make(folder: str, **settings) -> TextClassificationData:
    return TextClassificationData(tokenizer=folder, **{"max_length": 16, "batch_size": 8, **settings})


def test_fitting_reads_tokenises_and_batches_both_parts(encoder_folder, reviews):
    data = make(encoder_folder, train=reviews)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == 36
    assert set(batches[0]) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batches[0]["input_ids"].shape == batches[0]["attention_mask"].shape
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 4
    assert (data.num_labels, data.label_names) == (2, None)


def test_lengths_are_the_unpadded_ones(encoder_folder, reviews):
    data = make(encoder_folder, train=reviews, validation=reviews)
    masks = [row for batch in data.train_dataloader() for row in batch["attention_mask"].sum(1).tolist()]
    assert sorted(masks) == sorted(data.lengths("train"))


def test_batches_differ_between_epochs_and_evaluation_does_not(encoder_folder, reviews):
    data = make(encoder_folder, train=reviews, validation=reviews)
    loader = data.train_dataloader()
    first = [batch["input_ids"].tolist() for batch in loader]
    loader.sampler.set_epoch(1)
    assert [batch["input_ids"].tolist() for batch in loader] != first
    evaluation = data.val_dataloader()
    assert isinstance(evaluation.sampler, LengthBucketedSampler)
    assert not evaluation.sampler.shuffle


def test_several_columns_are_joined_and_a_pair_is_kept_apart(encoder_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"title": "good", "body": "film", "other": "bad", "y": "no"},
        {"title": "a", "body": "b", "other": "c", "y": "yes"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = make(
        encoder_folder,
        train=str(path),
        validation=str(path),
        text_column=["title", "body"],
        text_pair_column="other",
        label_column="y",
    )
    (batch,) = data.val_dataloader()
    assert sorted(batch["input_ids"].tolist()) == [[2, 4, 8, 3, 5, 3], [2, 10, 11, 3, 12, 3]]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1]
    assert data.label_names == ("no", "yes")


def test_regression_gives_real_labels(encoder_folder, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("text,label\ngood,4.5\nbad,1\n")
    data = make(encoder_folder, train=str(path), validation=str(path), regression=True)
    (batch,) = data.val_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert data.num_labels == 1


def test_prediction_needs_no_labels_and_keeps_the_order_of_the_file(encoder_folder, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("text\na b c d\ngood\nbad film\n")
    data = make(encoder_folder, predict=str(path), batch_size=2)
    data.setup("predict")
    first, second = data.predict_dataloader()
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask"}
    assert first["input_ids"].tolist() == [[2, 10, 11, 12, 13, 3], [2, 4, 3, 0, 0, 0]]
    assert second["input_ids"].tolist() == [[2, 5, 8, 3]]


def test_testing_needs_no_training_file_if_the_number_of_classes_is_given(encoder_folder, reviews):
    data = make(encoder_folder, test=reviews, num_classes=2)
    data.setup("test")
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 40
    with pytest.raises(ValueError, match="give `train=` or `num_classes=`"):
        make(encoder_folder, test=reviews).setup("test")


def test_without_validation_there_are_no_validation_batches(encoder_folder, reviews):
    data = make(encoder_folder, train=reviews, validation_ratio=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="no validation part"):
        data.setup("validate")


def test_a_checkpoint_brings_its_settings_back(encoder_folder, reviews, tmp_path):
    data = make(encoder_folder, train=reviews, limit_train=5)
    checkpoint = {"datamodule_hyper_parameters": dict(data.hparams), "pytorch-lightning_version": "2.6.1"}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    again = TextClassificationData.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert len(again.lengths("train")) == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_get_equally_many_batches_of_their_own(encoder_folder, reviews, rank, monkeypatch):
    data = make(encoder_folder, train=reviews, validation=reviews)
    monkeypatch.setattr(type(data), "ranks", (2, rank))
    assert data.train_dataloader().sampler.rank == rank
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 20
    assert len(data.train_dataloader()) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "body"}, r"has no column 'body'; it has \['text', 'label'\].*`text_column`"),
        ({"text_pair_column": "body"}, "has no column 'body'.*`text_pair_column`"),
        ({"label_column": "y"}, "has no column 'y'.*`label_column`"),
        ({"num_classes": 1}, "`num_classes` must be at least 2"),
        ({"num_classes": 3, "regression": True}, "goes without `regression=True`"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"max_length": 3}, "`max_length` must be at least 4"),
        ({"max_length": 64}, "is more than the 32 tokens"),
        ({"text_column": []}, "must name at least one column"),
        ({"train": "missing.tsv"}, "does not exist"),
    ],
)
def test_mistakes_are_reported_before_training(encoder_folder, reviews, settings, message):
    with pytest.raises(ValueError, match=message):
        make(encoder_folder, **{"train": reviews, **settings}).setup("fit")


def test_a_label_outside_the_range_is_reported_before_training(encoder_folder, reviews, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\ngood,1\nbad,7\n")
    with pytest.raises(ValueError, match=r"the validation file .*row 2: label 7 is outside the range 0\.\.1"):
        make(encoder_folder, train=reviews, validation=str(bad)).setup("fit")


def test_a_missing_text_is_reported_with_its_row(encoder_folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"label": 1}\n')
    with pytest.raises(ValueError, match="row 2: the column 'text' holds no text"):
        make(encoder_folder, train=str(path), validation_ratio=0).setup("fit")


class Lengths(LightningModule):
    """Records what its rank sees."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.folder, self.rows = folder, []

    def training_step(self, batch, batch_idx):
        self.rows.append(batch["attention_mask"].sum(1).tolist())
        return self.layer(batch["labels"][:, None].float()).mean()

    def on_train_end(self):
        Path(self.folder, f"rank{self.global_rank}.json").write_text(json.dumps(self.rows))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_processes_share_the_epoch(encoder_folder, reviews, tmp_path, use_distributed_sampler):
    data = make(encoder_folder, train=reviews, batch_size=4, validation_ratio=0)
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=use_distributed_sampler,
    ).fit(Lengths(str(tmp_path)), datamodule=data)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [len(rows) for rows in ranks] == [5, 5]
    seen = [length for rows in ranks for row in rows for length in row]
    assert sorted(seen) == sorted(data.lengths("train"))


@pytest.mark.parametrize(
    ("name", "settings", "num_labels"),
    [
        ("sst2/dev.tsv", {}, 2),
        ("ag_news/test.tsv", {"text_column": ["title", "description"], "limit_train": 50}, 4),
        ("mrpc/dev.tsv", {"text_pair_column": "text2"}, 2),
    ],
)
def test_well_known_data_sets_are_read(encoder_folder, shared_data, name, settings, num_labels):
    path = shared_data / "data" / name
    if not path.is_file():
        pytest.skip(f"no {name} among the shared data sets")
    data = make(encoder_folder, train=str(path), **settings)
    data.setup("fit")
    assert data.num_labels == num_labels
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 8

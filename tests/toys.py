"""Tiny models, modules and data that stand for the user's in tests of the callbacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY, LENGTH = 40, 6
CLASSIFIERS = [
    ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("electra", "ElectraForSequenceClassification"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("llama", "LlamaForSequenceClassification"),
]
"""Families of transformers, each with its class."""


def tiny_bert(seed: int = 0, **overrides: Any) -> BertForSequenceClassification:
    """A two-layer BERT with random weights and no dropout."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    lengths = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**{**settings, **lengths, **no_dropout, **overrides})
    return BertForSequenceClassification(config)


class ToyTexts(Dataset):
    """Random token ids whose label is whether the second token is in the upper half of the vocabulary."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": (self.ids[index, 1] > VOCABULARY // 2).long()}


def toy_loader(size: int = 32, batch_size: int = 4) -> DataLoader:
    """Batches in a fixed order."""
    return DataLoader(ToyTexts(size), batch_size=batch_size)


class ToyModule(LightningModule):
    """A plain module that knows nothing of compression; ``build_in`` says where its model is built."""

    def __init__(self, build_in: str = "init", output: str = "tensor", **overrides: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build_in, self.output, self.overrides = build_in, output, overrides
        self.model: nn.Module | None = None
        if build_in == "init":
            self._build()

    def _build(self) -> None:
        if self.model is None:
            self.model = tiny_bert(**self.overrides)

    def setup(self, stage: str) -> None:
        if self.build_in == "setup":
            self._build()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return {"loss": loss, "more": 1} if self.output == "dict" else loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class LateToyModule(ToyModule):
    """Builds its model in ``configure_model``."""

    def __init__(self, output: str = "tensor", **overrides: Any) -> None:
        super().__init__(build_in="configure_model", output=output, **overrides)

    def configure_model(self) -> None:
        self._build()


def toy_trainer(**settings: Any) -> Trainer:
    """A quiet trainer on one CPU process, six steps long unless told otherwise."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    length = {} if "max_epochs" in settings else {"max_steps": 6}
    return Trainer(**{"accelerator": "cpu", "devices": 1, **quiet, **length, **settings})

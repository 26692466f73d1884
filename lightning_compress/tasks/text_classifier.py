"""``TextClassifier``: fine-tune an encoder to tell texts, or pairs of texts, apart.

It knows nothing of compression: it stands for the module a user already has.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from lightning_compress.data.embedded import MINILM
from lightning_compress.tasks.base import TransformerTask
from lightning_compress.tasks.pretrained import build_model, load_config

__all__ = ["TextClassifier"]


class TextClassifier(TransformerTask):
    """Sequence classification, or regression if there is one label.

    Logs ``train/loss``, ``val/loss``, ``test/loss`` and ``val/acc``, ``test/acc`` (for regression
    ``val/pearson``, ``test/pearson``). Batches are dicts of model inputs with ``labels``.

    Args:
        model: ``"minilm"`` (the embedded all-MiniLM-L6-v2), a folder written by ``save_pretrained``, or a hub
            name.
        num_labels: Number of classes, 1 for regression. If None it is taken from the data module, and the
            model is built in ``configure_model``; otherwise in ``__init__``, where an optimizer of
            LightningCLI finds it.
        label_names: Names of the classes, kept in the model's configuration; from the data module if None.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decay of weight matrices.
        warmup_ratio: Share of all steps in which the learning rate rises, in [0, 1).
        attention_dropout: Dropout of attention probabilities in [0, 1), or None for the model's own. Above 0,
            torch's CPU build cannot use its fused attention kernel in training and steps take longer.

    Raises:
        ValueError: An argument is out of range, or not a model. When training is set up: as many labels as
            the data do not have.
    """

    def __init__(
        self,
        model: str = MINILM,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.06,
        attention_dropout: float | None = 0.0,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_ratio, attention_dropout)
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
        self.save_hyperparameters()
        self.model_name = model
        self.num_labels = num_labels
        self.label_names = label_names
        if num_labels is not None:
            self.configure_model()

    @override
    def setup(self, stage: str) -> None:
        """Compare the labels of a model that is built already with the data's, and take their names."""
        if self.model is not None:
            self._settle_labels()
            self._name_labels(self.model.config)

    @override
    def build_model(self) -> PreTrainedModel:
        """Settle the labels, then load the encoder under a fresh head."""
        self._settle_labels()
        assert self.num_labels is not None
        config = load_config(self.model_name, self.attention_dropout, num_labels=self.num_labels)
        self._name_labels(config)
        config.problem_type = "regression" if self.is_regression else "single_label_classification"
        self.val_metric, self.test_metric = self._new_metric(), self._new_metric()
        return build_model(AutoModelForSequenceClassification, self.model_name, config)

    @property
    def is_regression(self) -> bool:
        """Whether the label is one real number."""
        return self.num_labels == 1

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss the model computes."""
        loss = self(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure loss and accuracy."""
        self._evaluate(batch, "val", self.val_metric)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure loss and accuracy."""
        self._evaluate(batch, "test", self.test_metric)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return ``predictions`` ``[batch]`` and, of a classifier, ``probabilities`` ``[batch, classes]``."""
        logits = self(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        if self.is_regression:
            return {"predictions": logits.squeeze(-1)}
        return {"probabilities": logits.softmax(dim=-1), "predictions": logits.argmax(dim=-1)}

    def _evaluate(self, batch: dict[str, Tensor], stage: str, metric: Metric) -> None:
        output = self(**batch)
        logits = output.logits.float()
        metric.update(logits.squeeze(-1) if self.is_regression else logits, batch["labels"])
        name = "pearson" if self.is_regression else "acc"
        size = len(batch["labels"])
        self.log(f"{stage}/loss", output.loss, prog_bar=stage == "val", batch_size=size, sync_dist=True)
        self.log(f"{stage}/{name}", metric, prog_bar=True, batch_size=size)

    def _new_metric(self) -> Metric:
        if self.is_regression:
            return PearsonCorrCoef()
        assert self.num_labels is not None
        return MulticlassAccuracy(self.num_labels, average="micro")

    def _settle_labels(self) -> None:
        """Take from the data what was not given, and keep it with the hyper-parameters of the checkpoint."""
        found = getattr(self.datamodule, "num_labels", None)
        if self.num_labels is None:
            if found is None:
                raise ValueError(
                    "`num_labels` is not given and there is no data module to take it from; set it."
                )
            self.num_labels = found
        elif found is not None and found != self.num_labels:
            raise ValueError(
                f"`num_labels={self.num_labels}`, but the data have {found} labels. Leave `num_labels` out,"
                " or correct the data (`num_classes`, `label_column`)."
            )
        if self.label_names is None and getattr(self.datamodule, "label_names", None) is not None:
            self.label_names = list(self.datamodule.label_names)
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"`label_names` has {len(self.label_names)} names for {self.num_labels} labels.")
        self.hparams.update(num_labels=self.num_labels, label_names=self.label_names)

    def _name_labels(self, config: PretrainedConfig) -> None:
        if self.label_names is not None:
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {name: number for number, name in enumerate(self.label_names)}

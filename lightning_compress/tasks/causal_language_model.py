"""``CausalLanguageModel``: train or fine-tune a decoder to predict the next token.

It knows nothing of compression: it stands for the module a user already has.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from lightning_compress.tasks.base import TransformerTask
from lightning_compress.tasks.pretrained import build_model, load_config

__all__ = ["CausalLanguageModel"]


class CausalLanguageModel(TransformerTask):
    """Next-token prediction.

    Logs ``train/loss``, ``val/loss``, ``test/loss`` (nats per token) and ``val/perplexity``,
    ``test/perplexity``: the exponential of the mean loss over all predicted tokens. Batches are dicts with
    ``input_ids`` and ``labels``.

    Args:
        model: A folder written by ``save_pretrained``, a hub name, or a folder that holds a ``config.json``
            and no weights, to train from scratch.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decay of weight matrices.
        warmup_ratio: Share of all steps in which the learning rate rises, in [0, 1).
        attention_dropout: Dropout of attention probabilities in [0, 1), or None for the model's own. Above 0,
            torch's CPU build cannot use its fused attention kernel in training and steps take longer.

    Raises:
        ValueError: An argument is out of range, or not a model. When training is set up: fewer embeddings
            than the data's tokenizer has tokens.
    """

    def __init__(
        self,
        model: str,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.06,
        attention_dropout: float | None = 0.0,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_ratio, attention_dropout)
        self.save_hyperparameters()
        self.model_name = model
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()
        self.configure_model()

    @override
    def setup(self, stage: str) -> None:
        """Compare the model's vocabulary with the data's."""
        assert self.model is not None, "the model is built in __init__"
        num_tokens = getattr(self.datamodule, "vocab_size", None)
        num_embeddings = self.model.config.vocab_size
        if num_tokens is not None and num_tokens > num_embeddings:
            raise ValueError(
                f"`model={self.model_name!r}` has {num_embeddings} embeddings, but the data's tokenizer"
                f" has {num_tokens} tokens; use the model's own tokenizer."
            )

    @override
    def build_model(self) -> PreTrainedModel:
        """Load the decoder, or initialise it from its configuration."""
        config = load_config(self.model_name, self.attention_dropout)
        return build_model(AutoModelForCausalLM, self.model_name, config)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss the model computes."""
        loss = self(**batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the batch to the mean loss."""
        self._evaluate(batch, "val", self.val_loss)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the batch to the mean loss."""
        self._evaluate(batch, "test", self.test_loss)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the perplexity of the whole part."""
        self.log("val/perplexity", self.val_loss.compute().exp(), prog_bar=True)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the perplexity of the whole part."""
        self.log("test/perplexity", self.test_loss.compute().exp())

    def _evaluate(self, batch: dict[str, Tensor], stage: str, mean_loss: MeanMetric) -> None:
        loss = self(**batch, use_cache=False).loss
        num_predicted = (batch["labels"][:, 1:] != -100).sum()
        mean_loss.update(loss.float(), weight=num_predicted)
        self.log(f"{stage}/loss", mean_loss, on_epoch=True, on_step=False)

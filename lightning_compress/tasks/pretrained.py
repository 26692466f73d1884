"""Build a Hugging Face model from what a user wrote, with errors that name the remedy.

The next chapter is :mod:`lightning_compress.tasks.base`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from lightning_compress.data.embedded import resolve_pretrained

__all__ = ["build_model", "load_config"]

_ATTENTION_DROPOUT_FIELDS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def load_config(model: str, attention_dropout: float | None, **changes: Any) -> PretrainedConfig:
    """Read the configuration of a model and change it where asked.

    Args:
        model: ``"minilm"``, a local folder, or a hub name.
        attention_dropout: Dropout of attention probabilities, whatever the family calls it; None leaves the
            model's own.
        **changes: Further fields to set.

    Raises:
        ValueError: Not a model: no such folder or hub model, or a ``config.json`` that is not one.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_pretrained(model), **changes)
    except (OSError, KeyError) as error:
        raise ValueError(f"`model={model!r}` cannot be loaded: {error}") from error
    if attention_dropout is not None:
        for field in _ATTENTION_DROPOUT_FIELDS:
            if hasattr(config, field):
                setattr(config, field, attention_dropout)
    if getattr(config, "pad_token_id", None) is None and getattr(config, "eos_token_id", None) is not None:
        eos = config.eos_token_id  # decoders without a padding token: as the data modules pad
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return config


def build_model(auto_class: Any, model: str, config: PretrainedConfig) -> PreTrainedModel:
    """Load pretrained weights in fp32, or initialise fresh ones if a folder holds a configuration only.

    Attention is computed by torch's fused ``scaled_dot_product_attention`` wherever the family supports it.

    Args:
        auto_class: ``AutoModelForSequenceClassification`` or another auto class.
        model: What ``config`` was loaded from.
        config: The configuration.

    Raises:
        ValueError: The weights cannot be loaded, do not fit the configuration (a head of another size), or
            lack a part of the encoder.
    """
    source = resolve_pretrained(model)
    folder = Path(source)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return auto_class.from_config(config, dtype=torch.float32)
    try:
        with _quiet_loading():
            built, report = auto_class.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"The weights of `model={model!r}` cannot be loaded into {auto_class.__name__} with"
            f" {config.num_labels} labels: {error}. If the saved classifier has another number of labels,"
            " start from the encoder it was trained from."
        ) from error
    missing = [key for key in report["missing_keys"] if key.startswith(built.base_model_prefix + ".")]
    missing = [key for key in missing if "pooler" not in key]  # masked language models come without one
    if missing:
        raise ValueError(
            f"`model={model!r}` lacks {len(missing)} weights of the {config.model_type} encoder, such as"
            f" {missing[0]!r}; it was saved from another kind of model."
        )
    return built


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence the bar and the report on head weights that are meant to be fresh."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()

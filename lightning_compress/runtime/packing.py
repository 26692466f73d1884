"""Packing and unpacking: exchange a model's encoder for the packed one, and back.

The story ends here: :func:`pack` is what users call, and what ``convert`` of the token-dropping methods calls.
"""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from lightning_compress.nn.anatomy import Anatomy, describe, find_transformer
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime.encoder import PackedEncoder

__all__ = ["is_packed", "pack", "packed_encoder", "unpack"]

Model = TypeVar("Model", bound=nn.Module)


def pack(model: Model) -> Model:
    """Let a model run packed: the same layers and weights, padding never computed, and far less Python per layer.

    In place, for inference and training alike; outputs are equal up to rounding. What is saved is unchanged:
    ``save_pretrained`` writes the same files as before. Packing twice is packing once. Texts that leave a model by an
    exit cost nothing from there on.

    Args:
        model: A BERT, RoBERTa, DistilBERT or ELECTRA, or any module that holds one.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If it holds no or several transformers models, or one that cannot run packed: a decoder, a
            pre-norm or unknown family.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> model = pack(BertModel(config))
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> model(torch.ones(2, 3, dtype=torch.long), mask).last_hidden_state.shape
        torch.Size([2, 3, 8])
    """
    transformer, anatomy = _described(model)
    path = _encoder_path(anatomy)
    if not isinstance(get_module(transformer, path), PackedEncoder):
        encoder = PackedEncoder(transformer, anatomy)
        encoder.exits = ExitRouter.on(transformer)
        _put(transformer, path, encoder)
    return model


def unpack(model: Model) -> Model:
    """Put the family's own encoder back, around the layers and weights as they are now; in place.

    A model that is not packed stays as it is. Texts that leave by an exit get the same answer, but all layers are
    computed for each.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If it holds no or several transformers models, one of an unknown family, or one that drops tokens:
            only the packed encoder can, and what decides which would be lost.
    """
    encoder = packed_encoder(model)
    if encoder is not None:
        if encoder.policy is not None:
            raise ValueError(
                "this model drops tokens, and unpacking it would lose the networks that decide which: call "
                "lightning_compress.set_threshold_scale(model, 0) to drop none, or keep a copy of the dense model"
            )
        transformer, anatomy = _described(model)
        if encoder.exits is not None:
            LayerTaps.of(transformer)  # exits then read what the layers put out
        _put(transformer, _encoder_path(anatomy), encoder.family)
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether :func:`pack` was called on the model, or on what it holds."""
    return packed_encoder(model) is not None


def packed_encoder(model: nn.Module) -> PackedEncoder | None:
    """Return the packed encoder inside ``model``; None if it is not packed."""
    return next((module for module in model.modules() if isinstance(module, PackedEncoder)), None)


def _put(model: nn.Module, path: str, encoder: nn.Module) -> None:
    """Put an encoder at a path, and leave the modes of the layers in it alone."""
    parent, _, name = path.rpartition(".")
    get_module(model, parent)._modules[name] = encoder


def _described(model: nn.Module) -> tuple[PreTrainedModel, Anatomy]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, got {model!r}: load it first, e.g. with "
            "AutoModelForSequenceClassification.from_pretrained"
        )
    transformer = cast(PreTrainedModel, find_transformer(model)[1])
    return transformer, describe(transformer)


def _encoder_path(anatomy: Anatomy) -> str:
    if anatomy.is_decoder or not anatomy.is_post_norm or anatomy.encoder is None:
        reason = (
            "is a decoder, whose tokens see only the past"
            if anatomy.is_decoder
            else "normalises before each sub-layer"
            if not anatomy.is_post_norm
            else "has no module that runs its layers and does nothing else"
        )
        raise ValueError(
            f"a model of type {anatomy.model_type!r} cannot run packed: it {reason}. Post-norm encoders can: BERT, "
            "RoBERTa, DistilBERT, ELECTRA, and families whose anatomy names an encoder"
        )
    return anatomy.encoder

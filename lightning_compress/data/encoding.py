"""Tokenise once, keep in memory, pad per batch.

The next chapter is :mod:`lightning_compress.data.text_classification`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_compress.data.embedded import resolve_pretrained

__all__ = ["EncodedTexts", "PadBatch", "encode_texts", "load_tokenizer"]


class EncodedTexts(Dataset):
    """Token ids of texts, unpadded, with labels where there are any.

    Args:
        encodings: Column (``"input_ids"``, and ``"token_type_ids"`` if the tokenizer makes them) to one list
            of ids per text.
        labels: One label per text, or None.
    """

    def __init__(
        self, encodings: dict[str, list[list[int]]], labels: Sequence[int] | Sequence[float] | None
    ) -> None:
        self.encodings = encodings
        self.labels = labels

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each text, special tokens included."""
        return [len(ids) for ids in self.encodings["input_ids"]]

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.encodings["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the token ids, and the label, of one text."""
        item: dict[str, Any] = {name: rows[index] for name, rows in self.encodings.items()}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item


@dataclass(frozen=True)
class PadBatch:
    """Collate texts into tensors ``[batch, longest]`` with an attention mask; labels become ``[batch]``."""

    pad_token_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad the items of one batch to the longest of them."""
        batch = {
            name: self._pad([item[name] for item in items], self.pad_token_id if name == "input_ids" else 0)
            for name in items[0]
            if name != "labels"
        }
        batch["attention_mask"] = self._pad([[1] * len(item["input_ids"]) for item in items], 0)
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(len(row) for row in rows)
        padding = [[value] * (width - len(row)) for row in rows]
        if self.side == "left":
            return torch.tensor([pad + row for row, pad in zip(rows, padding, strict=True)])
        return torch.tensor([row + pad for row, pad in zip(rows, padding, strict=True)])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the embedded model, a folder or the hub, one with a padding token.

    A tokenizer without a padding token (GPT-2, Llama) pads with its end-of-text token; the attention mask
    hides it.

    Args:
        name: ``"minilm"``, a local folder, or a hub name.

    Raises:
        ValueError: The folder is not a tokenizer's, the hub name cannot be loaded, or there is nothing to pad
            with.
    """
    source = resolve_pretrained(name, marker="tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer={name!r}` cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"`tokenizer={name!r}` has neither a padding nor an end-of-text token; define one."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    labels: Sequence[int] | Sequence[float] | None,
    max_length: int,
) -> EncodedTexts:
    """Tokenise all texts (or pairs) at once.

    Args:
        tokenizer: The tokenizer.
        texts: First, or only, text of each example.
        pairs: Second text of each example, or None.
        labels: One label per example, or None.
        max_length: Longer examples are cut to this many tokens (of a pair the longer text first).
    """
    encoded = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, padding=False, return_attention_mask=False
    )
    return EncodedTexts({name: list(encoded[name]) for name in encoded}, labels)

"""Counting on raw text: how many tokens a saved model has to keep at each layer, measured on the lines of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from lightning_compress.runtime.static import static_counts

__all__ = ["counts_on_texts"]

_BATCH = 32


def counts_on_texts(
    model: nn.Module, directory: str | Path, texts: str | Path, *, length: int, quantile: float = 0.95
) -> tuple[int, ...]:
    """Return the counts of :func:`~lightning_compress.runtime.static.static_counts` on the lines of a text file.

    Args:
        model: A token-dropping model.
        directory: Folder it was saved in, with its tokenizer.
        texts: File with one text per line, UTF-8; empty lines are left out.
        length: Tokens per text at most.
        quantile: Share of the texts that is to keep no fewer tokens than the thresholds keep, in (0, 1].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no text, the folder holds no tokenizer, or as ``static_counts``.
    """
    lines = [line.strip() for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{texts} holds no text: give a file with one text per line")
    if not (Path(directory) / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{directory} holds no tokenizer, so texts cannot be counted: save the model with its tokenizer, or give "
            "the counts"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    settings = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
    parts = (lines[start : start + _BATCH] for start in range(0, len(lines), _BATCH))
    return static_counts(model, (tokenizer(part, **settings) for part in parts), quantile)

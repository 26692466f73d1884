"""A tiny file of labelled texts, in the words that the tiny tokenizer knows."""

from __future__ import annotations

from pathlib import Path

__all__ = ["save_tiny_reviews"]

_WORDS = ("good", "bad", "fine", "poor", "film", "plot")


def save_tiny_reviews(path: Path) -> str:
    """Write forty texts of one to six words as TSV, labels 0 and 1, and return the path."""
    texts = [" ".join(_WORDS[(i + j) % 6] for j in range(1 + i % 6)) for i in range(40)]
    rows = [f"{text}\t{i % 2}" for i, text in enumerate(texts)]
    path.write_text("\n".join(["text\tlabel", *rows, ""]), encoding="utf-8")
    return str(path)

"""Small files and a tiny tokenizer, all made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tiny_pretrained import save_tiny_encoder

ROOT = Path(__file__).parents[2]
WORDS = ("good", "bad", "fine", "poor", "film", "plot")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT and its word-level tokenizer."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """Forty rows of one to six words in a TSV file, labels 0 and 1."""
    rows = [f"{' '.join(WORDS[(i + j) % 6] for j in range(1 + i % 6))}\t{i % 2}" for i in range(40)]
    path = tmp_path / "reviews.tsv"
    path.write_text("\n".join(["text\tlabel", *rows, ""]), encoding="utf-8")
    return str(path)


@pytest.fixture
def shared_data() -> Path:
    """Folder with the real data sets and models, where there is one."""
    folder = Path(os.environ.get("LIGHTNING_COMPRESS_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder of data sets: set LIGHTNING_COMPRESS_DATA")
    return folder

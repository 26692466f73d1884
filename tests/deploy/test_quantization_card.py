from __future__ import annotations

from pathlib import Path

from lightning_compress import quantize, save_pretrained
from tests.toys import tiny_bert


def card(folder: Path, **settings: object) -> list[str]:
    save_pretrained(quantize(tiny_bert(), **settings), folder)  # type: ignore[arg-type]
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()


def test_the_card_says_what_is_held_in_how_many_bits(tmp_path: Path) -> None:
    lines = card(tmp_path, preset="w4a8", block=(64, 32), factor="shift", operators="all")
    for row in (
        "| linear weights | 12 | 4 | 64 × 32 | shift |",
        "| inputs of linears | 12 | 8 | 1 × 32 | shift |",
        "| tables | 3 | 4 | 64 × 32 | shift |",
        "| query, key and value | 2 | 8 | 1 × 32 | shift |",
        "| softmax | 2 | integers |  |  |",
        "| activations | 2 | integers |  |  |",
        "| norms | 5 | integers |  |  |",
    ):
        assert row in lines


def test_the_card_names_no_operator_that_is_left_alone(tmp_path: Path) -> None:
    lines = card(tmp_path, preset="w8", operators=["linear"])
    assert "| linear weights | 12 | 8 | row | scale |" in lines
    assert not any(line.startswith(("| inputs", "| tables", "| norms", "| softmax")) for line in lines)

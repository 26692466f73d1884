"""Texts as a reader sees them: pieces joined to words, shaded by how many layers they went through.

Used by `dropping_sections`; the shades are in `style`.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from lightning_compress.report.dropping_record import TokenText
from lightning_compress.report.markup import element, escape

__all__ = ["SHADES", "Word", "fate", "legend", "shade", "shaded_text", "spell"]

SHADES = 6
"""Shades from 0 (left before the first layer) to this (went through all); `style` has a rule for each."""

_MARKS = ("Ġ", "▁")
_CLOSING = (".", ",", ";", ":", "!", "?", ")", "]", "'", "’", "%")
_OPENING = ("(", "'", "’", "$", "#", "-", "/")
_HYPHENS = ("-", "/")


class Word(NamedTuple):
    """A piece to show."""

    text: str
    follows_space: bool
    is_special: bool = False
    """Whether it stands for no text, such as `[CLS]`."""


def spell(pieces: Sequence[str]) -> list[Word]:
    """Return pieces as they read: `"##ing"` joins the piece before, `"Ġa"` and `"▁a"` begin a word.

    Args:
        pieces: WordPieces, or pieces of which some bear the mark of a new word.

    Example:
        >>> "".join(" " * word.follows_space + word.text for word in spell(["play", "##ing", "well", "."]))
        'playing well.'
        >>> "".join(" " * word.follows_space + word.text for word in spell(["Ġplay", "ing", "Ġwell", "."]))
        ' playing well.'
    """
    has_marks = any(piece.startswith(_MARKS) for piece in pieces)
    words: list[Word] = []
    before = ""
    for piece in pieces:
        special = _is_special(piece)
        if special:
            word = Word(piece, bool(words), True)
        elif piece.startswith(_MARKS):
            word = Word(piece[1:], True)
        elif piece.startswith("##") and len(piece) > 2:
            word = Word(piece[2:], False)
        else:
            glued = has_marks or piece in _CLOSING + _HYPHENS or before in _OPENING
            word = Word(piece, bool(words) and not (glued and not words[-1].is_special))
        words.append(word)
        before = piece
    return words


def shade(layers: int, num_layers: int) -> int:
    """Return the shade of a token that entered `layers` layers; the fullest is for those that entered all."""
    if layers >= num_layers:
        return SHADES
    return min(round(SHADES * layers / num_layers), SHADES - 1)


def fate(layers: int, num_layers: int) -> str:
    """Return what became of a token: 3 of 6 layers reads 'left before layer 3'."""
    return "went through all layers" if layers >= num_layers else f"left before layer {layers}"


def shaded_text(text: TokenText, num_layers: int) -> str:
    """Return a text with its tokens shaded; neighbours of one fate share an element."""
    words = list(zip(spell(text.tokens), text.layers, strict=True))
    markup = ""
    for layers, run in groupby(words, key=lambda pair: pair[1]):
        inner = ""
        for index, (word, _) in enumerate(run):
            space = " " if word.follows_space else ""
            if index == 0:
                markup += space
                space = ""
            shown = escape(word.text)
            inner += space + (f"<small>{shown}</small>" if word.is_special else shown)
        markup += _span(inner, layers, num_layers)
    return element("p", markup, class_="tokens")


def legend(num_layers: int) -> str:
    """Return one sample per fate, from left at once to kept to the end."""
    numbers = range(num_layers + 1)
    if num_layers > 2 * SHADES:
        numbers = sorted({round(index * num_layers / SHADES) for index in range(SHADES + 1)})
    samples = "".join(_span(str(layers), layers, num_layers) + " " for layers in numbers)
    words = element("span", "layers a token went through:") + samples
    return element("p", words, class_="legend")


def _span(inner: str, layers: int, num_layers: int) -> str:
    title = escape(fate(layers, num_layers))
    return f'<span class="s{shade(layers, num_layers)}" title="{title}">{inner}</span>'


def _is_special(piece: str) -> bool:
    bracketed = piece.startswith("[") and piece.endswith("]") and piece[1:-1].isupper()
    return bracketed or (len(piece) > 2 and piece.startswith("<") and piece.endswith(">"))

"""Small words for HTML: escaping, elements, tables, and numbers as people read them."""

import html
from collections.abc import Sequence
from typing import Any

__all__ = [
    "count",
    "element",
    "escape",
    "figure",
    "flops",
    "percent",
    "section",
    "short_percent",
    "size",
    "table",
    "times",
]


def escape(value: Any) -> str:
    """Return a value as text that is safe inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def element(tag: str, content: str, **attributes: str) -> str:
    """Return an element around markup; attribute values are escaped, `class_` stands for `class`."""
    words = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{words}>{content}</{tag}>\n"


def section(heading: str, *parts: str) -> str:
    """Return a section under a heading; parts are markup."""
    return element("section", element("h2", escape(heading)) + "".join(parts))


def figure(svg: str, caption: str) -> str:
    """Return a figure around an inline SVG."""
    return element("figure", svg + element("figcaption", escape(caption)))


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: int = 1,
    caption: str = "",
    firsts: Sequence[int] = (),
) -> str:
    """Return a table that scrolls sideways where it must.

    Args:
        headings: Plain texts.
        rows: Plain texts; the first of each row heads it.
        texts: Number of leading columns that are text, and so left-aligned.
        caption: Shown below.
        firsts: Indices of rows that begin a group.
    """
    kinds = ["text" if index < texts else "number" for index in range(len(headings))]
    head = "".join(
        element("th", escape(words), scope="col", class_=kind)
        for words, kind in zip(headings, kinds, strict=True)
    )
    body = ""
    for index, row in enumerate(rows):
        cells = element("th", escape(row[0]), scope="row")
        cells += "".join(
            element("td", escape(words), class_=kind) for words, kind in zip(row[1:], kinds[1:], strict=True)
        )
        body += element("tr", cells, class_="first" if index in firsts else "row")
    below = element("caption", escape(caption)) if caption else ""
    inner = below + element("thead", element("tr", head)) + element("tbody", body)
    return element("div", element("table", inner), class_="scroll")


def count(number: float) -> str:
    """Return a number of things: 22,713,216 as '22.7 M'."""
    return _scaled(number, ("", " k", " M", " G", " T", " P"), 1000)


def flops(number: float) -> str:
    """Return a number of FLOPs: 1.2e10 as '12.0 GFLOPs'."""
    return _scaled(number, (" ", " k", " M", " G", " T", " P", " E"), 1000) + "FLOPs"


def size(number: float) -> str:
    """Return bytes in powers of 1024: 90868376 as '86.7 MiB'."""
    return _scaled(number, (" B", " KiB", " MiB", " GiB", " TiB"), 1024)


def percent(ratio: float) -> str:
    """Return a ratio as a percentage with three figures: 0.0312 as '3.12 %', 0.5 as '50.0 %'."""
    value = 100 * ratio
    return f"{value:.2f} %" if abs(value) < 10 else f"{value:.1f} %"


def short_percent(ratio: float) -> str:
    """Return a ratio as a short percentage, for a narrow place: 0.031 as '3.1 %', 0.5 as '50 %'."""
    return f"{100 * ratio:.0f} %" if ratio >= 0.095 or ratio == 0 else f"{100 * ratio:.1f} %"


def times(ratio: float) -> str:
    """Return a factor: 1.4932 as '1.49×'."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def _scaled(number: float, units: Sequence[str], base: int) -> str:
    exponent = 0
    while abs(number) >= base * 0.9995 and exponent < len(units) - 1:
        number, exponent = number / base, exponent + 1
    whole = exponent == 0 and float(number).is_integer()
    words = (
        f"{number:.0f}"
        if whole or abs(number) >= 100
        else f"{number:.1f}"
        if abs(number) >= 10
        else f"{number:.2f}"
    )
    return words + units[exponent]

"""Turns a matplotlib drawing into inline SVG that takes its colours and its font from the page around it.

A drawing uses the placeholder colours below; in the SVG they become CSS variables, so one picture suits
a light and a dark page. Nothing global in matplotlib changes: no pyplot, and settings hold for one drawing.
"""

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["ACCENT", "GRID", "INK", "MUTED", "SECOND", "SERIES", "THIRD", "draw_svg", "tidy"]

INK, MUTED, GRID = "#0a0001", "#0a0002", "#0a0003"
ACCENT, SECOND, THIRD = "#0a0004", "#0a0005", "#0a0006"
SERIES = (ACCENT, SECOND, THIRD, MUTED, "#0a0007", "#0a0008")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    SECOND: "--second",
    THIRD: "--third",
    SERIES[4]: "--fourth",
    SERIES[5]: "--fifth",
}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: it can be searched, and follows the page's font
    "text.parse_math": False,  # a "$" in a user's name is a dollar
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw_svg(name: str, label: str, draw: Callable[[Figure], None], width: float, height: float) -> str:
    """Draw a figure and return it as one `<svg>` element without any address in it.

    Args:
        name: Short and unique on the page; keeps the ids of several figures apart.
        label: What a screen reader says.
        draw: Draws onto the figure it is given.
        width: Inches; only the proportion matters, the page scales it.
        height: Inches.

    Returns:
        The SVG text.
    """
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)  # the page shows through
        draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, label)


def tidy(axes: Axes, title: str = "") -> None:
    """Take the frame off, and leave a faint grid behind the values."""
    axes.set_title(title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)


def _inline(svg: str, name: str, label: str) -> str:
    """Strip prologue, metadata and namespaces; make ids unique; put variables for placeholders."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+(xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"'DejaVu Sans'|DejaVu Sans", "var(--font)", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)

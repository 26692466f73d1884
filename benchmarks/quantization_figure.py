"""The figure of ``benchmarks/quantization.py``: what each operator costs when it alone is quantised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["draw_sensitivity"]

_COLOURS = ("#2f6fde", "#d9730d", "#2a9d74", "#9a4fc4")


def draw_sensitivity(rows: Sequence[dict[str, Any]], operators: Sequence[str], output: Path) -> Path:
    """Draw the share of answers that change, by operator, with the points of accuracy that are lost beside the bars.

    Args:
        rows: Results with one operator quantised; where a bar has several, the last counts.
        operators: From top to bottom.
        output: An SVG file, which is replaced.

    Returns:
        The file.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows of single operators: run `quantization.py sensitivity` first")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    kinds = list(dict.fromkeys((row["preset"], row["block"], row["factor"]) for row in rows))
    by_bar = {(r["task"], (r["preset"], r["block"], r["factor"]), r["operators"]): r for r in rows}
    figure = Figure(figsize=(3.2 * len(tasks) + 1.2, 0.42 * len(operators) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    height = 0.8 / len(kinds)
    for axes, task in zip(panels, tasks, strict=True):
        for index, kind in enumerate(kinds):
            places = [place + (index - (len(kinds) - 1) / 2) * height for place in range(len(operators))]
            found = [by_bar.get((task, kind, operator)) for operator in operators]
            shares = [100 * row["changed"] / row["texts"] if row else 0.0 for row in found]
            bars = axes.barh(
                places, shares, height, color=_COLOURS[index % len(_COLOURS)], label=" ".join(kind)
            )
            labels = [
                f"{100 * (row['accuracy'] - row['dense_accuracy']):+.2f}" if row else "" for row in found
            ]
            axes.bar_label(bars, labels, padding=3, fontsize=7)
        axes.set_yticks(range(len(operators)), operators)
        axes.set_title(task)
        axes.set_xlabel("answers changed, %")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize=7, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "sensitivity", "svg.fonttype": "none"}):
        figure.savefig(output, metadata={"Date": None})
    return output

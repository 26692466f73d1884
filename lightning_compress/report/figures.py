"""The pictures of a report, each a function from recorded numbers to inline SVG (`svg` does the rendering).

Figures: ranks by layer · widths by layer · size and FLOPs by step · ranks by step · quality against FLOPs ·
measured speed-up.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_compress.report.latency_table import LatencyTable
from lightning_compress.report.record import LayerRank, StepRecord
from lightning_compress.report.svg import ACCENT, GRID, INK, MUTED, SECOND, SERIES, draw_svg, tidy
from lightning_compress.report.width_record import LayerWidth

__all__ = [
    "draw_progress",
    "draw_rank_map",
    "draw_rank_paths",
    "draw_speedups",
    "draw_tradeoff",
    "draw_width_map",
    "mark_phases",
    "split_path",
]

_Place: TypeAlias = tuple[int | None, str]
"""A layer, and a place in it."""
_MOST_LABELLED_LAYERS = 16  # in narrower cells the numbers would run into each other


def split_path(path: str) -> tuple[int | None, str]:
    """Split the dotted path of a linear into its layer and its place within the layer.

    Args:
        path: Such as `"bert.encoder.layer.3.attention.self.query"`.

    Returns:
        The first number in the path, None if there is none, and the rest without a trailing `.dense`.

    Example:
        >>> split_path("bert.encoder.layer.3.intermediate.dense")
        (3, 'intermediate')
        >>> split_path("classifier")
        (None, 'classifier')
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (None, path) if match is None else (int(match.group(1)), match.group(2).removesuffix(".dense"))


def draw_rank_map(ranks: Mapping[str, LayerRank]) -> str:
    """Draw one cell per linear, layers across and places down; the fuller the colour, the more rank."""
    cells: dict[_Place, tuple[str, float] | None] = {
        split_path(path): None if row.kept == "dense" else (str(row.rank), row.share)
        for path, row in ranks.items()
    }
    return _draw_map("ranks", "Rank of each linear, by layer", cells)


def draw_width_map(widths: Sequence[LayerWidth]) -> str:
    """Draw what is left of each layer's heads and neurons; the fuller the colour, the more."""
    cells: dict[_Place, tuple[str, float] | None] = {
        (index, place): (f"{pair.kept:,}", pair.share)
        for place in ("heads", "neurons")
        for index, layer in enumerate(widths)
        for pair in [getattr(layer, place)]
    }
    return _draw_map("widths", "Heads and neurons that are left, by layer", cells)


def _draw_map(name: str, label: str, cells: Mapping[_Place, tuple[str, float] | None]) -> str:
    """Draw one cell per layer and place, with words and as full a colour as its share; grey where there are none."""
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    places = list(dict.fromkeys(place for _, place in cells))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        for (layer, place), cell in cells.items():
            x, y = layers.index(layer), places.index(place)
            words, share = cell or ("dense", 0.0)
            fill, strength = (MUTED, 0.25) if cell is None else (ACCENT, 0.06 + 0.7 * share)
            axes.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=fill, alpha=strength))
            if len(layers) <= _MOST_LABELLED_LAYERS:
                axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", fontsize=9)
        axes.set(xlim=(0, len(layers)), ylim=(len(places), 0), xlabel="layer")
        names = ["–" if layer is None else str(layer) for layer in layers]
        axes.set_xticks([x + 0.5 for x in range(len(layers))], names)
        axes.set_yticks([y + 0.5 for y in range(len(places))], places)

    height = 0.75 + 0.36 * len(places)
    return draw_svg(name, label, draw, 8.4, height)


def draw_progress(steps: Sequence[StepRecord], target: Mapping[str, object]) -> str:
    """Draw size and FLOPs over steps, with the change of phase and the target."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        panels = (
            (left, "Parameters kept", [step.size_ratio for step in steps], target.get("target_params")),
            (right, "FLOPs left", [step.flops_ratio for step in steps], target.get("target_flops")),
        )
        for axes, title, values, goal in panels:
            tidy(axes, title)
            axes.plot([step.step for step in steps], values, color=ACCENT, linewidth=2)
            mark_phases(axes, steps)
            if isinstance(goal, int | float):
                axes.axhline(float(goal), color=SECOND, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
                axes.annotate(
                    f"target {goal:.0%}",
                    (0, float(goal)),
                    xycoords=("axes fraction", "data"),
                    xytext=(3, -11),
                    textcoords="offset points",
                    color=SECOND,
                    fontsize=9,
                )
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlabel("step")
        top = max(1.0, *(max(step.size_ratio, step.flops_ratio) for step in steps))
        left.set_ylim(0, top * 1.08)

    return draw_svg("progress", "Parameters and FLOPs over the steps of training", draw, 8.4, 2.9)


def draw_rank_paths(steps: Sequence[StepRecord], ranks: Mapping[str, LayerRank]) -> str:
    """Draw, for each place in a layer, the mean rank over the layers, as a share of full rank, over steps."""
    places: dict[str, list[str]] = {}
    for path in ranks:
        places.setdefault(split_path(path)[1], []).append(path)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        for index, (place, paths) in enumerate(places.items()):
            points = [
                (step.step, sum(step.ranks[path] / ranks[path].full_rank for path in paths) / len(paths))
                for step in steps
                if all(path in step.ranks for path in paths)
            ]
            style = "-" if index < len(SERIES) else "--"
            color = SERIES[index % len(SERIES)]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.8, label=place)
        mark_phases(axes, steps)
        axes.set(xlabel="step", ylim=(0, 1.08))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(loc="outside right upper", fontsize=9)

    return draw_svg("paths", "Mean rank of each kind of linear over the steps of training", draw, 8.4, 3.0)


def mark_phases(axes: Axes, steps: Sequence[StepRecord], *, named: bool = True) -> None:
    """Draw a line where the name of the phase changes, and if `named` write each at the top of its stretch."""
    starts = [
        step
        for before, step in zip([None, *steps[:-1]], steps, strict=True)
        if before is None or before.phase != step.phase
    ]
    for index, start in enumerate(starts):
        if index:
            axes.axvline(start.step, color=MUTED, linewidth=1, linestyle=":")
        if not named:
            continue
        axes.annotate(
            start.phase,
            (start.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -9),
            textcoords="offset points",
            color=MUTED,
            fontsize=9,
        )


def draw_tradeoff(metric: str, points: Mapping[str, tuple[float, float]]) -> str:
    """Draw a metric against the share of dense FLOPs: upper left is better.

    Args:
        metric: Name of the metric, the vertical axis.
        points: Name of the model to (share of dense FLOPs, metric).
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        if len(points) > 1:
            axes.plot(*zip(*points.values(), strict=True), color=GRID, linewidth=1.5, zorder=1)
        for name, (flops, value) in points.items():
            axes.scatter([flops], [value], s=110, color=MUTED if name == "dense" else ACCENT, zorder=2)
            text = f"{name}\n{value:.4g} at {flops:.0%}"
            axes.annotate(
                text, (flops, value), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=9
            )
        values = [value for _, value in points.values()]
        room = max(0.25 * (max(values) - min(values)), 0.01 * max(map(abs, values)), 1e-6)
        axes.set(
            xlabel="FLOPs, share of dense",
            ylabel=metric,
            ylim=(min(values) - 1.5 * room, max(values) + 3.5 * room),
        )
        axes.set_xlim(0, max(1.0, *(flops for flops, _ in points.values())) * 1.12)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw_svg("tradeoff", f"{metric} against FLOPs", draw, 8.4, 3.0)


def draw_speedups(table: LatencyTable) -> str:
    """Draw the speed-up over the baseline in the same dtype, and over the baseline in its best dtype."""
    measured = [speedup for speedup in table.speedups() if speedup.model not in table.baselines]
    keys = list(dict.fromkeys((s.batch_size, s.length, s.model, s.dtype, s.baseline) for s in measured))
    several = len({(model, baseline) for _, _, model, _, baseline in keys}) > 1

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", linewidth=0.8)
        kinds = (("same_dtype", ACCENT, -0.13, "same dtype"), ("best_dtype", SECOND, 0.13, "its best dtype"))
        for against, color, shift, words in kinds:
            rows = [s for s in measured if s.against == against]
            places = [
                keys.index((s.batch_size, s.length, s.model, s.dtype, s.baseline)) + shift for s in rows
            ]
            middles = [s.ratio.median for s in rows]
            spreads = [
                [s.ratio.median - s.ratio.p10 for s in rows],
                [s.ratio.p90 - s.ratio.median for s in rows],
            ]
            axes.errorbar(
                middles, places, xerr=spreads, fmt="o", color=color, markersize=7, label=f"against {words}"
            )
        axes.axvline(1.0, color=INK, linewidth=1)
        labels = [
            f"{batch} × {length}  {dtype}" + (f"\n{model} / {baseline}" if several else "")
            for batch, length, model, dtype, baseline in keys
        ]
        axes.set_yticks(range(len(keys)), labels)
        axes.set(ylim=(len(keys) - 0.5, -0.5), xlabel="times faster than the baseline")
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=2, fontsize=9)

    height = 1.0 + (0.5 if several else 0.34) * len(keys)
    return draw_svg("speedups", "Measured speed-up by shape of batch and dtype", draw, 8.4, height)

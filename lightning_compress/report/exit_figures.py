"""The pictures of exits: who leaves after which layer · quality against FLOPs over the thresholds."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_compress.report.exit_record import ExitPointRecord, ExitsRecord
from lightning_compress.report.markup import short_percent
from lightning_compress.report.svg import ACCENT, INK, MUTED, SECOND, draw_svg, tidy

__all__ = ["draw_exit_curve", "draw_exits"]

_MOST_LABELLED_LAYERS = 16


def draw_exits(found: ExitsRecord) -> str:
    """Draw the share of texts that leaves after each layer, as bars; the last one, of those that ran all, in grey."""
    layers, last = range(len(found.leaves)), len(found.leaves) - 1
    is_labelled = len(found.leaves) <= _MOST_LABELLED_LAYERS

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        colors = [MUTED if layer == last else ACCENT for layer in layers]
        axes.bar(layers, found.leaves, width=0.72, color=colors, alpha=0.85)
        for layer, share in enumerate(found.leaves):
            if is_labelled and (layer in (*found.asked, last)):
                _above(axes, short_percent(share), layer, share)
        axes.axvline(found.mean_depth - 1, color=SECOND, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            f"mean {found.mean_depth:.2f} layers",
            (found.mean_depth - 1, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color=SECOND,
            fontsize=9,
        )
        axes.set(ylim=(0, 1.25 * max(found.leaves)), xlim=(-0.6, last + 0.6), xlabel="left after layer")
        axes.set_xticks(layers if is_labelled else layers[::4])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw_svg("exits", "Share of texts that leaves after each layer", draw, 8.4, 2.7)


def draw_exit_curve(found: ExitsRecord, target_flops: float | None = None) -> str:
    """Draw the metric against FLOPs over the thresholds of the exits.

    Args:
        found: With a curve of at least one point; that of the nearest depth to the deployed one is marked.
        target_flops: Share of dense FLOPs that was asked for.
    """
    points = sorted(found.curve, key=lambda point: point.flops_ratio)
    here = min(points, key=lambda point: abs(point.mean_depth - found.mean_depth))
    full = next((point for point in points if point.threshold is None), None)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        axes.plot(
            [p.flops_ratio for p in points], [p.score for p in points], color=ACCENT, linewidth=1.8, zorder=2
        )
        axes.scatter([p.flops_ratio for p in points], [p.score for p in points], s=20, color=ACCENT, zorder=3)
        axes.scatter([here.flops_ratio], [here.score], s=130, color=ACCENT, edgecolors=INK, zorder=4)
        if full is not None and full is not here:
            _label(axes, f"all layers\n{full.score:.4g}", full, MUTED, "right")
        words = f"as deployed\n{here.score:.4g} at {here.flops_ratio:.0%}"
        _label(axes, words, here, INK, "right" if here.flops_ratio > 0.5 else "left")
        _set_limits(axes, points)
        if target_flops is not None:
            axes.axvline(target_flops, color=SECOND, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        axes.set(xlabel="FLOPs, share of dense", ylabel=found.metric)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw_svg(
        "thresholds", f"{found.metric} against FLOPs over the thresholds of the exits", draw, 8.4, 3.1
    )


def _above(axes: Axes, words: str, x: float, y: float) -> None:
    axes.annotate(words, (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)


def _label(axes: Axes, words: str, point: ExitPointRecord, color: str, align: str) -> None:
    axes.annotate(
        words,
        (point.flops_ratio, point.score),
        xytext=(-4 if align == "right" else 4, 10),
        textcoords="offset points",
        ha=align,
        va="bottom",
        fontsize=9,
        color=color,
    )


def _set_limits(axes: Axes, points: Sequence[ExitPointRecord]) -> None:
    scores = [point.score for point in points]
    room = max(0.25 * (max(scores) - min(scores)), 0.01 * max(map(abs, scores)), 1e-6)
    axes.set_ylim(min(scores) - room, max(scores) + 2.2 * room)
    axes.set_xlim(0, max(1.0, *(point.flops_ratio for point in points)) * 1.08)

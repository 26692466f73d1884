"""The pictures of token dropping: tokens by layer · quality against FLOPs as the dial turns · the course of a run."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_compress.report.dropping_record import DialRecord
from lightning_compress.report.figures import mark_phases
from lightning_compress.report.markup import short_percent
from lightning_compress.report.record import StepRecord
from lightning_compress.report.svg import ACCENT, INK, MUTED, SECOND, draw_svg, tidy

__all__ = ["draw_dial", "draw_dropping_course", "draw_kept_by_layer"]

_MOST_LABELLED_LAYERS = 16


def draw_kept_by_layer(layers: Sequence[float]) -> str:
    """Draw the share of tokens that enters each layer, as bars."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        places = range(len(layers))
        axes.bar(places, [1.0] * len(layers), width=0.72, color=MUTED, alpha=0.13)
        axes.bar(places, layers, width=0.72, color=ACCENT, alpha=0.85)
        if len(layers) <= _MOST_LABELLED_LAYERS:
            for place, share in enumerate(layers):
                axes.annotate(
                    short_percent(share),
                    (place, share),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
        axes.set(ylim=(0, 1.12), xlim=(-0.6, len(layers) - 0.4), xlabel="layer")
        axes.set_xticks(places if len(layers) <= _MOST_LABELLED_LAYERS else places[::4])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw_svg("kept", "Share of tokens that enters each layer", draw, 8.4, 2.7)


def draw_dial(
    metric: str, curve: Sequence[DialRecord], scale: float, target_flops: float | None = None
) -> str:
    """Draw the metric against FLOPs as all thresholds are scaled together.

    Args:
        metric: Name of the metric, the vertical axis.
        curve: At least one point.
        scale: The scale of the deployed model; the point of the nearest scale is marked.
        target_flops: Share of dense FLOPs that was asked for.
    """
    points = sorted(curve, key=lambda point: point.flops_ratio)
    here = min(points, key=lambda point: abs(point.scale - scale))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        axes.plot(
            [p.flops_ratio for p in points], [p.score for p in points], color=ACCENT, linewidth=1.8, zorder=2
        )
        others = [point for point in points if point is not here]
        axes.scatter([p.flops_ratio for p in others], [p.score for p in others], s=34, color=ACCENT, zorder=3)
        axes.scatter([here.flops_ratio], [here.score], s=130, color=ACCENT, edgecolors=INK, zorder=4)
        for point in points:
            _label_point(
                axes, point, is_here=point is here, is_left=here.flops_ratio <= (target_flops or 1.0)
            )
        _set_limits(axes, points)
        if target_flops is not None:
            axes.axvline(target_flops, color=SECOND, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
            axes.annotate(
                f"target {target_flops:.0%}",
                (target_flops, 0),
                xycoords=("data", "axes fraction"),
                xytext=(4, 4),
                textcoords="offset points",
                color=SECOND,
                fontsize=9,
            )
        axes.set(xlabel="FLOPs, share of dense", ylabel=metric)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw_svg("dial", f"{metric} against FLOPs as the thresholds are scaled", draw, 8.4, 3.1)


def draw_dropping_course(steps: Sequence[StepRecord], goal: str) -> str:
    """Draw the measured ratio with its schedule, the tokens kept, and the mean threshold, over steps.

    Args:
        steps: Steps with `tokens_kept`.
        goal: What the ratio is of, `"FLOPs"` or `"tokens"`.
    """
    second: tuple[str, Callable[[StepRecord], float | None]] = (
        ("Tokens kept", lambda step: step.tokens_kept)
        if goal == "FLOPs"
        else ("FLOPs left", lambda step: step.flops_ratio)
    )

    def draw(figure: Figure) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        tidy(left, f"{goal} left" if goal == "FLOPs" else "Tokens kept")
        _line(left, steps, lambda step: step.ratio, ACCENT, 1.8, "measured")
        _line(left, steps, lambda step: step.target, SECOND, 1.4, "scheduled", (0, (5, 3)))
        left.legend(fontsize=9, loc="lower left")
        tidy(middle, second[0])
        _line(middle, steps, second[1], ACCENT, 1.8)
        tidy(right, "Threshold")
        _line(right, steps, lambda step: step.threshold, ACCENT, 1.8)
        for axes in (left, middle):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1.1)
        thresholds = [step.threshold or 0.0 for step in steps]
        right.set_ylim(1.15 * min(0.0, *thresholds), 1.15 * max(0.0, *thresholds) or 1.0)
        for axes in (left, middle, right):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            mark_phases(axes, steps, named=axes is left)

    return draw_svg("course", f"{goal}, tokens and thresholds over the steps of training", draw, 8.4, 2.9)


def _line(
    axes: Axes,
    steps: Sequence[StepRecord],
    value_of: Callable[[StepRecord], float | None],
    color: str,
    width: float,
    label: str | None = None,
    style: str | tuple[int, tuple[int, int]] = "-",
) -> None:
    found = [(step.step, value) for step in steps for value in [value_of(step)] if value is not None]
    if found:
        axes.plot(*zip(*found, strict=True), color=color, linewidth=width, label=label, linestyle=style)


def _label_point(axes: Axes, point: DialRecord, *, is_here: bool, is_left: bool) -> None:
    """Write above where there is more to say, else below the curve, which rises to the right and flattens."""
    above = is_here or point.scale == 0
    align = ("right" if is_left else "left") if is_here else "right" if above else "left"
    axes.annotate(
        _dial_words(point, is_here),
        (point.flops_ratio, point.score),
        xytext=((-4 if align == "right" else 4) if is_here else 0 if above else 6, 10 if above else -4),
        textcoords="offset points",
        ha=align,
        va="bottom" if above else "top",
        fontsize=9,
        color=INK if is_here else MUTED,
    )


def _set_limits(axes: Axes, points: Sequence[DialRecord]) -> None:
    scores = [point.score for point in points]
    room = max(0.25 * (max(scores) - min(scores)), 0.01 * max(map(abs, scores)), 1e-6)
    axes.set_ylim(min(scores) - 1.5 * room, max(scores) + 2.2 * room)
    axes.set_xlim(0, max(1.0, *(point.flops_ratio for point in points)) * 1.08)


def _dial_words(point: DialRecord, is_here: bool) -> str:
    if is_here:
        return f"as deployed\n{point.score:.4g} at {point.flops_ratio:.0%}"
    return "nothing dropped" if point.scale == 0 else f"× {point.scale:.3g}"

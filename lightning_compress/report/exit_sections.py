"""The section about exits: who leaves after which layer, and what other thresholds would give.

`page` puts it beside the others of `sections`.
"""

from lightning_compress.report import exit_figures as figures
from lightning_compress.report.exit_record import ExitsRecord
from lightning_compress.report.markup import element, escape, figure, percent, section, table
from lightning_compress.report.record import RunRecord

__all__ = ["exits"]

_RULES = {
    "entropy": "its entropy is below {threshold}",
    "max_prob": "its largest probability is above {threshold}",
    "margin": "its two largest probabilities differ by more than {threshold}",
    "patience": "{threshold} exits in a row agree with the one before",
    "learned": "its chance of being wrong is guessed to be below {threshold}",
}


def exits(record: RunRecord) -> str:
    """Return the section; empty where there are no exits."""
    found = record.exits
    if found is None:
        return ""
    parts = [element("p", escape(_summary(found)))]
    bars = (
        "Share of the texts that leaves after each layer, counted from 0; grey are those that ran all layers. No "
        "number stands over layers without an exit, or with one that is not asked."
    )
    parts.append(figure(figures.draw_exits(found), bars))
    if found.curve:
        parts.append(figure(figures.draw_exit_curve(found, record.target_flops), _caption(found)))
        parts.append(element("details", element("summary", "Every threshold") + _table(found)))
    return section("Exits", *parts)


def _summary(found: ExitsRecord) -> str:
    num_layers, early = len(found.leaves), 1.0 - found.leaves[-1]
    if found.threshold is None:
        return (
            f"There are exits, but their threshold lets nobody leave: every text runs all {num_layers} layers. "
            "lightning_compress.choose_exit_threshold(model, batches, max_drop=0.01) chooses one."
        )
    rule = _RULES.get(found.rule, "the rule says so").format(threshold=f"{found.threshold:.3g}")
    return (
        f"Over {found.num_texts:,} validation texts, {percent(early)} leave before the last of {num_layers} layers; a "
        f"text runs {found.mean_depth:.2f} layers on average. An exit's answer is taken where {rule}."
    )


def _caption(found: ExitsRecord) -> str:
    metric = found.metric[:1].upper() + found.metric[1:]
    return (
        f"{metric} on {found.num_texts:,} validation texts at other thresholds, without training again. FLOPs count "
        "the exits that are asked, and the last layer for every token."
    )


def _table(found: ExitsRecord) -> str:
    rows = [
        [
            "nobody leaves" if point.threshold is None else f"{point.threshold:.4g}",
            f"{point.score:.4g}",
            percent(point.flops_ratio),
            f"{point.mean_depth:.2f}",
        ]
        for point in found.curve
    ]
    return table(["Threshold", found.metric[:1].upper() + found.metric[1:], "FLOPs of dense", "Layers"], rows)

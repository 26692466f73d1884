"""The section about widths: which layer kept how many heads and neurons, and what choosing them cost.

`page` puts it beside the others of `sections`.
"""

from collections.abc import Mapping
from typing import Any

from lightning_compress.report import figures
from lightning_compress.report.markup import count, element, escape, figure, percent, section, table
from lightning_compress.report.record import RunRecord
from lightning_compress.report.width_record import KeptOf, WidthsRecord

__all__ = ["widths"]


def widths(record: RunRecord) -> str:
    """Return the section; empty where no layer became narrower by heads and neurons."""
    found = record.widths
    if found is None:
        return ""
    caption = "What is left of each layer's heads and neurons: the fuller the blue, the more."
    details = element("details", element("summary", "Every layer") + _table(found))
    parts = [
        element("p", escape(f"{_summary(found)} {_cost(found, record)}")),
        figure(figures.draw_width_map(found.layers), caption),
        details,
    ]
    return section("Widths", *parts)


def _summary(found: WidthsRecord) -> str:
    heads, neurons = (
        _mean([getattr(layer, name) for layer in found.layers]) for name in ("heads", "neurons")
    )
    words = (
        f"A layer keeps {heads} heads and {neurons} neurons on average; {count(found.parameters.kept)} of "
        f"{count(found.parameters.dense)} parameters of the layers are left, {percent(found.parameters.share)}."
    )
    if found.hidden is not None:
        words += f" The residual stream is {found.hidden.kept} wide, of {found.hidden.dense}."
    if found.embedding_rank is not None:
        rank = found.embedding_rank
        words += f" Word embeddings have rank {rank.kept} of {rank.dense}."
    return words


def _cost(found: WidthsRecord, record: RunRecord) -> str:
    """What it took to decide who stays."""
    if found.criterion == "l0":
        return "Which of them stay was learned by gates."
    if found.calibration_seconds is None and any(_batches(method) for method in record.methods):
        return "Importance was measured in separate passes, in an earlier run."
    if found.calibration_seconds is None:
        return "Importance was read off the gradients of the ordinary steps, which costs nothing."
    share = "" if found.calibration_share is None else f", {percent(found.calibration_share)} of the time"
    return (
        f"Importance was measured in separate passes: {found.calibration_seconds:.3g} s{share} since training began or "
        "was resumed."
    )


def _batches(method: Mapping[str, Any]) -> int:
    """Batches of each separate pass of a method, 0 if it has none."""
    return (method.get("config") or {}).get("calibration_batches") or 0


def _mean(pairs: list[KeptOf]) -> str:
    kept, dense = (sum(numbers) / len(pairs) for numbers in zip(*(p.to_list() for p in pairs), strict=True))
    return f"{kept:,.4g} of {dense:,.4g}"


def _table(found: WidthsRecord) -> str:
    rows = []
    for index, layer in enumerate(found.layers):
        pairs = (layer.heads, layer.neurons)
        cells = [f"{pair.kept:,} of {pair.dense:,}" for pair in pairs]
        sizes = f"{count(layer.parameters.kept)} of {count(layer.parameters.dense)}"
        rows.append([str(index), *cells, sizes, percent(layer.parameters.share)])
    return table(["Layer", "Heads", "Neurons", "Parameters", "Left"], rows)

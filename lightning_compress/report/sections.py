"""The sections of the page, each from a record to markup; empty where the run has nothing to say."""

import json
import math
from collections.abc import Mapping, Sequence

from lightning_compress.report import figures
from lightning_compress.report.dropping_figures import draw_dropping_course
from lightning_compress.report.latency_table import LatencyTable, Speedup
from lightning_compress.report.markup import (
    count,
    element,
    escape,
    figure,
    flops,
    percent,
    section,
    table,
    times,
)
from lightning_compress.report.markup import (
    size as bytes_,
)
from lightning_compress.report.record import FinalRecord, RunRecord, StepRecord

__all__ = [
    "course",
    "latency",
    "lead",
    "quality",
    "ranks",
    "reproduction",
    "size",
    "tiles",
    "title",
    "warnings",
]

_POINTS = 400
_FRACTIONS = ("accuracy", "f1", "precision", "recall", "auroc", "mcc")


def title(record: RunRecord) -> str:
    """Return what was done to what."""
    methods = [str(method.get("method", "?")).replace("_", " ") for method in record.methods]
    return f"{record.model_type}, compressed by {' + '.join(methods)}" if methods else record.model_type


def lead(record: RunRecord) -> str:
    """Return what was asked for, in one sentence."""
    asked = [_wish(name, value) for name, value in record.target.items() if value is not None]
    steps = f" Trained for {record.steps[-1].step:,} steps." if record.steps else ""
    words = f"Asked for: {', '.join(asked)}.{steps}" if asked else f"No target was stated.{steps}"
    return element("p", escape(words), class_="lead")


def _wish(name: str, value: object) -> str:
    """One entry of the target: `target_params` 0.5 reads '50.0 % of the parameters'."""
    of = {
        "target_params": "of the parameters",
        "target_flops": "of the FLOPs",
        "target_tokens": "of the tokens",
    }
    if name in of and isinstance(value, int | float):
        return f"{percent(value)} {of[name]}"
    return f"{name.replace('_', ' ')} {_plain(value)}"


def tiles(record: RunRecord) -> str:
    """Return the few numbers that matter, large."""
    found: list[tuple[str, str, str]] = []
    if record.final is not None:
        size_tile, flops_tile = _size_tiles(record.final)
        found += [flops_tile] if _has_all_weights(record) else [size_tile, flops_tile]
        found += _file_tile(record.final) if record.bits is not None else []
    if record.dropping is not None:
        kept, last = record.dropping.mean_kept, record.dropping.layers[-1]
        detail = f"on average over the layers; {percent(last)} in the last"
        found.append(("Tokens kept", percent(kept), detail))
    if record.exits is not None:
        early, num_layers = 1.0 - record.exits.leaves[-1], len(record.exits.leaves)
        detail = f"of {num_layers}, on average; {percent(early)} of the texts leave early"
        found.append(("Layers run", f"{record.exits.mean_depth:.2f}", detail))
    metric = _main_metric(record)
    if metric is not None:
        found.append((metric.capitalize(), *_metric_tile(metric, record)))
    if record.latency is not None:
        found += _latency_tiles(record.latency)
    cells = ""
    for name, value, detail in found:
        inner = element("div", escape(value), class_="value") + element(
            "div", escape(detail), class_="detail"
        )
        cells += element("div", element("dt", escape(name)) + element("dd", inner), class_="tile")
    return element("dl", cells, class_="tiles") if cells else ""


def _has_all_weights(record: RunRecord) -> bool:
    """Whether only tokens or texts left: no linear is smaller, and what decides who leaves came on top."""
    final = record.final
    is_dropping = record.dropping is not None or any(step.tokens_kept is not None for step in record.steps)
    is_leaving = is_dropping or record.exits is not None
    is_whole = final is not None and final.compressed.linear >= final.dense.linear and record.bits is None
    return is_leaving and is_whole


def _size_tiles(final: FinalRecord) -> list[tuple[str, str, str]]:
    dense, left = final.dense.total, final.compressed.total
    linear = percent(_ratio(final.compressed.linear, final.dense.linear))
    sizes = (
        "Parameters",
        percent(_ratio(left, dense)),
        f"{count(left)} of {count(dense)}; of the linears {linear}",
    )
    detail = f"{flops(final.compressed_flops)} of {flops(final.dense_flops)}"
    return [sizes, ("FLOPs", percent(_ratio(final.compressed_flops, final.dense_flops)), detail)]


def _file_tile(final: FinalRecord) -> list[tuple[str, str, str]]:
    return [
        ("On disk", percent(_ratio(ours, dense)), f"{bytes_(ours)} of {bytes_(dense)}")
        for dense, ours in _disk(final)
    ]


def _disk(final: FinalRecord) -> list[tuple[int, int]]:
    """Bytes of the dense model's weights and of these, as the only entry; none where they are unknown."""
    sizes = final.bytes_on_disk or {}
    return [(sizes["dense"], sizes["compressed"])] if {"dense", "compressed"} <= set(sizes) else []


def _metric_tile(metric: str, record: RunRecord) -> tuple[str, str]:
    ours, dense = _metric(record, "compressed", metric), _metric(record, "dense", metric)
    value = "–" if ours is None else _score(metric, ours)
    if ours is None or dense is None:
        return value, "dense was not measured" if dense is None else f"dense {_score(metric, dense)}"
    return value, f"dense {_score(metric, dense)} ({_change(metric, ours - dense)})"


def _latency_tiles(found: LatencyTable) -> list[tuple[str, str, str]]:
    """The largest batch, against the same dtype and against the best: both, or the number would flatter."""
    rows = [s for s in found.speedups() if s.model not in found.baselines]
    cells = []
    for against, words in (("same_dtype", "same dtype"), ("best_dtype", "best dense")):
        kind = [s for s in rows if s.against == against]
        if kind:
            shape = max((s.batch_size, s.length) for s in kind)
            here = sorted(
                (s for s in kind if (s.batch_size, s.length) == shape), key=lambda s: -s.ratio.median
            )
            others = ", ".join(f"{_pair(s)} {times(s.ratio.median)}" for s in here[1:])
            batch = f"batch {shape[0]} × {shape[1]}".replace(" ", "\u00a0")  # not torn apart at line ends
            detail = f"{_pair(here[0])}{f' ({others})' if others else ''}, {batch}"
            cells.append((f"Speed-up, {words}", times(here[0].ratio.median), detail))
    return cells


def _pair(speedup: Speedup) -> str:
    """The dtypes that were held against each other; one word where they agree."""
    same = speedup.dtype == speedup.baseline_dtype
    return speedup.dtype if same else f"{speedup.dtype} over {speedup.baseline_dtype}"


def warnings(record: RunRecord) -> str:
    """Return what the reader must know before believing the numbers."""
    if not record.warnings:
        return ""
    items = "".join(element("li", escape(warning)) for warning in record.warnings)
    return element(
        "div", element("strong", "Worth knowing") + element("ul", items), class_="warnings", role="note"
    )


def quality(record: RunRecord) -> str:
    """Return every metric of both models, and the first of them against FLOPs."""
    names = list(dict.fromkeys(name for scores in record.metrics.values() for name in scores or {}))
    if not names:
        return ""
    rows = []
    for name in names:
        dense, ours = _metric(record, "dense", name), _metric(record, "compressed", name)
        cells = ["–" if value is None else _score(name, value) for value in (dense, ours)]
        rows.append([name, *cells, "–" if dense is None or ours is None else _change(name, ours - dense)])
    parts = [table(["Metric", "Dense", "Compressed", "Change"], rows)]
    metric, final = _main_metric(record), record.final
    if metric is not None and final is not None:
        shares = {"dense": 1.0, "compressed": _ratio(final.compressed_flops, final.dense_flops)}
        scored = {name: (share, _metric(record, name, metric)) for name, share in shares.items()}
        points = {name: (share, value) for name, (share, value) in scored.items() if value is not None}
        caption = f"{metric} against FLOPs: further left is cheaper, further up is better for most metrics."
        parts.append(figure(figures.draw_tradeoff(metric, points), caption))
    return section("What it cost", *parts)


def size(record: RunRecord) -> str:
    """Return parameters in three scopes, FLOPs, and bytes on disk."""
    final = record.final
    if final is None:
        return ""
    scopes = (("linear", "Weights of the linears"), ("encoder", "All layers"), ("total", "Whole model"))
    rows = []
    for scope, words in scopes:
        dense, ours = getattr(final.dense, scope), getattr(final.compressed, scope)
        rows.append(
            [words, count(dense), count(ours), percent(_ratio(ours, dense)), times(_ratio(dense, ours))]
        )
    dense_flops, our_flops = final.dense_flops, final.compressed_flops
    share, factor = percent(_ratio(our_flops, dense_flops)), times(_ratio(dense_flops, our_flops))
    rows.append(["FLOPs", flops(dense_flops), flops(our_flops), share, factor])
    for dense, ours in _disk(final):
        sizes = (bytes_(dense), bytes_(ours), percent(_ratio(ours, dense)), times(_ratio(dense, ours)))
        rows.append(["On disk", *sizes])
    note = "Embeddings belong to the whole model only. FLOPs are 2 × multiply-adds over unpadded tokens."
    if record.dropping is not None:
        kept = record.dropping.mean_kept
        note += f" They are the mean over {record.dropping.num_texts:,} validation texts."
        rows.append(
            ["Tokens in a layer", percent(1.0), percent(kept), percent(kept), times(_ratio(1.0, kept))]
        )
    if record.exits is not None:
        num_layers, depth = len(record.exits.leaves), record.exits.mean_depth
        if record.dropping is None:
            note += f" They are the mean over {record.exits.num_texts:,} validation texts."
        row = [str(num_layers), f"{depth:.2f}", percent(depth / num_layers), times(num_layers / depth)]
        rows.append(["Layers that a text runs", *row])
    if _has_all_weights(record):
        who = "Tokens" if record.exits is None else "Texts" if record.dropping is None else "Tokens and texts"
        note += f" {who} leave, weights stay: the model is as large as before, plus what decides who leaves."
    return section(
        "What was gained", table(["", "Dense", "Compressed", "Left", "Smaller by"], rows, caption=note)
    )


def latency(record: RunRecord) -> str:
    """Return measured speed: the figure, and every timing."""
    found = record.latency
    if found is None or not found.timings:
        return ""
    speedups = found.speedups()
    rows = [found.row(timing, speedups) for timing in found.timings]
    shapes = [row[0] for row in rows]
    firsts = [index for index in range(1, len(rows)) if shapes[index] != shapes[index - 1]]
    parts = []
    if any(s.model not in found.baselines for s in speedups):
        caption = "Dots are medians of paired rounds, lines reach from the 10th to the 90th percentile."
        parts.append(figure(figures.draw_speedups(found), caption))
    note = f"{found.caption()}. Differences under 10 % are noise."
    parts.append(table(found.headings(), rows, texts=3, caption=note, firsts=firsts))
    return section("Measured speed", *parts)


def ranks(record: RunRecord) -> str:
    """Return the ranks that are left: the map, and each linear by name."""
    if record.final is None or not record.final.ranks:
        return ""
    left = record.final.ranks
    caption = (
        "Rank of each linear: the fuller the blue, the more of its full rank is left. "
        "Grey stayed dense, where two thin matrices would not have been smaller."
    )
    rows = [
        [path, str(row.rank), str(row.full_rank), percent(row.share), row.kept.replace("_", " ")]
        for path, row in left.items()
    ]
    listing = table(["Linear", "Rank", "Full rank", "Left", "Kept as"], rows)
    details = element("details", element("summary", f"All {len(rows)} linears by name") + listing)
    return section("Inside the model", figure(figures.draw_rank_map(left), caption), details)


def course(record: RunRecord) -> str:
    """Return how size, FLOPs and ranks moved over the run."""
    steps = _thin(record.steps)
    if len(steps) < 2:
        return ""
    dropping = [step for step in steps if step.tokens_kept is not None]
    parts = []
    if len(dropping) > 1:
        goal = "tokens" if record.target.get("target_tokens") is not None else "FLOPs"
        caption = (
            "Measured on training batches, where tokens leave softly while it is being learned who; a dotted line "
            "marks a change of phase."
        )
        parts.append(figure(draw_dropping_course(dropping, goal), caption))
    if not _has_all_weights(record) or not (dropping or record.exits):
        progress = figures.draw_progress(steps, record.target)
        caption = "As it would be deployed at each step; a dotted line marks a change of phase."
        parts.append(figure(progress, caption))
    known = record.final.ranks if record.final is not None else {}
    if known and any(set(known) <= set(step.ranks) for step in steps):
        paths = figures.draw_rank_paths(steps, known)
        parts.append(figure(paths, "Mean rank over the layers, as a share of the full rank."))
    losses = list(record.steps[-1].loss)
    if losses:
        first, last = record.steps[0].loss, record.steps[-1].loss
        rows = [[name, _loss(first.get(name)), _loss(last[name])] for name in losses]
        parts.append(table(["Loss", "First recorded step", "Last"], rows))
    return section("How the run went", *parts)


def reproduction(record: RunRecord) -> str:
    """Return the settings, the machine and the versions."""
    settings = json.dumps({"methods": record.methods, "target": record.target}, indent=2, default=str)
    parts = [element("details", element("summary", "Settings") + element("pre", escape(settings)))]
    facts = {**{f"machine: {k}": v for k, v in record.machine.items()}, **record.versions}
    if facts:
        rows = [[name, _plain(value)] for name, value in facts.items()]
        listing = table(["What", "Value"], rows, texts=2)
        parts.append(element("details", element("summary", "Machine and versions") + listing))
    return section("To do it again", *parts)


def _main_metric(record: RunRecord) -> str | None:
    """Accuracy if there is one, else the first metric that both models have, else the first of all; losses last."""
    dense, ours = record.metrics.get("dense") or {}, record.metrics.get("compressed") or {}
    names = [name for name in ours if name in dense] or [*ours, *dense]
    names.sort(key=lambda name: "loss" in name)
    return "accuracy" if "accuracy" in names else next(iter(names), None)


def _metric(record: RunRecord, model: str, name: str) -> float | None:
    value = (record.metrics.get(model) or {}).get(name)
    return None if value is None or not math.isfinite(value) else value


def _score(name: str, value: float) -> str:
    return percent(value) if name in _FRACTIONS else f"{value:.4g}"


def _change(name: str, value: float) -> str:
    words = f"{100 * value:+.2f} points" if name in _FRACTIONS else f"{value:+.4g}"
    return words.replace("-", "−", 1) if value < 0 else words


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _plain(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return str(value)


def _thin(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """At most some hundred points, the last among them: more cannot be seen, and would swell the page."""
    stride = max(1, math.ceil(len(steps) / _POINTS))
    kept = list(steps[::stride])
    return kept if not steps or kept[-1] is steps[-1] else [*kept, steps[-1]]

"""The model card: what was done to the model, what is left of it, what was measured and how to open it.

Sizes and FLOPs are counted here; anything measured (accuracy, latency) comes from the caller and is only
printed together with its command, machine and versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lightning_compress.deploy import exit_card
from lightning_compress.deploy.dropping_card import (
    NOTE_ON_SIZE,
    describe_dropping,
    drops_tokens,
    flops_of_text,
)
from lightning_compress.deploy.quantization_card import describe_quantization
from lightning_compress.deploy.skeleton import build_skeleton
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.surgery import get_module, linear_shape
from lightning_compress.plan import CompressionPlan, MethodRecord

__all__ = ["MeasuredTable", "disk_bytes", "model_card", "read_measurements"]

_TOKENS = 128
_ORIGIN = ("command", "machine", "versions")
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def disk_bytes(directory: str | Path) -> int:
    """Return the size in bytes of a model directory's weights, over all shards.

    Raises:
        ValueError: If there are no safetensors in the folder.
    """
    sizes = [path.stat().st_size for path in Path(directory).glob("*.safetensors")]
    if not sizes:
        raise ValueError(f"{directory} holds no *.safetensors file: pass a saved model's directory")
    return sum(sizes)


@dataclass(frozen=True)
class MeasuredTable:
    """Rows measured by one command on one machine."""

    origin: tuple[str, str, str]
    """Command, machine and versions, as text."""
    rows: tuple[dict[str, Any], ...]


def read_measurements(measurements: Mapping[str, Any] | None) -> tuple[MeasuredTable, ...]:
    """Group measured rows by where they come from.

    Args:
        measurements: ``{"rows": [{...}, ...], "command": ..., "machine": ..., "versions": ...}``. A row maps
            column names to values; it may bring its own command, machine or versions.

    Raises:
        ValueError: If there are no rows, or a row lacks one of the three.

    Example:
        >>> origin = {"command": "make demo", "machine": "2 cores", "versions": {"torch": "2.8"}}
        >>> read_measurements({**origin, "rows": [{"accuracy": 0.9}]})[0].origin
        ('make demo', '2 cores', 'torch 2.8')
    """
    if measurements is None:
        return ()
    rows = measurements.get("rows")
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError("measurements need 'rows': a list with one mapping per measured row")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        missing = [name for name in _ORIGIN if not row.get(name, measurements.get(name))]
        if missing:
            raise ValueError(
                f"the measured row {dict(row)} lacks {missing}: a number counts only with the command, "
                "machine and versions that produced it; give them with the row, or once beside 'rows'"
            )
        command, machine, versions = (_one_line(row.get(name, measurements.get(name))) for name in _ORIGIN)
        values = {name: value for name, value in row.items() if name not in _ORIGIN}
        groups.setdefault((command, machine, versions), []).append(values)
    return tuple(MeasuredTable(origin, tuple(found)) for origin, found in groups.items())


def model_card(
    model: PreTrainedModel,
    plan: CompressionPlan,
    *,
    weight_bytes: int,
    measurements: Sequence[MeasuredTable] = (),
) -> str:
    """Write the model card of a converted model; the licence is left to the user.

    Args:
        model: The converted model.
        plan: Its plan.
        weight_bytes: Size of its weights on disk, see :func:`disk_bytes`.
        measurements: Measured tables, see :func:`read_measurements`.
    """
    sections = [
        _front_matter(model, plan),
        f"# {type(model).__name__}, compressed with lightning-compress",
        _how_to_load(model, plan),
        "## Size",
        _size_table(model, weight_bytes, plan),
        "## Structure",
        *(_structure(model, record) for record in plan.methods),
        *([] if plan.methods else ["That of the dense model: nothing in it is compressed."]),
    ]
    kept = _mean_tokens_kept(measurements) if drops_tokens(plan) else None
    if kept is not None:
        sections.append(
            f"Measured below: {kept} of the tokens enter a layer, on average over layers and texts."
        )
    if measurements:
        sections += ["## Measured", *map(_measured, measurements)]
    return "\n\n".join(sections) + "\n"


def _front_matter(model: PreTrainedModel, plan: CompressionPlan) -> str:
    lines = ["---", "library_name: transformers"]
    base = str(getattr(model.config, "name_or_path", "") or "")
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base)}")
    tasks = [task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)]
    lines += [f"pipeline_tag: {task}" for task in tasks]
    tags = ["lightning-compress", "compressed", *dict.fromkeys(record.method for record in plan.methods)]
    return "\n".join([*lines, "tags:", *(f"- {tag.replace('_', '-')}" for tag in tags), "---"])


def _how_to_load(model: PreTrainedModel, plan: CompressionPlan) -> str:
    name = type(model).__name__
    opens = f'model = {name}.from_pretrained("path/to/this/folder")\n'
    if not plan.methods:
        return f"The model opens with transformers alone:\n\n```python\nfrom transformers import {name}\n\n{opens}```"
    lost = ["in which no token leaves"] * drops_tokens(plan) + ["without exits"] * exit_card.lets_texts_leave(
        plan
    )
    weights_stay = drops_tokens(plan) + sum(record.method == "multi_exit" for record in plan.methods)
    otherwise = (
        ", ".join(["opens the dense model", *[" and ".join(lost)] * bool(lost)])
        if len(plan.methods) == weights_stay
        else "leaves the compressed layers at random values"
    )
    return (
        "The model opens with transformers once lightning-compress is imported (`pip install "
        "lightning-compress`):\n\n"
        "```python\n"
        "import lightning_compress  # makes the compressed structure known to transformers\n"
        f"from transformers import {name}\n\n{opens}```\n\n"
        f"Without that import transformers only warns, and {otherwise}."
    )


def _size_table(model: PreTrainedModel, weight_bytes: int, plan: CompressionPlan) -> str:
    drops, exits = drops_tokens(plan), exit_card.lets_texts_leave(plan)
    dense = build_skeleton(model, None)
    before, after = count_parameters(dense), count_parameters(model)
    flops_before = count_flops(dense, [_TOKENS]).total
    flops_after = flops_of_text(model, _TOKENS) if drops or exits else count_flops(model, [_TOKENS]).total
    rows = [
        ("parameters of the linear layers", before.linear, after.linear),
        ("parameters of all layers", before.encoder, after.encoder),
        ("parameters in total", before.total, after.total),
        (
            f"FLOPs for one text of {_TOKENS} tokens" + ", if none leaves" * (drops or exits),
            flops_before,
            flops_after,
        ),
        ("bytes of the weights on disk", before.total * model.dtype.itemsize, weight_bytes),
    ]
    table = _table(
        ["", "dense", "compressed", "ratio"],
        [[name, f"{was:,.0f}", f"{now:,.0f}", f"{now / was:.3f}"] for name, was, now in rows],
    )
    notes = [*[NOTE_ON_SIZE] * drops, *[exit_card.NOTE_ON_SIZE] * exits]
    counted = "FLOPs are 2 MACs, counted; the dense bytes are computed from the parameters."
    return "\n\n".join([table, *notes, counted])


def _structure(model: PreTrainedModel, record: MethodRecord) -> str:
    settings = ", ".join(f"`{name}={value!r}`" for name, value in record.config.items() if value is not None)
    write = _STRUCTURES.get(record.method, _structure_as_json)
    parts = f"### {record.method}", settings, write(model, record.structure)
    return "\n\n".join(part for part in parts if part)


def _rank_table(model: PreTrainedModel, structure: Mapping[str, Any]) -> str:
    """One row per layer, one column per role: ``rank/full rank``, or ``dense``."""
    ranks, layers = structure["ranks"], describe(model).layers
    roles = list(dict.fromkeys(slot.role for layer in layers for slot in layer.linears))
    rows = []
    for layer in layers:
        kept = {}
        for slot in layer.linears:
            module = get_module(model, slot.path)
            rank = getattr(module, "rank", None)
            kept[slot.role] = "dense" if rank is None else f"{rank}/{min(linear_shape(module))}"
        rows.append([str(layer.index), *(kept.get(role, "") for role in roles)])
    shown = _table(["layer", *(role.replace("_", " ") for role in roles)], rows)
    return f"{len(ranks)} linear layers hold two thin factors; `rank/full rank`:\n\n{shown}"


def _structure_as_json(model: PreTrainedModel, structure: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(structure, indent=1)}\n```"


_STRUCTURES: dict[str, Callable[[PreTrainedModel, Mapping[str, Any]], str]] = {
    "soft_threshold_rank": _rank_table,
    "multi_exit": exit_card.describe_exits,
    "block_quantization": describe_quantization,
    **{
        method: partial(describe_dropping, method=method)
        for method in ("contribution_token_dropping", "bottleneck_token_dropping")
    },
}


def _mean_tokens_kept(measurements: Sequence[MeasuredTable]) -> str | None:
    """The shares under ``tokens_kept`` in measured rows, as text; a dense row beside them does not count."""
    rows = [row for table in measurements for row in table.rows]
    shares = [row["tokens_kept"] for row in rows if isinstance(row.get("tokens_kept"), float)]
    found = sorted({share for share in shares if 0.0 < share < 1.0})
    return " to ".join(f"{100 * share:.1f} %" for share in dict.fromkeys([*found[:1], *found[-1:]])) or None


def _measured(table: MeasuredTable) -> str:
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    rows = [[_one_line(row.get(name, "")) for name in columns] for row in table.rows]
    command, machine, versions = table.origin
    return f"{_table(columns, rows)}\n\nMeasured by `{command}` on {machine}, with {versions}."


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one_line(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_one_line, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|".join([" --- "] * len(columns))
    lines = [" | ".join(columns), rule, *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line.strip()} |" for line in lines)

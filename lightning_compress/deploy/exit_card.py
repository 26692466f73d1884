"""The part of a model card about exits: after which layers a text may leave, by what rule, and how to change it.

Used by :mod:`lightning_compress.deploy.model_card`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from lightning_compress.nn.exit_policy import ExitRule
from lightning_compress.nn.kept_flops import count_exit_flops
from lightning_compress.plan import CompressionPlan
from lightning_compress.runtime import packed_encoder

__all__ = ["NOTE_ON_SIZE", "describe_exits", "lets_texts_leave"]

NOTE_ON_SIZE = (
    "Texts leave early, weights stay: where sizes fall it is by other methods, and the exits are counted in. FLOPs "
    "fall with every text that leaves; by how much depends on the text, and the table has one that runs all layers "
    "and asks every exit."
)

_RULES = {
    "entropy": "the entropy of its answer{unit} is below the threshold",
    "max_prob": "its largest probability is above the threshold",
    "margin": "its two largest probabilities differ by more than the threshold",
    "patience": "as many exits in a row as the threshold says agree with the one before",
    "learned": "a small network guesses the chance that it is wrong, shared by all exits, to be below the threshold",
}


def lets_texts_leave(plan: CompressionPlan) -> bool:
    """Whether the plan has exits by which texts leave; those that share a decoder's head serve generation only."""
    return any(
        record.method == "multi_exit" and not record.structure.get("shared") for record in plan.methods
    )


def describe_exits(model: PreTrainedModel, structure: Mapping[str, Any]) -> str:
    """Return prose and a table of exits, as Markdown.

    Args:
        model: The converted model, with weights.
        structure: What the method's ``convert`` returned.
    """
    named = ", ".join(map(str, structure["exits"]))
    if structure.get("shared"):
        return (
            f"The states after layers {named}, counted from 0, were trained to be read by the model's own final norm "
            "and head: `model.generate(..., assistant_early_exit=n)` drafts tokens with the first `n` layers. No "
            "structure was changed, and every token runs all layers."
        )
    reads = "the first token" if structure["pooling"] == "cls" else "the mean over the text's tokens"
    dense = "a dense layer, " if structure["pooler"] else ""
    unit = ", as a share of that of equal probabilities," if structure["normalized"] else ""
    where = f"layer {named}" if len(structure["exits"]) == 1 else f"layers {named}"
    rule = _RULES[structure["rule"]].format(unit=unit)
    words = (
        f"There is an exit after {where}, counted from 0: {dense}`tanh` and a linear layer on {reads}. A text leaves "
        f"with an exit's answer where {rule}; later layers do not compute it. The model's output says in `exit_depth` "
        "how many layers each text ran."
    )
    return "\n\n".join([words, *_in_force(model)])


def _in_force(model: PreTrainedModel) -> list[str]:
    """Which exits are asked now, at what threshold, and how to change it."""
    encoder = packed_encoder(model)
    if encoder is None or encoder.exits is None:
        return []
    exits, rule = encoder.exits, encoder.exits.rule
    costs = count_exit_flops(model, exits, exits.layers)
    asked = rule.asked_layers()
    rows = [
        ["exit after layer", *map(str, exits.layers)],
        ["---"] * (len(exits.layers) + 1),
        ["asked", *("yes" if layer in asked else "no" for layer in exits.layers)],
        ["FLOPs if asked", *(f"{costs[layer]:,}" for layer in exits.layers)],
    ]
    return ["\n".join(f"| {' | '.join(row)} |" for row in rows), _threshold(rule)]


def _threshold(rule: ExitRule) -> str:
    threshold = float(rule.threshold)
    if threshold == rule.off:
        now = "lets nobody leave early, and every text runs all layers"
    else:
        far = "larger" if rule.is_below else "smaller"
        now = f"is {threshold:.3g}: the {far} it is, the earlier texts leave"
    return (
        f"The threshold {now}. `lightning_compress.set_exit_threshold(model, threshold)` changes it without training, "
        "`set_exit_threshold(model, None)` lets nobody leave early, and `choose_exit_threshold(model, batches, "
        "max_drop=0.01)` finds one on data of yours."
    )

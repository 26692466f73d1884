"""The part of a model card about dropped tokens: which may leave, before which layers, by what rule.

Used by :mod:`lightning_compress.deploy.model_card`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_compress.nn.kept_flops import count_kept_flops
from lightning_compress.plan import CompressionPlan
from lightning_compress.runtime import packed_encoder

__all__ = ["NOTE_ON_SIZE", "describe_dropping", "drops_tokens", "flops_of_text"]

NOTE_ON_SIZE = (
    "Tokens leave, weights stay: where sizes fall it is by other methods, and the small networks that decide who "
    "leaves are counted in. FLOPs fall with every token that leaves; by how much depends on the text, and the table "
    "has one that loses none."
)

_RULES = {
    "contribution_token_dropping": (
        "Before each of these layers a small network ({width} neurons) predicts what share of the prediction each "
        "token carries. A token whose share is below `threshold / n`, with `n` tokens still there, leaves: no later "
        "layer computes it, and no other token sees it. How many leave differs from text to text."
    ),
    "bottleneck_token_dropping": (
        "Before each of these layers a small network ({width} neurons) gives each token log odds of being needed. A "
        "token below the threshold leaves: no later layer computes it, and no other token sees it. How many leave "
        "differs from text to text."
    ),
}
_WIDTHS = ("predictor_width", "sampler_width")


def drops_tokens(plan: CompressionPlan) -> bool:
    """Whether a method of the plan lets tokens leave."""
    return any(record.method in _RULES for record in plan.methods)


def flops_of_text(model: PreTrainedModel, tokens: int) -> float:
    """Return the FLOPs of a text of which no token leaves, scores included."""
    num_layers = int(model.config.num_hidden_layers)
    kept_BL = torch.full((1, num_layers), tokens)
    return float(count_kept_flops(model, kept_BL, torch.tensor([tokens])))


def describe_dropping(model: PreTrainedModel, structure: Mapping[str, Any], method: str) -> str:
    """Return prose and a table of thresholds, as Markdown.

    Args:
        model: The converted model, with weights.
        structure: What the method's ``convert`` returned.
        method: Its stem.
    """
    layers: Sequence[int] = structure["layers"]
    width = next((structure[name] for name in _WIDTHS if name in structure), "?")
    named = ", ".join(map(str, layers))
    where = (
        f"Tokens may leave before layer {named}"
        if len(layers) == 1
        else f"Tokens may leave before layers {named}"
    )
    parts = [
        f"{where}, counted from 0. {_RULES[method].format(width=width)} {_protected(structure)}",
        *_thresholds(model, layers),
    ]
    return "\n\n".join(parts)


def _protected(structure: Mapping[str, Any]) -> str:
    first, ids = int(structure["protect_first"]), list(structure["protect_tokens"])
    words = "The first token" if first == 1 else f"The first {first} tokens"
    verb = "leaves" if first == 1 else "leave"
    more = f"; nor do tokens with the ids {', '.join(map(str, ids))}" if ids else ""
    return f"{words} never {verb}{more}."


def _thresholds(model: PreTrainedModel, layers: Sequence[int]) -> list[str]:
    """The thresholds in force, and how to turn them."""
    encoder = packed_encoder(model)
    policy: Any = None if encoder is None else encoder.policy
    scale, eta_K, threshold = (getattr(policy, name, None) for name in ("scale", "eta_K", "threshold"))
    parts = []
    if isinstance(eta_K, torch.Tensor) and scale is not None:
        cells = [f"{float(eta * scale):.3f}" for eta in eta_K]
        rows = [["layer", *map(str, layers)], ["---"] * (len(layers) + 1), ["threshold", *cells]]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    elif isinstance(threshold, torch.Tensor):
        parts.append(f"The threshold is {float(threshold):.3f}.")
    if scale is not None:
        parts.append(
            f"`lightning_compress.set_threshold_scale(model, {float(scale):.3g})` is what is set now: a larger number "
            "drops more tokens, a smaller one fewer, 0 none, without training."
        )
    return parts

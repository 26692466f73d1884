"""Exits to test the packed engine with, and the slow truth: the family's model, one example at a time.

Shape legend: B examples, N rows, C classes, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan
from lightning_compress.methods import MethodConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.nn.exit_policy import ExitRule
from lightning_compress.nn.exit_rules import make_exit_rule
from lightning_compress.nn.segments import Segments, segment_sum

__all__ = [
    "EVERYBODY_OF_TWO",
    "ToyExits",
    "add_exits",
    "alone",
    "exiting_model",
    "labelled_batches",
    "together",
]

EVERYBODY_OF_TWO = math.log(2) + 1e-6
"""A threshold of the entropy of two classes that the least sure example is below."""


class ToyExits:
    """Linear exits on the first token, or on the mean of all, and the logits of who left."""

    def __init__(self, heads: nn.ModuleDict, rule: ExitRule, pooling: str = "cls") -> None:
        self.heads, self.rule, self.pooling = heads, rule, pooling
        self.layers = tuple(int(layer) for layer in heads)
        self.left: dict[int, tuple[int, Tensor]] = {}
        self.looked: list[tuple[int, list[int]]] = []

    def start(self, segments: Segments) -> None:
        self.left, self.looked = {}, []
        self.rule.start(segments.num_sequences, segments.origin_N.device)

    def look(self, layer: int, hidden_ND: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        pooled_BD = hidden_ND[segments.firsts_B]
        if self.pooling == "mean":
            sums = [segment_sum(column_N, segments) for column_N in hidden_ND.unbind(1)]
            pooled_BD = torch.stack(sums, 1) / segments.lengths_B[:, None]
        return self.heads[str(layer)](pooled_BD), pooled_BD

    def check(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        if not self.rule.is_asked(layer):
            return None
        assert hidden_ND.shape[0] == segments.num_rows > 0
        self.looked.append((layer, segments.examples_B.tolist()))
        logits_BC, pooled_BD = self.look(layer, hidden_ND, segments)
        leaves_B = self.rule.leaves(layer, logits_BC, pooled_BD)
        for example, logits_C in zip(
            segments.examples_B[leaves_B].tolist(), logits_BC[leaves_B], strict=True
        ):
            self.left[example] = (layer, logits_C)
        self.rule.keep(~leaves_B)
        return ~leaves_B


def add_exits(
    model: Any, rule: str = "entropy", pooling: str = "cls", seed: int = 3, **settings: Any
) -> ToyExits:
    """Give a model random exits after all layers but the last, as ``model.exits``; the packed engine is not told."""
    torch.manual_seed(seed)
    config, weight = model.config, next(model.parameters())
    layers, num_labels = range(config.num_hidden_layers - 1), config.num_labels
    heads = nn.ModuleDict({str(layer): nn.Linear(config.hidden_size, num_labels) for layer in layers})
    model.exits = heads.to(weight.dtype)
    made = make_exit_rule(rule, layers, num_labels=num_labels, hidden_size=config.hidden_size, **settings)
    return ToyExits(model.exits, made.to(weight.dtype), pooling)


@torch.no_grad()
def together(model: nn.Module, exits: ToyExits, batch: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Run a packed model; return the logits with those of the exits in their places, and the layers each ran."""
    logits_BC = model(**batch).logits
    depth = [model.config.num_hidden_layers] * len(logits_BC)
    for example, (layer, logits_C) in exits.left.items():
        logits_BC[example], depth[example] = logits_C, layer + 1
    return logits_BC, depth


@torch.no_grad()
def alone(model: nn.Module, exits: ToyExits, batch: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """What :func:`together` should return, by the unpacked model over one example at a time, all layers computed."""
    logits, depth = [], []
    for ids_T, mask_T in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        out = model(input_ids=ids_T[None, mask_T.bool()], output_hidden_states=True)
        found, layers = out.logits[0], model.config.num_hidden_layers
        exits.rule.start(1, "cpu")
        for layer in exits.layers:
            hidden_1TD = out.hidden_states[layer + 1]
            pooled_1D = hidden_1TD[:, 0] if exits.pooling == "cls" else hidden_1TD.mean(1)
            says_1C = exits.heads[str(layer)](pooled_1D)
            if bool(exits.rule.leaves(layer, says_1C, pooled_1D)):
                found, layers = says_1C[0], layer + 1
                break
        logits.append(found)
        depth.append(layers)
    return torch.stack(logits), depth


def labelled_batches(lengths: list[list[int]], num_labels: int = 2) -> list[dict[str, Tensor]]:
    """Ragged batches of random texts with random labels."""
    batches = []
    for seed, row in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed)
        mask_BT = (torch.arange(max(row)) < torch.tensor(row)[:, None]).long()
        ids_BT = torch.randint(2, 40, mask_BT.shape, generator=generator)
        labels_B = torch.randint(0, num_labels, (len(row),), generator=generator)
        batches.append(
            {"input_ids": ids_BT.where(mask_BT > 0, 0), "attention_mask": mask_BT, "labels": labels_B}
        )
    return batches


def exiting_model(model: Any, *others: MethodConfig, **settings: Any) -> Any:
    """Convert a model with the library's own exits, untrained, but sure of something."""
    compressor = Compressor(model, [*others, MultiExitConfig(**settings)])
    compressor.prepare()
    attach_plan(model, compressor.convert())
    torch.manual_seed(1)
    for head in model.exits.values():
        nn.init.normal_(head.classifier.weight, std=0.4)
    return model.eval()

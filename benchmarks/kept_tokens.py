"""What a packed model answers and keeps of a data set, and what that is worth in FLOPs.

FLOPs are 2 MACs over unpadded tokens, the ratio of totals over all texts. ``speedup`` prices the last layer in full,
``speedup_run`` as the packed engine runs it: for the classification token only, in the dense model too.

Shape legend: B texts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_compress
from lightning_compress.data import TextClassificationData
from lightning_compress.nn.kept_flops import DroppingCosts, LastLayer
from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.trial import kept_counts

__all__ = ["Kept", "run_packed", "run_test_part"]


@dataclass(frozen=True)
class Kept:
    """Counts of all texts of a run."""

    kept_BL: Tensor
    """Tokens that entered each layer; 0 after a text has left."""
    lengths_B: Tensor
    """Tokens without padding."""
    right: int
    """Texts answered as labelled; 0 without labels."""

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.lengths_B)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.texts

    def speedup(self, model: nn.Module, dense: nn.Module | None, last_layer: LastLayer) -> float:
        """Return dense over compressed FLOPs.

        Args:
            model: The compressed model.
            dense: What it is held against; None is the model itself, without what it drops by and without exits.
            last_layer: Whether the last layer is priced for ``"all"`` tokens or the ``"first"`` only, in both models.
        """
        if dense is None:
            before = DroppingCosts.of(model, policy_flops_per_token=0, exit_flops=0, last_layer=last_layer)
        else:
            before = DroppingCosts.of(dense, last_layer=last_layer)
        all_BL = self.lengths_B[:, None].expand(-1, len(before.kept))
        dense_B = before.flops(all_BL, self.lengths_B)
        compressed_B = DroppingCosts.of(model, last_layer=last_layer).flops(self.kept_BL, self.lengths_B)
        return round(float(dense_B.sum() / compressed_B.sum()), 4)

    def speedups(self, model: nn.Module, dense: nn.Module | None = None) -> dict[str, float]:
        """Return both prices, as fields of a row."""
        return {
            "speedup": self.speedup(model, dense, "all"),
            "speedup_run": self.speedup(model, dense, "first"),
        }


def run_packed(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Kept:
    """Run a packed model over batches and gather the counts."""
    encoder: Any = packed_encoder(model)
    right, kept, lengths = 0, [], []
    with torch.inference_mode():
        for batch in batches:
            logits_BC = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            if "labels" in batch:
                right += int((logits_BC.argmax(-1) == batch["labels"]).sum())
            kept.append(kept_counts(encoder))
            lengths.append(batch["attention_mask"].sum(dim=1))
    return Kept(torch.cat(kept), torch.cat(lengths), right)


def run_test_part(model: nn.Module, data: TextClassificationData) -> Kept:
    """Pack a model, in place, and run it over the test part in bf16 autocast."""
    data.prepare_data()
    data.setup("test")
    batches: Any = data.test_dataloader()
    with torch.autocast("cpu", torch.bfloat16):
        return run_packed(lightning_compress.pack(model).eval(), batches)

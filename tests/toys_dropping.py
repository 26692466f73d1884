"""Tiny token-dropping models, converted without training, whose predictors tell tokens apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan
from lightning_compress.methods import MethodConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.runtime import packed_encoder
from tests.toys import VOCABULARY, tiny_bert


def dropping_model(
    model: PreTrainedModel, method: type[MethodConfig] = ContributionTokenDroppingConfig, **settings: Any
) -> PreTrainedModel:
    """Give a model predictors with large weights, and convert it; thresholds are at the mean share."""
    compressor = Compressor(model, [method(**settings)])
    compressor.prepare()
    attach_plan(model, compressor.convert())
    encoder = packed_encoder(model)
    assert encoder is not None
    policy: Any = encoder.policy
    torch.manual_seed(5)
    with torch.no_grad():
        for linear in (module for module in policy.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.5)
        if method is ContributionTokenDroppingConfig:
            policy.eta_K.fill_(1.0)
    return model.eval()


def dropping_bert(
    settings: dict[str, Any] | None = None,
    method: type[MethodConfig] = ContributionTokenDroppingConfig,
    **overrides: Any,
) -> PreTrainedModel:
    """A two-layer BERT that drops tokens."""
    return dropping_model(tiny_bert(**overrides), method, **(settings or {}))


def ragged_batch(lengths: list[int], padded: int | None = None, seed: int = 3) -> dict[str, Tensor]:
    """Random tokens of these lengths with a mask, padded to the longest or further, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    real_BT = torch.arange(padded or max(lengths)) < torch.tensor(lengths)[:, None]
    ids_BT = nn.functional.pad(ids_BT, (0, real_BT.shape[1] - ids_BT.shape[1]))
    labels_B = torch.randint(0, 2, (len(lengths),), generator=generator)
    return {"input_ids": ids_BT * real_BT, "attention_mask": real_BT.long(), "labels": labels_B}


class ToyTokenizer:
    """Writes WordPieces, or byte pairs."""

    all_special_tokens = ("<s>",)

    def __init__(self, mark: str = "") -> None:
        self.mark = mark

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" if number == 2 else f"{self.mark}w{number}" for number in ids]

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        return "".join(pieces).replace("Ġ", " ").replace("w", "é")

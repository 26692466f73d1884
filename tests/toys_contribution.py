"""Tiny classifiers of every family, texts of several lengths, and models that drop tokens with decided predictors."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_compress.losses import TERMS
from lightning_compress.methods.contribution_token_dropping import (
    ContributionTokenDroppingConfig,
    ContributionTokenDroppingHandle,
    prepare,
    update,
)
from lightning_compress.nn.contribution_token_dropping import KeyBias
from lightning_compress.runtime import packed_encoder

__all__ = ["FAMILIES", "SEPARATOR", "classifier", "dropping", "hard_pass", "packed_pass", "step", "texts"]

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 2}),
    "electra": ("Electra", {**SIZES, "embedding_size": 16}),
    "distilbert": (
        "DistilBert",
        {
            **{"vocab_size": 50, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
            **{"max_position_embeddings": 40, "initializer_range": 0.3},
        },
    ),
}
SEPARATOR = 3


def classifier(family: str = "bert", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, "num_labels": 3, "pad_token_id": 1, **changes}
    )
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def texts(
    family: str = "bert", pairs: bool = False, lengths: tuple[int, ...] = (9, 5, 1, 7)
) -> dict[str, Tensor]:
    """Texts of several lengths, with a separator at the end and, in pairs, in the middle."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    types = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        if length > 2:
            ids[row, length - 1] = SEPARATOR
        if pairs and length > 4:
            ids[row, length // 2] = SEPARATOR
            types[row, length // 2 + 1 : length] = 1
    inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    return {**inputs, "token_type_ids": types} if pairs and family != "distilbert" else inputs


def dropping(model: nn.Module, eta: float = 0.7, **settings: Any) -> ContributionTokenDroppingHandle:
    """A prepared model past its warm-up, whose predictors have opinions."""
    handle = prepare(model, ContributionTokenDroppingConfig(**{"warmup": 0.0, **settings}))
    update(handle, 0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in handle.policy.predictors.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(std=0.5)
        handle.policy.eta_K.fill_(eta)
    return handle


@torch.no_grad()
def hard_pass(
    handle: ContributionTokenDroppingHandle, inputs: dict[str, Tensor]
) -> tuple[Tensor, list[list[int]]]:
    """Logits in evaluation, and per layer the places of the tokens that its attention sees."""
    logits = handle.model.eval()(**inputs).logits
    real = inputs["attention_mask"].bool()
    kept = [
        ((record.bias_BT == 0) & real).flatten().nonzero().flatten().tolist()
        for record in handle.tape.read(KeyBias)
    ]
    return logits, kept


@torch.no_grad()
def packed_pass(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[list[int]]]:
    logits = model.eval()(**inputs).logits
    return logits, [segments.origin_N.tolist() for segments in packed_encoder(model).latest]


def step(handle: ContributionTokenDroppingHandle, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    loss = handle.model.train()(**inputs, labels=labels).loss
    return loss + sum(TERMS["contribution_token_dropping"](handle).values())

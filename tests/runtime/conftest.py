"""Ragged batches, models whose weights are large enough for attention to matter, and a policy to drop by."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.surgery import get_module, replace_module
from tests.nn.conftest import tiny

__all__ = ["FAMILIES", "HalfPolicy", "MaskedEncoder", "classifier", "ragged", "tiny"]

FAMILIES = ["bert", "roberta", "distilbert", "electra"]
_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}


@pytest.fixture
def classifier(tiny):
    """Return a builder of models by family and head: ``classifier("bert")``, ``classifier("bert", "Model")``."""

    def build(family: str, head: str = "ForSequenceClassification", **changes) -> nn.Module:
        model = tiny(family, f"{_NAMES[family]}{head}", **{"initializer_range": 0.3, **changes})
        return model.double()

    return build


def ragged(lengths: list[int], width: int | None = None, left: bool = False) -> dict[str, Tensor]:
    """Random token ids of these lengths, padded on one side, and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths, default=0) if width is None else width
    ids = torch.randint(2, 50, (len(lengths), width), generator=generator)
    places = torch.arange(width).flip(0) if left else torch.arange(width)
    mask = (places < torch.tensor(lengths, dtype=torch.long)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


class HalfPolicy(nn.Module):
    """Keeps the first token and, of the others, those of which a wave, another in each layer, is high."""

    def __init__(self, width: int = 32, layers: int = 2, threshold: float = -0.4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.register_buffer(
            "normal_LD", torch.randn(layers, width, generator=generator, dtype=torch.float64)
        )
        self.threshold = threshold

    def protected(self, real_BT: Tensor) -> Tensor:
        return (real_BT.cumsum(1) == 1) & real_BT

    def side(self, layer: int, hidden: Tensor) -> Tensor:
        return (hidden @ self.normal_LD[layer].to(hidden.dtype)).sin() > self.threshold

    def decide(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        assert segments.protected_N is not None
        return self.side(layer, hidden_ND) | segments.protected_N


class MaskedEncoder(nn.Module):
    """The slow truth: the family's layers over the padded batch, with dropped tokens hidden as keys."""

    def __init__(self, encoder: nn.Module, policy: HalfPolicy, mask_BT: Tensor) -> None:
        super().__init__()
        self.layer, self.policy = encoder.layer, policy
        self.seen_BT = mask_BT.bool()
        self.first_BT = policy.protected(self.seen_BT)
        self.kept: list[Tensor] = []

    @classmethod
    def install(cls, model: nn.Module, policy: HalfPolicy, mask_BT: Tensor) -> "MaskedEncoder":
        path = describe(model).encoder
        encoder = cls(get_module(model, path), policy, mask_BT)
        replace_module(model, path, encoder)
        return encoder

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        for index, layer in enumerate(self.layer):
            self.seen_BT = self.seen_BT & (self.policy.side(index, hidden_states) | self.first_BT)
            self.kept.append(self.seen_BT)
            hidden_BK = torch.zeros(self.seen_BT.shape, dtype=hidden_states.dtype).masked_fill(
                ~self.seen_BT, -1e30
            )
            hidden_states = layer(hidden_states, hidden_BK[:, None, None])
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

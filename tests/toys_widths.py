"""What tests of the surgery of widths share: lively models, and how to close what would be cut off."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import dense_weight, get_module

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Give every parameter, biases and norms too, a value of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def columns(model: nn.Module, layer: int, role: str) -> Tensor:
    """The weight ``[out, in]`` of the layer's linear with this role, as a view."""
    slot = next(slot for slot in describe(model).layers[layer].linears if slot.role == role)
    return dense_weight(get_module(model, slot.path))


@torch.no_grad()
def zero_heads(model: nn.Module, layer: int, dropped: list[int]) -> None:
    """Cut what the heads (all query heads of a key-value group) say off, by zeros in the output's columns."""
    anatomy = describe(model).layers[layer]
    queries = anatomy.num_heads // anatomy.num_key_value_heads
    for head in range(anatomy.num_heads):
        if head // queries in dropped:
            start = head * anatomy.head_dim
            columns(model, layer, "attention_output")[:, start : start + anatomy.head_dim] = 0.0


@torch.no_grad()
def zero_neurons(model: nn.Module, layer: int, dropped: list[int]) -> None:
    for neuron in dropped:
        columns(model, layer, "ffn_out")[:, neuron] = 0.0

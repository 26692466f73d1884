"""Gradient saliency of a fine-tuned teacher: which tokens carried its prediction. Computed once per text.

The next chapter is :mod:`lightning_compress.losses.contribution_token_dropping`, which lets predictors imitate it.

Shape legend: B batch, T padded length, D embedding size, C classes, M texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import get_module

__all__ = ["SaliencyCache", "gradient_saliency"]

_KEY_BYTES = 16


def gradient_saliency(teacher: nn.Module, inputs: Mapping[str, Any], labels_B: Tensor | None) -> Tensor:
    """Return ``|| dy_c / de_i * e_i ||_2`` of each token, float ``[B, T]``; 0 for padding.

    ``e`` is the output of the embedding layer and ``y_c`` the logit of the gold class, or the scalar output of a
    regression. Examples do not depend on each other, so one backward pass of the sum serves the whole batch.

    Args:
        teacher: A fine-tuned sequence classifier; runs in evaluation mode and gets no gradients.
        inputs: Its ``input_ids`` ``[B, T]``, and ``attention_mask`` and ``token_type_ids`` where there are any.
        labels_B: Gold classes; where None the teacher's own prediction counts. Not used for regression.

    Paper: AdapLeR, specification §1.2, stage 1.
    """
    seen: list[Tensor] = []
    with torch.enable_grad(), _evaluating(teacher), _embeddings_of(teacher, seen), _without_fp16(inputs):
        logits_BC = teacher(**inputs).logits.float()
        (gradient_BTD,) = torch.autograd.grad(_explained(logits_BC, labels_B).sum(), seen[-1])
    saliency_BT = (gradient_BTD.float() * seen[-1].detach().float()).norm(dim=2)
    mask_BT = inputs.get("attention_mask")
    return saliency_BT if mask_BT is None else saliency_BT * mask_BT.bool()


def _explained(logits_BC: Tensor, labels_B: Tensor | None) -> Tensor:
    """Return the logits to explain: gold, or predicted where there is no gold class (negative labels are ignored)."""
    if logits_BC.shape[1] == 1:
        return logits_BC
    if labels_B is not None and labels_B.shape == logits_BC.shape:  # several classes, or a distribution
        return logits_BC * labels_B
    predicted_B = logits_BC.argmax(dim=1)
    gold_B = predicted_B if labels_B is None else labels_B.long().flatten()
    return logits_BC.gather(1, torch.where(gold_B < 0, predicted_B, gold_B)[:, None])


@contextmanager
def _without_fp16(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Switch fp16 autocasting off: nobody scales these gradients, and small ones would vanish."""
    device = inputs["input_ids"].device.type
    is_on = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False) if is_on else nullcontext():
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _embeddings_of(model: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Make the embeddings a leaf of the graph, and note them."""

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = get_module(model, describe(model).embeddings).register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


class SaliencyCache:
    """Saliencies of texts seen before, found again by content, so that shuffled epochs cost nothing.

    Example:
        >>> cache = SaliencyCache()
        >>> inputs = {"input_ids": torch.tensor([[5, 6]])}
        >>> cache.look_up(inputs, None, compute=lambda inputs, labels: torch.tensor([[1.0, 3.0]]))
        tensor([[0.2500, 0.7500]])
        >>> len(cache)
        1
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, inputs: Mapping[str, Any], labels_B: Tensor | None, compute: Any) -> Tensor:
        """Return saliencies that sum to 1 over each text, ``[B, T]``, on the device of the inputs.

        Args:
            inputs: ``input_ids`` ``[B, T]`` and what goes with them.
            labels_B: Labels, part of what a text is known by.
            compute: Called as ``compute(inputs, labels_B)`` with the rows that are new, returns their raw saliency.

        Raises:
            ValueError: If a row holds padding only.
        """
        ids_BT = inputs["input_ids"]
        keys = _keys(inputs, labels_B)
        new = list({key: row for row, key in enumerate(keys) if key not in self._known}.values())
        if new:
            rows = torch.tensor(new, device=ids_BT.device)
            part = {name: value[rows] for name, value in inputs.items()}
            raw_MT = compute(part, None if labels_B is None else labels_B[rows])
            shares_MT = (raw_MT / raw_MT.sum(dim=1, keepdim=True).clamp_min(1e-30)).half().cpu()
            widths = [int(mask.nonzero()[-1]) + 1 for mask in _masks(part)]
            for row, share_T, width in zip(new, shares_MT, widths, strict=True):
                self._known[keys[row]] = share_T[:width].clone()
        saliency_BT = torch.zeros(ids_BT.shape, dtype=torch.float32)
        for row, key in enumerate(keys):
            share_T = self._known[key]
            saliency_BT[row, : len(share_T)] = share_T
        return saliency_BT.to(ids_BT.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as three tensors: keys, lengths and values."""
        keys = torch.frombuffer(bytearray(b"".join(self._known)), dtype=torch.uint8) if self._known else None
        values = list(self._known.values())
        return {
            "keys": torch.zeros((0, _KEY_BYTES), dtype=torch.uint8)
            if keys is None
            else keys.view(-1, _KEY_BYTES),
            "lengths": torch.tensor([len(value) for value in values], dtype=torch.long),
            "values": torch.cat(values) if values else torch.zeros(0, dtype=torch.float16),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over :meth:`state_dict`."""
        parts = state["values"].cpu().split(state["lengths"].tolist()) if len(state["lengths"]) else ()
        keys = [bytes(key.tolist()) for key in state["keys"]]
        self._known = dict(zip(keys, (part.clone() for part in parts), strict=True))


def _masks(inputs: Mapping[str, Any]) -> Tensor:
    mask_BT = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask_BT is None else mask_BT


def _keys(inputs: Mapping[str, Any], labels_B: Tensor | None) -> list[bytes]:
    """Return a digest of each row's real tokens, their types and its label."""
    columns: Sequence[Tensor] = [
        inputs["input_ids"],
        *(v for v in [inputs.get("token_type_ids")] if v is not None),
    ]
    packed_BTX = torch.stack([column.cpu() for column in columns], dim=-1).to(torch.int32)
    masks_BT = _masks(inputs).bool().cpu()
    if not bool(masks_BT.any(dim=1).all()):
        empty = (~masks_BT.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {empty} of the batch hold no token, only padding: leave them out")
    labels: Sequence[Any] = [None] * len(packed_BTX) if labels_B is None else labels_B.tolist()
    digests = []
    for row_TX, mask_T, label in zip(packed_BTX, masks_BT, labels, strict=True):
        content = (
            row_TX[mask_T].contiguous().numpy().tobytes()
            + repr((label, int(mask_T.long().argmax()))).encode()
        )
        digests.append(hashlib.blake2b(content, digest_size=_KEY_BYTES).digest())
    return digests

"""The teacher of ContributionTokenDropping: a fine-tuned model whose gradients say which tokens mattered.

It is kept beside the model, never inside it, so that nothing saves, optimises or wraps it. The saliencies are in
:mod:`lightning_compress.nn.saliency`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.few_bits import quantize_linears
from lightning_compress.nn.saliency import SaliencyCache, gradient_saliency
from lightning_compress.nn.surgery import get_module

__all__ = ["SELF", "SaliencyTeacher"]

SELF = "self"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SaliencyTeacher:
    """A model that explains texts, and everything it said so far.

    Args:
        source: ``"self"`` (the student, as it will be when :meth:`settle` is called), or folder or name of a sequence
            classifier for :meth:`~transformers.AutoModelForSequenceClassification.from_pretrained`.
        bits: Hold its linears in 4 or 8 bits; None as they are.
        student: The model that is compressed.

    Raises:
        ValueError: If the teacher cannot be loaded, or has another vocabulary or other classes than the student.
    """

    def __init__(self, source: str, bits: int | None, student: nn.Module) -> None:
        self.source, self.bits = source, bits
        self.cache = SaliencyCache()
        self.model = None if source == SELF else self._prepared(_load(source, student))

    def settle(self, student: nn.Module) -> None:
        """Take a snapshot of the student, if it is its own teacher."""
        if self.source == SELF:
            self.model = self._prepared(snapshot(student))

    @torch.compiler.disable
    def saliency(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the saliency of each token, ``[B, T]``, summing to 1 over each text.

        Args:
            inputs: Arguments of the student's forward pass; its ``labels`` name the gold classes if there are any.

        Raises:
            ValueError: If there are no ``input_ids``.
        """
        if inputs.get("input_ids") is None:
            raise ValueError(
                "saliencies are kept by token ids, but the model was called without input_ids: pass input_ids, not "
                "inputs_embeds, to the model"
            )
        model = self.model
        assert model is not None, "the teacher is settled before dropping begins"
        texts = {name: inputs[name] for name in _INPUTS if inputs.get(name) is not None}
        device = texts["input_ids"].device
        if next(model.parameters()).device != device:
            model.to(device)

        def explain(part: Mapping[str, Any], labels_B: Tensor | None) -> Tensor:
            return gradient_saliency(model, part, labels_B)

        return self.cache.look_up(texts, inputs.get("labels"), explain)

    def state_dict(self) -> dict[str, Any]:
        """Return what was said so far and, of a student that is its own teacher, its weights."""
        own = self.source == SELF and self.model is not None
        weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()} if own else None  # type: ignore[union-attr]
        return {"weights": weights, "cache": self.cache.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Take over :meth:`state_dict`.

        Args:
            state: The state.
            student: A model of the structure that the snapshot had.
        """
        self.cache.load_state_dict(state["cache"])
        if state["weights"] is not None:
            self.model = self._prepared(snapshot(student))
            self.model.load_state_dict(state["weights"])

    def _prepared(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        return model if self.bits is None else quantize_linears(model, self.bits)


def snapshot(student: nn.Module) -> nn.Module:
    """Return a copy of a model that drops no token."""
    model = copy.deepcopy(student)
    for module in model.modules():
        if isinstance(module, DroppingEncoder):
            module.policy.is_active = False
        module._forward_pre_hooks.clear()
    return model.eval()


def _load(source: str, student: nn.Module) -> nn.Module:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = "" if Path(source).exists() else " (there is no such folder)"
        raise ValueError(f"teacher={source!r} cannot be loaded{hint}: {error}") from error
    theirs, ours = model.config, student.config
    for what, attribute in (("tokens in its vocabulary", "vocab_size"), ("labels", "num_labels")):
        if getattr(theirs, attribute) != getattr(ours, attribute):
            raise ValueError(
                f"teacher={source!r} has {getattr(theirs, attribute)} {what}, the model {getattr(ours, attribute)}: "
                "give a teacher that was fine-tuned on the same task with the same tokenizer, or teacher='self'"
            )
    get_module(model, describe(model).embeddings)
    return model.eval()

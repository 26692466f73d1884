"""The teacher of ContributionTokenDropping: a fine-tuned model whose gradients say which tokens mattered.

Where it comes from is in :mod:`lightning_compress.methods.teacher`, the saliencies are in
:mod:`lightning_compress.nn.saliency`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.methods.teacher import MODULE, SELF, Teacher, check_same_task, load_teacher, snapshot
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.saliency import SaliencyCache, gradient_saliency

__all__ = ["MODULE", "SELF", "SaliencyTeacher", "snapshot"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SaliencyTeacher(Teacher):
    """A sequence classifier that explains texts, and everything it said so far.

    Args:
        source: As for a :class:`~lightning_compress.methods.teacher.Teacher`.
        bits: Hold its linears in 4 or 8 bits; None as they are.
        given: The teacher, if ``source`` says so.

    Raises:
        ValueError: If a model is given, but another source.
    """

    callback = "ContributionTokenDropping"

    def __init__(self, source: str, bits: int | None = None, given: nn.Module | None = None) -> None:
        super().__init__(source, bits, given)
        self.cache = SaliencyCache()

    def load(self, student: nn.Module) -> nn.Module:
        """Return the sequence classifier that the source names, whatever the student's kind."""
        return load_teacher(self.source)

    def check(self, model: nn.Module, student: nn.Module) -> None:
        """See that a teacher from elsewhere predicts a class per text, and fits the student.

        Raises:
            ValueError: If it is no sequence classifier of a known family, or has another vocabulary or other classes
                than the student.
        """
        anatomy = describe(model)
        if anatomy.head is None or anatomy.is_head_per_token:
            raise ValueError(
                f"teacher={self.source!r} is a {type(model).__name__}, whose prediction is not one per text: give a "
                "sequence classifier that was fine-tuned on the same task, or teacher='self'"
            )
        check_same_task(self.source, model, student)

    def saliency(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the saliency of each token, ``[B, T]``, summing to 1 over each text.

        Args:
            inputs: Arguments of the student's forward pass; its ``labels`` name the gold classes if there are any.

        Raises:
            ValueError: If there are no ``input_ids``.
        """
        if inputs.get("input_ids") is None:
            raise ValueError(
                "saliencies are kept by token ids, but the model was called without input_ids, or only a part of it "
                "was, such as its base model: call the whole model and pass input_ids, not inputs_embeds"
            )
        texts = {name: inputs[name] for name in _INPUTS if inputs.get(name) is not None}
        model = self.on(texts["input_ids"].device)
        return _look_up(self.cache, model, texts, inputs.get("labels"))  # type: ignore[call-arg]

    def state_dict(self) -> dict[str, Any]:
        """Return what was said so far and, of a student that is its own teacher, its weights."""
        return {**super().state_dict(), "cache": self.cache.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Take over :meth:`state_dict`.

        Args:
            state: The state.
            student: A model of the structure that the snapshot had.
        """
        self.cache.load_state_dict(state["cache"])
        super().load_state_dict(state, student)


@torch.compiler.disable
def _look_up(
    cache: SaliencyCache, model: nn.Module, texts: Mapping[str, Any], labels_B: Tensor | None
) -> Tensor:
    return cache.look_up(texts, labels_B, partial(gradient_saliency, model))

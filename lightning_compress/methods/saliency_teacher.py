"""The teacher of ContributionTokenDropping: a fine-tuned model whose gradients say which tokens mattered.

It is kept beside the model, never inside it, so that nothing saves, optimises or wraps it. The saliencies are in
:mod:`lightning_compress.nn.saliency`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.few_bits import dense_state_dict, quantize_linears
from lightning_compress.nn.saliency import SaliencyCache, gradient_saliency
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import replace_module

__all__ = ["MODULE", "SELF", "SaliencyTeacher", "snapshot"]

SELF, MODULE = "self", "module"
"""Sources that are no folder or name: the student itself, and a model that was given."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SaliencyTeacher:
    """A model that explains texts, and everything it said so far.

    Args:
        source: ``"self"`` (the student, as it will be when :meth:`settle` is called), ``"module"`` (a copy of
            ``given``), or folder or name of a sequence classifier for
            :meth:`~transformers.AutoModelForSequenceClassification.from_pretrained`.
        bits: Hold its linears in 4 or 8 bits; None as they are.
        given: The teacher, if ``source`` says so.

    Raises:
        ValueError: If a model is given, but another source.
    """

    def __init__(self, source: str, bits: int | None = None, given: nn.Module | None = None) -> None:
        if given is not None and source != MODULE:
            raise ValueError(
                f"teacher={source!r} and a teacher_model are two teachers: give one of them (in a config beside a "
                f"teacher_model, teacher={MODULE!r})"
            )
        self.source, self.bits, self.given = source, bits, given
        self.cache = SaliencyCache()
        self.model: nn.Module | None = None

    def open(self, student: nn.Module) -> None:
        """Load a teacher other than the student, once, and see that it fits.

        Raises:
            ValueError: If it cannot be loaded or was not given, is no sequence classifier of a known family, or has
                another vocabulary or other classes than the student.
        """
        if self.source == SELF or self.model is not None:
            return
        if self.source == MODULE and self.given is None:
            raise ValueError(
                "teacher='module' stands for a model that was given as teacher_model, which no file holds: give it "
                "again, as ContributionTokenDropping(teacher_model=...) or in the resources of a Compressor"
            )
        model = _load(self.source) if self.given is None else snapshot(self.given)
        _check_fits(self.source, model, student)
        self.model = self._prepared(model)

    def settle(self, student: nn.Module) -> None:
        """Take a snapshot of the student, if it is its own teacher; else open the teacher."""
        if self.source == SELF:
            self.model = self._prepared(snapshot(student))
        self.open(student)

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
        return _look_up(self.cache, model, texts, inputs.get("labels"))  # type: ignore[call-arg]

    def state_dict(self) -> dict[str, Any]:
        """Return what was said so far and, of a student that is its own teacher, its weights."""
        own = self.model if self.source == SELF else None
        weights = None if own is None else dense_state_dict(own)
        return {"weights": weights, "cache": self.cache.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Take over :meth:`state_dict`.

        Args:
            state: The state.
            student: A model of the structure that the snapshot had.
        """
        self.cache.load_state_dict(state["cache"])
        if self.source == SELF:
            self.model = None
        if state["weights"] is not None:
            model = snapshot(student)
            model.load_state_dict(state["weights"])
            self.model = self._prepared(model)

    def _prepared(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        return model if self.bits is None else quantize_linears(model, self.bits)


@torch.compiler.disable
def _look_up(
    cache: SaliencyCache, model: nn.Module, texts: Mapping[str, Any], labels_B: Tensor | None
) -> Tensor:
    return cache.look_up(texts, labels_B, partial(gradient_saliency, model))


def snapshot(student: nn.Module) -> nn.Module:
    """Return a copy of a model that drops no token, in evaluation mode and without anybody's hooks."""
    hooks = [getattr(module, name) for module in student.modules() for name in _HOOKS]
    model = copy.deepcopy(student, {id(table): OrderedDict() for table in hooks})
    for path, module in list(model.named_modules()):
        if isinstance(module, DroppingEncoder):
            policy: Any = module.policy
            policy.is_active = False
        elif isinstance(module, SoftThresholdLinear):  # what it computes depends on its phase
            replace_module(model, path, _dense(module))
    return model.eval()


def _dense(layer: SoftThresholdLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach())
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear


def _load(source: str) -> nn.Module:
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError) as error:
        hint = "" if Path(source).exists() else " (there is no such folder)"
        raise ValueError(f"teacher={source!r} cannot be loaded{hint}: {error}") from error
    if loaded["missing_keys"]:
        raise ValueError(
            f"teacher={source!r} was not fine-tuned, it has no weights for {sorted(loaded['missing_keys'])}: give a "
            "sequence classifier that was fine-tuned on the same task, or teacher='self'"
        )
    return model


def _check_fits(source: str, model: nn.Module, student: nn.Module) -> None:
    anatomy = describe(model)
    if anatomy.head is None or anatomy.is_head_per_token:
        raise ValueError(
            f"teacher={source!r} is a {type(model).__name__}, whose prediction is not one per text: give a sequence "
            "classifier that was fine-tuned on the same task, or teacher='self'"
        )
    theirs: Any = model.config
    ours: Any = student.config
    for what, attribute in (("tokens in its vocabulary", "vocab_size"), ("labels", "num_labels")):
        if getattr(theirs, attribute) != getattr(ours, attribute):
            raise ValueError(
                f"teacher={source!r} has {getattr(theirs, attribute)} {what}, the model {getattr(ours, attribute)}: "
                "give a teacher that was fine-tuned on the same task with the same tokenizer, or teacher='self'"
            )

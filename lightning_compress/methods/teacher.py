"""Teachers: models whose outputs or gradients a student learns from, kept beside it and never inside it.

So nothing saves, optimises or wraps a teacher. It is the student itself at some moment, a model that was given, or one
from a folder. Who uses it: :mod:`lightning_compress.methods.distillation`, and with saliencies
:mod:`lightning_compress.methods.saliency_teacher`.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lightning_compress.nn.block_quantization import QuantizationGates
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.few_bits import dense_state_dict, quantize_linears
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import replace_module
from lightning_compress.nn.width_slimming import WidthGates
from lightning_compress.runtime import packed_encoder

__all__ = ["MODULE", "SELF", "Teacher", "check_same_task", "load_teacher", "snapshot", "source_of"]

SELF, MODULE = "self", "module"
"""Sources that are no folder or name: the student itself, and a model that was given."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WORDS = {"vocab_size": "tokens in its vocabulary", "num_labels": "labels"}
_KINDS: tuple[Any, ...] = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModel,
)


def source_of(teacher: Any) -> str:
    """Return the name of a teacher's source, of a path as it is written.

    Raises:
        TypeError: If it is no name or path, such as a model.
    """
    if not isinstance(teacher, str | os.PathLike):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, but stands for {SELF!r} or for folder or name of a model: give a "
            "model itself as teacher_model"
        )
    return os.fspath(teacher)


class Teacher:
    """A frozen model in evaluation mode, wherever it comes from.

    Args:
        source: ``"self"`` (the student, as it will be when :meth:`settle` is called), ``"module"`` (a copy of
            ``given``), or folder or name of a model for ``AutoModelFor….from_pretrained``.
        bits: Hold its linears in 4 or 8 bits; None as they are.
        given: The teacher, if ``source`` says so.

    Raises:
        ValueError: If a model is given, but another source.

    Example:
        >>> Teacher("self").model is None  # until it settles
        True
    """

    callback = "Distillation"
    """Who asks for a teacher, for messages."""

    def __init__(self, source: str, bits: int | None = None, given: nn.Module | None = None) -> None:
        if given is not None and source != MODULE:
            raise ValueError(
                f"teacher={source!r} and a teacher_model are two teachers: give one of them (in a config beside a "
                f"teacher_model, teacher={MODULE!r})"
            )
        self.source, self.bits, self.given = source, bits, given
        self.model: nn.Module | None = None

    def open(self, student: nn.Module) -> None:
        """Load a teacher other than the student, once, and see that it fits.

        Raises:
            ValueError: If it cannot be loaded or was not given, or :meth:`check` refuses it.
        """
        if self.source == SELF or self.model is not None:
            return
        if self.source == MODULE and self.given is None:
            raise ValueError(
                "teacher='module' stands for a model that was given as teacher_model, which no file holds: give it "
                f"again, as {self.callback}(teacher_model=...) or in the resources of a Compressor"
            )
        model = _at_rest(self.load(student)) if self.given is None else snapshot(self.given)
        self.check(model, student)
        self.model = self._prepared(model)

    def settle(self, student: nn.Module) -> None:
        """Take a snapshot of the student, if it is its own teacher; else open the teacher."""
        if self.source == SELF:
            self.model = self._prepared(snapshot(student))
        self.open(student)

    def load(self, student: nn.Module) -> nn.Module:
        """Return the model that the source names, with a head of the student's kind.

        Raises:
            ValueError: If it cannot be loaded, or was not fine-tuned.
        """
        return load_teacher(self.source, _kind_of(student))

    def check(self, model: nn.Module, student: nn.Module) -> None:
        """See that a teacher from elsewhere fits the student; others may ask for more.

        Raises:
            ValueError: If the two read other tokens, or predict other things.
        """
        check_same_task(self.source, model, student)

    def on(self, device: torch.device) -> nn.Module:
        """Return the model, on a device; it stays there."""
        assert self.model is not None, "a teacher settles before it is asked"
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of a student that is its own teacher; others are found again."""
        own = self.model if self.source == SELF else None
        return {"weights": None if own is None else dense_state_dict(own)}

    def load_state_dict(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Take over :meth:`state_dict`.

        Args:
            state: The state.
            student: A model of the structure that the snapshot had.
        """
        if self.source == SELF:
            self.model = None
        if state["weights"] is not None:
            model = snapshot(student)
            model.load_state_dict(state["weights"])
            self.model = self._prepared(model)

    def _prepared(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        return model if self.bits is None else quantize_linears(model, self.bits)


def snapshot(student: nn.Module) -> nn.Module:
    """Return a copy of a model as wide as it is, in evaluation mode and without anybody's hooks.

    It drops no token, and no text leaves it early.
    """
    hooks = [getattr(module, name) for module in student.modules() for name in _HOOKS]
    model = _at_rest(copy.deepcopy(student, {id(table): OrderedDict() for table in hooks}))
    for path, module in list(model.named_modules()):
        if isinstance(module, DroppingEncoder):
            policy: Any = module.policy
            policy.is_active = False
        elif isinstance(module, SoftThresholdLinear):  # what it computes depends on its phase
            replace_module(model, path, _dense(module))
    gates = WidthGates.of(model)
    if gates is not None:
        gates.attach(model)
    return model


def _at_rest(model: nn.Module) -> nn.Module:
    """Let a model answer with all of its layers, unobserved and unrounded; in place."""
    QuantizationGates.remove_from(model)
    for follower in (LayerTaps.on(model), ExitRouter.on(model)):
        if follower is not None:
            follower.detach()
    packed = packed_encoder(model)
    if packed is not None:
        packed.exits = None
    return model.eval()


def _dense(layer: SoftThresholdLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach())
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear


def load_teacher(source: str, kind: Any = AutoModelForSequenceClassification) -> nn.Module:
    """Return the model that a folder or name stands for.

    Args:
        source: Folder or name.
        kind: The auto class of transformers to open it with.

    Raises:
        ValueError: If it cannot be loaded, or lacks weights, such as those of a head.
    """
    try:
        model, loaded = kind.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError) as error:
        hint = "" if Path(source).exists() else " (there is no such folder)"
        raise ValueError(f"teacher={source!r} cannot be loaded{hint}: {error}") from error
    if loaded["missing_keys"]:
        raise ValueError(
            f"teacher={source!r} was not fine-tuned, it has no weights for {sorted(loaded['missing_keys'])}: give a "
            "model that was fine-tuned on the same task, or teacher='self'"
        )
    return model


def check_same_task(
    source: str, model: nn.Module, student: nn.Module, names: Iterable[str] = ("vocab_size", "num_labels")
) -> None:
    """Refuse a teacher that reads other tokens than the student, or predicts other things.

    Args:
        source: Where the teacher comes from, for messages.
        model: The teacher.
        student: The student.
        names: What their configurations must agree in.

    Raises:
        ValueError: If they do not, or have the same labels in another order.
    """
    names = list(names)
    for name in names:
        theirs, ours = (getattr(m.config, name, None) for m in (model, student))
        if theirs != ours:
            raise ValueError(
                f"teacher={source!r} has {theirs} {_WORDS[name]}, the model {ours}: give a teacher that was fine-tuned "
                "on the same task with the same tokenizer, or teacher='self'"
            )
    theirs, ours = _labels_of(model), _labels_of(student)
    if "num_labels" in names and theirs != ours and sorted(theirs) == sorted(ours):
        raise ValueError(
            f"teacher={source!r} has its labels in the order {theirs}, the model in the order {ours}: give the model "
            "the teacher's id2label and label2id, and number the labels of the data by them"
        )


def _labels_of(model: nn.Module) -> list[str]:
    labels = getattr(model.config, "id2label", None) or {}
    return [str(labels[key]).lower() for key in sorted(labels, key=int)]


def _kind_of(student: nn.Module) -> Any:
    """Return the auto class whose models have the student's kind of head."""
    config = type(student.config)
    return next(
        (kind for kind in _KINDS if isinstance(student, kind._model_mapping.get(config, ()))), AutoModel
    )

"""Distillation: a student learns hidden states and predictions of a teacher, which may be its earlier self.

The plot in the order of time: the config, :func:`prepare`, :func:`update` (waiting, then stages, each with a first part
on hidden states alone), :func:`convert` and :func:`restore`, for which nothing is left to do. The cast is in
:mod:`lightning_compress.nn.distillation`, the teacher in :mod:`lightning_compress.methods.teacher`.

Paper: COST-EFF (arXiv 2210.15523), specification §2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_compress.methods.base import HandleDefaults, MethodConfig, check, check_kinds
from lightning_compress.methods.teacher import Teacher, check_same_task, source_of
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.distillation import (
    Lesson,
    LogitsRecorder,
    compare,
    layer_map,
    stop_recording,
)
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import has_exits
from lightning_compress.nn.soft_label_loss import Prediction
from lightning_compress.nn.surgery import Ledger
from lightning_compress.plan import PlanError
from lightning_compress.runtime import packed_encoder, unpack

__all__ = [
    "LEAVES_NO_TRACE",
    "Config",
    "DistillationConfig",
    "DistillationHandle",
    "convert",
    "prepare",
    "restore",
    "update",
]

LEAVES_NO_TRACE = True
"""Nothing of it is left in a converted model: no plan tells of it, and a model may be distilled again."""


_ROUNDING = 1e-9
"""A share of training so little below a mark is at the mark."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields."""

    stem: ClassVar[str] = "distillation"

    teacher: str = "self"
    """``"self"``: the model itself as it is at ``start``; ``"module"``: a ``teacher_model`` that is given beside these
    settings; else folder or name of a fine-tuned model."""
    teacher_bits: Literal[4, 8] | None = None
    """Hold the teacher's linears in so many bits (bitsandbytes); by default as they are."""
    hidden_weight: float = 1.0
    """Weight of the distance between hidden states, at least 0; 0 for a teacher of another size."""
    logit_weight: float = 1.0
    """Weight of the distance between predictions, at least 0."""
    temperature: float = 1.0
    """Temperature of the predictions that are compared, positive; gradients keep their size."""
    task_weight: float = 1.0
    """Weight of the task's own loss, and of what exits learn without the teacher, from ``start`` on; at least 0."""
    start: float = 0.0
    """Share of training before distillation begins, in [0, 1)."""
    stages: tuple[float, ...] | None = None
    """Shares of training at which a stage begins, ascending in [``start``, 1); one stage from ``start`` on if None."""
    hidden_first: float = 0.0
    """Share of each stage, in [0, 1), that trains on hidden states alone, without predictions and task."""

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "teacher", source_of(self.teacher))
        check(self.teacher_bits in (None, 4, 8), f"teacher_bits={self.teacher_bits} is not 4, 8 or None")
        for name in ("hidden_weight", "logit_weight", "task_weight"):
            value = getattr(self, name)
            check(0.0 <= value < math.inf, f"{name}={value} is not a number from 0")
        check(
            self.hidden_weight > 0 or self.logit_weight > 0,
            "hidden_weight=0 and logit_weight=0 leave nothing to learn from the teacher: give one of them a weight",
        )
        check(0.0 < self.temperature < math.inf, f"temperature={self.temperature} is not positive and finite")
        check(0.0 <= self.start < 1.0, f"start={self.start} is outside [0, 1)")
        marks = None if self.stages is None else tuple(self.stages)
        object.__setattr__(self, "stages", marks)
        check(
            marks is None
            or (
                bool(marks) and list(marks) == sorted({*marks}) and self.start <= marks[0] and marks[-1] < 1.0
            ),
            f"stages={marks} must be ascending shares of training from start={self.start} to below 1",
        )
        check(0.0 <= self.hidden_first < 1.0, f"hidden_first={self.hidden_first} is outside [0, 1)")
        check(
            self.hidden_first == 0.0 or self.hidden_weight > 0,
            f"hidden_first={self.hidden_first} trains on hidden states alone, which hidden_weight=0 leaves out",
        )

    def is_hidden_only(self, progress: float) -> bool:
        """Whether only hidden states are trained on at this moment.

        Example:
            >>> config = DistillationConfig(stages=(0.0, 0.5), hidden_first=0.2)
            >>> [config.is_hidden_only(progress) for progress in (0.0, 0.15, 0.5, 0.65)]
            [True, False, True, False]
        """
        marks = (*(self.stages or (self.start,)), 1.0)
        for begin, end in itertools.pairwise(marks):
            if begin <= progress < end:
                return progress < begin + self.hidden_first * (end - begin) - _ROUNDING
        return False


Config = DistillationConfig
Phase = Literal["waiting", "hidden", "joint"]


@dataclass
class DistillationHandle(HandleDefaults):
    """A model that learns from a teacher."""

    model: nn.Module
    config: DistillationConfig
    ledger: Ledger
    teacher: Teacher
    recorder: LogitsRecorder
    taps: LayerTaps
    phase: Phase = "waiting"
    """Before ``start``, on hidden states alone, or on everything."""
    guides: dict[int, int] = field(default_factory=dict)
    """Whom each layer learns from; empty until the teacher has settled."""

    @property
    def is_on_target(self) -> bool:
        """Yes: no size is asked for."""
        return True

    @property
    def is_as_deployed(self) -> bool:
        """Yes: nothing of a teacher is in the model."""
        return True

    @property
    def task_weight(self) -> float:
        """Weight of the task's own loss in the coming step."""
        return {"waiting": 1.0, "hidden": 0.0, "joint": self.config.task_weight}[self.phase]

    @property
    def logit_weight(self) -> float:
        """Weight of the distance between predictions in the coming step."""
        return self.config.logit_weight if self.phase == "joint" else 0.0

    @property
    def prediction(self) -> Prediction:
        """What the model's logits stand for, as its own loss has it."""
        kind = getattr(self.model.config, "problem_type", None)
        if kind == "multi_label_classification":
            return "labels"
        logits = self.recorder.logits
        is_one_number = logits is not None and logits.shape[-1] == 1
        return "numbers" if kind == "regression" or is_one_number else "classes"

    def lesson(self) -> Lesson | None:
        """Let the teacher read the latest texts; None before distillation starts."""
        if self.phase == "waiting":
            return None
        config = self.config
        return self._compared(logits=config.logit_weight > 0, hidden=config.hidden_weight > 0)

    def full_lesson(self) -> Lesson:
        """Let the teacher read the latest texts, whatever the phase and the weights.

        Raises:
            ValueError: If there is no teacher yet, and it cannot be loaded or does not fit.
        """
        self.settle()
        return self._compared(logits=True, hidden=True)

    def _compared(self, *, logits: bool, hidden: bool) -> Lesson:
        texts = self.taps.inputs.get("input_ids")
        teacher = self.teacher.model if texts is None else self.teacher.on(texts.device)
        assert teacher is not None, "the teacher settles at the start"
        said = self.recorder.logits if logits else None
        return compare(self.model, teacher, self.guides, logits=said, hidden=hidden)

    def settle(self) -> None:
        """See to it that there is a teacher, and that each layer knows whom it learns from.

        Raises:
            ValueError: If the teacher cannot be loaded or does not fit.
        """
        if self.teacher.model is None:
            self.teacher.settle(self.model)
        assert self.teacher.model is not None
        self.guides = self.guides or _guides(self.teacher.model, self.model, self.config)

    def open_resources(self) -> None:
        """Load the teacher, if it is another model."""
        self.teacher.open(self.model)

    def metrics(self) -> dict[str, float]:
        """The weights of this moment."""
        return {"logit_weight": self.logit_weight, "task_weight": self.task_weight}

    def state_dict(self) -> dict[str, Any]:
        """Phase, and the weights of a teacher that is the model's earlier self."""
        return {"phase": self.phase, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase and the teacher; one from elsewhere is opened before the next step."""
        self.phase, self.guides = state["phase"], {}
        self.teacher.load_state_dict(state["teacher"], self.model)


class _GuidingTeacher(Teacher):
    """A teacher whose hidden states and exits are read, as far as the settings ask for them."""

    def __init__(self, config: DistillationConfig, given: nn.Module | None) -> None:
        super().__init__(config.teacher, config.teacher_bits, given)
        self.config = config

    def check(self, model: nn.Module, student: nn.Module) -> None:
        """See that it reads the same tokens and puts out what is to be compared; its states must be in reach."""
        names = ["vocab_size"] + ["num_labels"] * (self.config.logit_weight > 0)
        check_same_task(self.source, model, student, names)
        check(
            self.config.logit_weight == 0 or describe(model).head is not None,
            f"teacher={self.source!r} is a {type(model).__name__}, which predicts nothing: give a fine-tuned model, or "
            "logit_weight=0",
        )
        if self.config.hidden_weight > 0 or has_exits(model):
            unpack(model)
        _guides(model, student, self.config)


def prepare(
    model: nn.Module, config: DistillationConfig, teacher_model: nn.Module | None = None
) -> DistillationHandle:
    """Let a model be read while it trains; its outputs stay what they are.

    Args:
        model: A transformers model of a known family.
        config: The settings.
        teacher_model: The teacher, where ``config.teacher`` is ``"module"``; a copy of it is kept.

    Raises:
        ValueError: If the model has no predictions or no hidden states to compare, or two teachers are named.
    """
    anatomy, name = describe(model), type(model).__name__
    check(
        config.logit_weight == 0 or (anatomy.head is not None and "ForQuestionAnswering" not in name),
        f"{name} has no predictions of classes or numbers to distil: give logit_weight=0 to distil hidden states only",
    )
    check(
        config.hidden_weight == 0 or packed_encoder(model) is None,
        "the model is packed, which hides the states between its layers: call lightning_compress.unpack(model) before "
        "distilling it, or give hidden_weight=0",
    )
    teacher = _GuidingTeacher(config, teacher_model)
    ledger, recorder = Ledger(model), LogitsRecorder().attach(model)
    ledger.on_revert(stop_recording)
    return DistillationHandle(model, config, ledger, teacher, recorder, LayerTaps.of(model))


def update(handle: DistillationHandle, progress: float) -> None:
    """Settle the teacher at the start, then alternate between hidden states alone and everything.

    Raises:
        ValueError: If there is no teacher yet, and it cannot be loaded or does not fit.
    """
    config = handle.config
    handle.teacher.open(handle.model)
    if progress < config.start:
        handle.phase = "waiting"
        return
    handle.settle()
    handle.phase = "hidden" if config.is_hidden_only(progress) else "joint"


def convert(handle: DistillationHandle) -> dict[str, Any]:
    """Stop reading, and let go of the teacher; returns an empty structure."""
    stop_recording(handle.model)
    handle.teacher.model = None
    return {}


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Return an empty ledger: there is nothing to rebuild.

    Raises:
        PlanError: If the structure says otherwise.
    """
    if structure:
        raise PlanError(f"distillation leaves nothing in a model, but the plan says {dict(structure)}")
    return Ledger(model)


def _guides(teacher: nn.Module, student: nn.Module, config: DistillationConfig) -> dict[int, int]:
    """Return whom each layer learns from.

    Raises:
        ValueError: If hidden states are to be compared, and they differ in width, or the teacher has fewer layers.
    """
    theirs, ours = describe(teacher), describe(student)
    count = len(theirs.layers)
    if config.hidden_weight == 0 and count < len(ours.layers):
        return layer_map(count, count)
    check(
        config.hidden_weight == 0 or theirs.hidden_size == ours.hidden_size,
        f"the teacher's hidden states are {theirs.hidden_size} wide, the model's {ours.hidden_size}, so they cannot be "
        "compared: give a teacher of the same width, or hidden_weight=0 to distil predictions only",
    )
    return layer_map(len(ours.layers), count)

"""Importance from a separate pass: some recorded batches, weights at rest, no dropout, and the loss of every exit.

Ordinary training steps give importance for nothing; this pass costs a forward and a backward pass for each recorded
batch at each step of the schedule. The next chapter is :mod:`lightning_compress.methods.width_slimming`.

Shape legend: B batch, T padded length, C classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_compress.methods.width_batches import BatchRecorder, check_labels
from lightning_compress.methods.width_config import ImportanceFrom
from lightning_compress.nn.distillation import Lesson
from lightning_compress.nn.importance import ImportanceMeter
from lightning_compress.nn.importance_loss import official_losses
from lightning_compress.nn.label_loss import label_loss, next_token_loss
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import exit_logits, has_exits
from lightning_compress.nn.soft_label_loss import Prediction

__all__ = [
    "Guide",
    "check_guide",
    "check_trainable",
    "complete_importance",
    "measure_importance",
]


class Guide(Protocol):
    """Who asks a teacher for the official loss: the handle of Distillation."""

    config: Any

    @property
    def prediction(self) -> Prediction:
        """What logits stand for."""
        ...

    def full_lesson(self) -> Lesson:
        """Put side by side what student and teacher say of the student's latest texts."""
        ...


def check_trainable(model: nn.Module, meter: ImportanceMeter) -> None:
    """Refuse weights without gradients.

    Raises:
        ValueError: If importance is read off some that are frozen.
    """
    read = {id(parameter) for parameter in meter.parameters() if not parameter.requires_grad}
    frozen = [name for name, parameter in model.named_parameters() if id(parameter) in read]
    if frozen:
        raise ValueError(
            f"importance is read off gradients of {len(frozen)} weights that are frozen, such as {frozen[0]}: use "
            "criterion='l0', which learns gates instead, or train these weights"
        )


def check_guide(guide: Guide | None, first_step: float) -> Guide:
    """Return who asks the teacher, if there is a teacher to ask when widths fall.

    Args:
        guide: The handle of Distillation, None where it does not take part.
        first_step: Progress at which widths fall for the first time.

    Raises:
        ValueError: If there is none, it compares only one of the two things that the official loss is made of, or the
            teacher is a copy of the model that is taken later.
    """
    if guide is None:
        raise ValueError(
            "importance_loss='official' compares with a teacher, but none takes part: add Distillation to this run, or "
            "leave importance_loss at 'labels'"
        )
    config = guide.config
    if config.hidden_weight == 0 or config.logit_weight == 0:
        raise ValueError(
            "importance_loss='official' compares hidden states and predictions with the teacher's, but Distillation "
            f"has hidden_weight={config.hidden_weight} and logit_weight={config.logit_weight}: give both a weight "
            "above 0, or leave importance_loss at 'labels'"
        )
    if config.teacher == "self" and config.start >= first_step:
        raise ValueError(
            f"importance_loss='official' asks the teacher when widths fall for the first time, at {first_step:.3g} of "
            f"training, but Distillation(teacher='self') has one from start={config.start} on: let it start before"
        )
    return guide


def complete_importance(
    model: nn.Module, meter: ImportanceMeter, recorder: BatchRecorder, **settings: Any
) -> None:
    """Complete the importance that a coming choice rests on, the same in all processes.

    Args:
        model: The model.
        meter: What ordinary steps have told so far, if they are read.
        recorder: Batches for a separate pass, if there is one.
        settings: See :func:`measure_importance`.
    """
    if recorder.size and recorder.batches:
        with recorder.paused():
            measure_importance(model, meter, recorder.batches, **settings)
        recorder.fix()
    if not meter.num_passes:  # converted before a training step: the size of the weights is all there is
        meter.add_sizes()
    meter.reduce()


def measure_importance(
    model: nn.Module,
    meter: ImportanceMeter,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    importance_from: ImportanceFrom = "all_exits",
    guide: Guide | None = None,
    per_exit: bool = False,
) -> None:
    """Add the importance of some batches, in evaluation mode; no gradient is left on any parameter.

    The loss is the sum over the exits' label losses, where a model has exits, and the model's own, with balanced
    gradients if training balances them. With ``per_exit`` each of them is a pass of its own, so that exits cannot
    cancel each other.

    Args:
        model: The model.
        meter: Where scores are added.
        batches: Arguments of the model's forward, labels among them.
        importance_from: Whose losses count: all exits', or ``"final_exit"``, the model's own alone, whose gradients
            are not shared among exits.
        guide: Who asks the teacher for the official loss; None takes labels alone.
        per_exit: Whether scores are added exit by exit.

    Raises:
        ValueError: If a batch has no labels.

    Paper: COST-EFF, specification §3.2 and §6-B, A1.
    Departs from the paper: labels alone, unless there is a ``guide``. With that and ``"final_exit"`` the states of the
        last layer alone are compared.
    """
    parameters, device = meter.parameters(), next(model.parameters()).device
    if not parameters:  # only word embeddings are narrowed, by their own values
        return
    is_whole = importance_from == "all_exits"
    with _evaluating(model), _balanced(model, is_whole), torch.enable_grad():
        for batch in batches:
            losses = _losses(model, {n: value.to(device) for n, value in batch.items()}, guide, is_whole)
            losses = losses if per_exit else [torch.stack(losses).sum()]
            for index, loss in enumerate(losses):
                more = index + 1 < len(losses)
                found = torch.autograd.grad(loss, parameters, retain_graph=more, allow_unused=True)
                gradients = {id(p): gradient for p, gradient in zip(parameters, found, strict=True)}
                meter.add(lambda parameter, known=gradients: known.get(id(parameter)))


def _losses(model: nn.Module, batch: dict[str, Tensor], guide: Guide | None, is_whole: bool) -> list[Tensor]:
    """Losses of all exits, the model's own last, or that alone; with a teacher those of hidden states too."""
    labels = check_labels(batch)
    loss = model(**batch).loss
    early = exit_logits(model).values() if is_whole and has_exits(model) else ()
    costs = [
        next_token_loss(logits, labels) if logits.dim() == 3 else label_loss(logits, labels)
        for logits in early
    ]
    if guide is None:
        return [*costs, loss]
    lesson = guide.full_lesson()
    if not is_whole:
        lesson = replace(lesson, states=lesson.states[-1:], logits=lesson.logits[-1:])
    return official_losses(lesson, [*costs, loss], guide.prediction)


@contextmanager
def _balanced(model: nn.Module, is_balanced: bool) -> Iterator[None]:
    """Share gradients among exits as training does, or not at all."""
    taps = None if is_balanced else LayerTaps.on(model)
    if taps is None:
        yield
        return
    equilibrium, taps.equilibrium = taps.equilibrium, None
    try:
        yield
    finally:
        taps.equilibrium = equilibrium


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all parts in evaluation mode; the model's own flag stays up, so that no example leaves by an exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

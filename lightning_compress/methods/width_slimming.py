"""WidthSlimming: heads, neurons, embedding ranks and hidden dimensions leave step by step, those of least importance.

The plot in the order of time: the config (written down in :mod:`lightning_compress.methods.width_config`),
:func:`prepare`, :func:`update` (warm-up, slimming, recovery), :func:`convert`, :func:`restore`. While training gates
close what is to go, so that shapes stay; ``convert`` cuts it off.
How much is kept where stands in :mod:`lightning_compress.methods.width_plan`, the cast in
:mod:`lightning_compress.nn.width_slimming`, the knife in :mod:`lightning_compress.nn.width_surgery`.

Paper: COST-EFF (arXiv 2210.15523), after its official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lightning_compress.methods.base import AuxiliaryGroup, HandleDefaults
from lightning_compress.methods.width_batches import BatchRecorder, PassClock
from lightning_compress.methods.width_calibration import (
    Guide,
    check_guide,
    check_trainable,
    complete_importance,
)
from lightning_compress.methods.width_config import WidthSlimmingConfig
from lightning_compress.methods.width_plan import WidthPlan, plan_widths
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.hidden_slices import check_hidden
from lightning_compress.nn.importance import ImportanceMeter
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.nn.width_budget import keep_best
from lightning_compress.nn.width_costs import Counts, WidthCosts
from lightning_compress.nn.width_slimming import WidthGates
from lightning_compress.nn.width_surgery import apply_widths, restore_widths

__all__ = [
    "Config",
    "WidthSlimmingConfig",
    "WidthSlimmingHandle",
    "convert",
    "prepare",
    "prune",
    "restore",
    "update",
]

_TRAVEL = 12.0
"""How far learned gates may go within the search, in units of their location: twice from open to closed."""
_RAMP_SHARE = 0.8
"""Share of the search after which the size asked of learned gates is the user's."""
_MULTIPLIER_SHARE = 0.1
"""Learning rate of the multipliers, as a share of that of the gates."""
_EPSILON = 1e-9

Config = WidthSlimmingConfig


@dataclass
class WidthSlimmingHandle(HandleDefaults):
    """A model whose widths are gated."""

    model: nn.Module
    config: WidthSlimmingConfig
    ledger: Ledger
    gates: WidthGates
    plan: WidthPlan
    meter: ImportanceMeter
    recorder: BatchRecorder
    phase: Literal["warmup", "slimming", "recovery"] = "warmup"
    progress: float = 0.0
    done: int = 0
    """Steps of the schedule taken."""
    gate_lr: float = 0.0
    guide: Guide | None = None
    """Who asks the teacher, if importance is read off what it says."""
    clock: PassClock = field(default_factory=PassClock)
    """Time of the separate passes."""

    @property
    def costs(self) -> WidthCosts:
        """What heads, neurons and ranks cost, in what the target counts."""
        return self.plan.costs

    @property
    def counts(self) -> Counts:
        """What is kept now."""
        masks, rank = self.gates.masks, self.gates.embeddings
        return Counts(
            tuple(int(mask.heads_G.sum()) for mask in masks),
            tuple(int(mask.neurons_F.sum()) for mask in masks),
            None if rank is None or rank.is_open else int(rank.rank),
            None if self.gates.hidden is None else int(self.gates.hidden.gate_K.sum()),
        )

    @property
    def expected_counts(self) -> Counts:
        """What is kept in expectation, where gates are learned: fractions of heads and neurons."""
        layers = self.gates.open_probabilities
        heads_L = tuple(float(layer.heads_G.sum()) for layer in layers)
        neurons_L = tuple(float(layer.neurons_F.sum()) for layer in layers)
        return Counts(heads_L, neurons_L, self.counts.embedding_rank)  # type: ignore[arg-type]

    @property
    def other_cost(self) -> float:
        """Cost of everything but heads and neurons, now."""
        none = (0,) * len(self.costs.layers)
        return self.costs.of(Counts(none, none, self.counts.embedding_rank))

    @property
    def scheduled_ratio(self) -> float:
        """Share of the cost that learned gates are to have at this moment: from 1 down to the target, linear."""
        config = self.config
        share = (self.progress - config.start) / (_RAMP_SHARE * (config.end - config.start))
        return 1.0 - (1.0 - self.plan.budget / self.costs.dense) * min(max(share, 0.0), 1.0)

    @property
    def is_on_target(self) -> bool:
        """Whether all steps of the schedule were taken."""
        return self.done == self.plan.steps or self.config.end == 1.0

    @property
    def is_as_deployed(self) -> bool:
        """Whether all that will be cut off is closed."""
        return self.done == self.plan.steps

    def open_resources(self) -> None:
        """Refuse a hidden width that what other methods have installed by now does not allow.

        Raises:
            ValueError: If something is as wide as the residual stream and cannot be cut.
        """
        if self.plan.final.hidden is not None:
            check_hidden(self.model, range(self.plan.final.hidden))

    def meet(self, handles: Mapping[str, Any]) -> None:
        """Find the teacher that importance is read off, if settings ask for it.

        Raises:
            ValueError: If there is none when widths fall.
        """
        config = self.config
        if config.importance_loss == "official":
            first_step = config.start + (config.end - config.start) / self.plan.steps
            self.guide = check_guide(handles.get("distillation"), first_step)

    def auxiliary_groups(self) -> list[AuxiliaryGroup]:
        """The learned gates and their multipliers, if there are any."""
        if self.gates.multipliers is None:
            return []
        multipliers = AuxiliaryGroup([self.gates.multipliers], _MULTIPLIER_SHARE * self.gate_lr)
        return [AuxiliaryGroup(self.gates.locations, self.gate_lr), multipliers]

    def end_pass(self) -> None:
        """Count the batches that were recorded."""
        self.recorder.settle()

    def read_gradients(self) -> None:
        """Add the importance of an ordinary step, from the gradients that are there when the optimizer steps."""
        is_asked = self.config.criterion in ("taylor", "group_taylor") and not self.config.calibration_batches
        if is_asked and self.phase != "recovery":
            self.meter.add()

    def metrics(self) -> dict[str, float]:
        """Shares of heads, neurons and cost that are kept; of separate passes their seconds, and share of all time."""
        full, counts = self.costs.full, self.counts
        if self.phase == "slimming" and self.gates.multipliers is not None:
            counts = self.expected_counts
        shares = {
            "heads_ratio": sum(counts.heads_L) / sum(full.heads_L),
            "neurons_ratio": sum(counts.neurons_L) / sum(full.neurons_L),
            "cost_ratio": self.plan.costs_at(counts.hidden).of(counts) / self.plan.dense_cost,
        }
        if self.config.calibration_batches:
            shares |= {"calibration_seconds": self.clock.seconds, "calibration_share": self.clock.share}
        ranks = {"embedding_rank": counts.embedding_rank, "hidden_size": counts.hidden}
        return shares | {name: float(value) for name, value in ranks.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Phase, progress, importance and recorded batches; gates are in the model's own state."""
        names = ("phase", "progress", "done", "gate_lr")
        state = {name: getattr(self, name) for name in names}
        return {**state, "importance": self.meter.state_dict(), "batches": self.recorder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase, in the gates too."""
        for name in ("phase", "progress", "done", "gate_lr"):
            setattr(self, name, state[name])
        self.meter.load_state_dict(state["importance"])
        self.recorder.load_state_dict(state["batches"])
        if self.phase == "recovery":
            self.recorder.detach()
        self.gates.sample(self.phase == "slimming")


def prepare(model: nn.Module, config: WidthSlimmingConfig) -> WidthSlimmingHandle:
    """Give heads, neurons and what else is to be narrowed gates, all open: outputs stay the same.

    Raises:
        ValueError: If a width or the target cannot be had, or the weights that importance is read from are frozen.
    """
    plan = plan_widths(model, config)
    criterion = "group_taylor" if config.criterion == "group_taylor" else "taylor"
    competes = plan.is_joint and config.ranking == "global"  # then each may lose where the average does not
    meter = ImportanceMeter(
        model,
        criterion,
        heads=competes or plan.final.heads_L != plan.dense.heads_L,
        neurons=competes or plan.final.neurons_L != plan.dense.neurons_L,
        hidden=plan.final.hidden is not None,
    )
    if config.criterion != "l0":
        check_trainable(model, meter)
    gates = WidthGates.install(
        model,
        heads=plan.final.heads_L != plan.dense.heads_L,
        neurons=plan.final.neurons_L != plan.dense.neurons_L,
        embeddings=plan.final.embedding_rank is not None,
        hidden=plan.final.hidden is not None,
        learned=config.criterion == "l0",
    )
    ledger = Ledger(model)
    ledger.on_revert(WidthGates.remove_from)
    ledger.on_revert(BatchRecorder.remove_from)
    recorder = BatchRecorder(config.calibration_batches, config.calibration_seed).attach(model)
    return WidthSlimmingHandle(model, config, ledger, gates, plan, meter, recorder)


def update(handle: WidthSlimmingHandle, progress: float) -> None:
    """Move through warm-up, slimming and recovery, and take the steps of the schedule that are due.

    Steps are due at equal distances between ``start`` and ``end``; where training has fewer steps than the schedule,
    several are taken at once, so that the last one always leads to the target.

    Paper: COST-EFF, specification §3.3.
    Departs from the paper: optimizer and learning rate are the user's, and go on over the steps.
    """
    config, plan, step = handle.config, handle.plan, progress - handle.progress
    handle.progress = progress
    handle.clock.start()
    share = (progress - config.start) / (config.end - config.start)
    due = min(max(int(share * plan.steps + _EPSILON), 0), plan.steps)
    if handle.phase == "warmup" and progress >= config.start:
        handle.phase = "slimming"
        handle.gates.sample(True)
        if due == 0:
            handle.meter.reset()
    if handle.phase == "slimming" and step > 0:
        handle.gate_lr = config.gate_lr or _TRAVEL * step / (config.end - config.start)
    if due > handle.done:
        prune(handle, due)


def prune(handle: WidthSlimmingHandle, done: int) -> None:
    """Close what the first ``done`` steps of the schedule take, by the importance gathered since the last ones."""
    config, plan, gates = handle.config, handle.plan, handle.gates
    counts, is_last = plan.final.step(plan.dense, done, plan.steps), done == plan.steps
    if counts.embedding_rank is not None and gates.embeddings is not None:
        table: Any = get_module(handle.model, describe(handle.model).word_embeddings)
        gates.embeddings.close(table.weight, counts.embedding_rank)
    if gates.multipliers is None:
        with handle.clock.running(next(handle.model.parameters()).device):
            complete_importance(
                handle.model,
                handle.meter,
                handle.recorder,
                importance_from=config.importance_from,
                guide=handle.guide,
                per_exit=config.criterion == "per_exit",
            )
        gates.close(plan.choose(handle.meter.layers, gates.masks, counts, done, ranking=config.ranking))
        if gates.hidden is not None and handle.meter.hidden_D is not None:
            kept_D = gates.hidden.gate_K > 0
            gates.hidden.close(keep_best(handle.meter.hidden_D.to(kept_D.device), counts.hidden or 0, kept_D))
        handle.meter.reset()
    elif is_last:
        scores = gates.open_probabilities
        gates.close(plan.choose(scores, gates.masks, counts, done, ranking=config.ranking, per_cost=False))
    handle.done = done
    if is_last:
        gates.sample(False)
        handle.phase, handle.gate_lr = "recovery", 0.0
        handle.recorder.detach()


def convert(handle: WidthSlimmingHandle) -> dict[str, Any]:
    """Cut off what the gates have closed, after the steps that are still due.

    Returns:
        The counts that are left, see :meth:`~lightning_compress.nn.width_surgery.Widths.to_structure`.
    """
    if handle.done < handle.plan.steps:
        prune(handle, handle.plan.steps)
    handle.recorder.detach()
    gates, model = handle.gates, handle.model
    if gates.embeddings is not None and not gates.embeddings.is_open:
        table: Any = get_module(model, describe(model).word_embeddings)
        with torch.no_grad():  # what training added outside of the kept directions was never seen
            table.weight.copy_(gates.embeddings(table.weight))
    widths = gates.widths
    WidthGates.remove_from(model)
    apply_widths(model, widths, handle.ledger)
    return widths.to_structure()


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild the narrow model on a fresh, possibly meta-device one.

    Raises:
        PlanError: If the structure does not fit the model.
    """
    return restore_widths(model, structure)

"""WidthSlimming: heads, neurons, embedding ranks and hidden dimensions leave step by step, those of least importance.

The plot in the order of time: the config, :func:`prepare`, :func:`update` (warm-up, slimming, recovery),
:func:`convert`, :func:`restore`. While training gates close what is to go, so that shapes stay; ``convert`` cuts it
off.
How much is kept where stands in :mod:`lightning_compress.methods.width_plan`, the cast in
:mod:`lightning_compress.nn.width_slimming`, the knife in :mod:`lightning_compress.nn.width_surgery`.

Paper: COST-EFF (arXiv 2210.15523), after its official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lightning_compress.methods.base import AuxiliaryGroup, MethodConfig, check, check_choice
from lightning_compress.methods.width_calibration import BatchRecorder, measure_importance
from lightning_compress.methods.width_plan import WidthPlan, plan_widths
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.hard_concrete import open_probability
from lightning_compress.nn.hidden_slices import check_hidden
from lightning_compress.nn.importance import ImportanceMeter, LayerScores
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

Width = int | float | None


@dataclass(frozen=True, kw_only=True)
class WidthSlimmingConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields.

    Of a width, a whole number is how many are kept and a fraction which share, 1.0 being all; None leaves it as it is,
    or to the target.
    """

    stem: ClassVar[str] = "width_slimming"

    heads: Width = None
    """Attention heads kept in each layer (on average under a global ranking); with grouped queries whole groups."""
    ffn: Width = None
    """Neurons of the FFN kept in each layer; shares are rounded to ``ffn_multiple``."""
    embedding_rank: Width = None
    """Rank of the factorised word embeddings."""
    hidden: Width = None
    """Width of the residual stream, with norms and embeddings; not in COST-EFF."""
    target_params: float | None = None
    """Share of the parameters of ``scope`` to keep, in (0, 1], by widths not given; 0.5 if nothing is given."""
    target_flops: float | None = None
    """Instead: share of the layers' FLOPs to spend, in (0, 1], on texts of ``text_length`` tokens."""
    scope: Literal["linear", "encoder", "total"] = "encoder"
    """What ``target_params`` is a share of: weights of the linears, the layers, or the whole model, whose word
    embeddings are then factorised too."""
    text_length: int = 128
    """Tokens of the text that ``target_flops`` is counted for, at least 1."""
    criterion: Literal["taylor", "group_taylor", "per_exit", "l0"] = "taylor"
    """``"taylor"``: sum of |weight times gradient|; ``"group_taylor"``: absolute value of the sum; ``"per_exit"``:
    the first, exit by exit; ``"l0"``: gates learned against a price for being open."""
    ranking: Literal["uniform", "global"] = "uniform"
    """Whether each layer keeps the same share, or all layers compete."""
    start: float = 0.1
    """Share of training before slimming begins, in [0, 1)."""
    end: float = 0.6
    """Share of training after which widths are those of deployment, in (start, 1]."""
    steps: int | None = None
    """Equal steps in which widths fall; by default one for each head that a layer loses, 8 where none does."""
    calibration_batches: int = 0
    """Batches of a separate pass before each step; 0 reads the gradients of the ordinary steps."""
    ffn_multiple: int | None = None
    """Neurons kept are a multiple of this; by default up to 64, as the FFN's size allows."""
    gate_lr: float | None = None
    """Learning rate of the gates by criterion ``"l0"``, positive; by default from the length of the search."""

    def __post_init__(self) -> None:
        for name in ("heads", "ffn", "embedding_rank", "hidden"):
            _check_width(name, getattr(self, name))
        check(
            self.target_params is None or self.target_flops is None,
            f"target_params={self.target_params} and target_flops={self.target_flops} are two goals: give one",
        )
        for name in ("target_params", "target_flops"):
            value = getattr(self, name)
            check(value is None or 0.0 < value <= 1.0, f"{name}={value} is outside (0, 1]")
        check_choice(self, "scope", ("linear", "encoder", "total"))
        wide = ("heads", "ffn", "embedding_rank") if self.scope == "total" else ("heads", "ffn")
        check(
            (self.target_params is None and self.target_flops is None)
            or any(getattr(self, name) is None for name in wide),
            f"target_params={self.target_params}, target_flops={self.target_flops} decides of widths that are not "
            f"given, but {' and '.join(wide)} are: leave out one of them, or the target",
        )
        check_choice(self, "criterion", ("taylor", "group_taylor", "per_exit", "l0"))
        check_choice(self, "ranking", ("uniform", "global"))
        for name, low in (("text_length", 1), ("calibration_batches", 0), ("steps", 1), ("ffn_multiple", 1)):
            value = getattr(self, name)
            check(value is None or value >= low, f"{name}={value} is below {low}")
            check(value is None or value == int(value), f"{name}={value} is no whole number, from {low}")
        check(0.0 <= self.start < 1.0, f"start={self.start} is outside [0, 1)")
        check(
            self.start < self.end <= 1.0,
            f"end={self.end} is outside (start={self.start}, 1]: widths fall between the two",
        )
        check(self.gate_lr is None or self.gate_lr > 0, f"gate_lr={self.gate_lr} is not positive")
        check(
            self.criterion != "per_exit" or self.calibration_batches > 0,
            "criterion='per_exit' takes a gradient for each exit, in a pass of its own: give calibration_batches, "
            "e.g. 32",
        )
        check(
            self.criterion != "l0" or (self.hidden is None and self.calibration_batches == 0),
            "criterion='l0' learns gates of heads and neurons while training: it takes neither hidden nor "
            "calibration_batches",
        )

    @property
    def target(self) -> float | None:
        """The share asked for, of parameters or FLOPs; None where widths are given instead."""
        given = self.target_flops or self.target_params
        widths = (self.heads, self.ffn, self.embedding_rank, self.hidden)
        return 0.5 if given is None and all(width is None for width in widths) else given


Config = WidthSlimmingConfig


@dataclass
class WidthSlimmingHandle:
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

    def open_resources(self) -> None:
        """Refuse a hidden width that what other methods have installed by now does not allow.

        Raises:
            ValueError: If something is as wide as the residual stream and cannot be cut.
        """
        if self.plan.final.hidden is not None:
            check_hidden(self.model, range(self.plan.final.hidden))

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

    def pop_stale_moments(self) -> list[nn.Parameter]:
        """Nothing: no parameter changes its meaning."""
        return []

    def metrics(self) -> dict[str, float]:
        """Shares of heads, neurons and cost that are kept."""
        full, counts, costs = self.costs.full, self.counts, self.costs
        if self.phase == "slimming" and self.gates.multipliers is not None:
            counts = _expected(self)
        shares = {
            "heads_ratio": sum(counts.heads_L) / sum(full.heads_L),
            "neurons_ratio": sum(counts.neurons_L) / sum(full.neurons_L),
            "cost_ratio": costs.of(counts) / self.plan.dense_cost,
        }
        ranks = {"embedding_rank": counts.embedding_rank, "hidden_size": counts.hidden}
        return shares | {name: float(value) for name, value in ranks.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Phase, progress, importance and recorded batches; gates are in the model's own state."""
        names = ("phase", "progress", "done", "gate_lr")
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in self.recorder.batches]
        state = {name: getattr(self, name) for name in names}
        return {**state, "importance": self.meter.state_dict(), "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase, in the gates too."""
        for name in ("phase", "progress", "done", "gate_lr"):
            setattr(self, name, state[name])
        self.meter.load_state_dict(state["importance"])
        self.recorder.batches = [dict(batch) for batch in state["batches"]]
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
    meter = ImportanceMeter(model, criterion, hidden=plan.final.hidden is not None)
    if config.criterion != "l0":
        _check_trainable(model, meter)
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
    ledger.on_revert(_forget_batches)
    recorder = BatchRecorder(config.calibration_batches).attach(model)
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
    plan, gates = handle.plan, handle.gates
    counts, is_last = plan.final.step(plan.dense, done, plan.steps), done == plan.steps
    if counts.embedding_rank is not None and gates.embeddings is not None:
        table: Any = get_module(handle.model, describe(handle.model).word_embeddings)
        gates.embeddings.close(table.weight, counts.embedding_rank)
    if gates.multipliers is None:
        _gather(handle)
        gates.close(_chosen(handle, handle.meter.layers, counts, done))
        if gates.hidden is not None and handle.meter.hidden_D is not None:
            kept_D = gates.hidden.gate_K > 0
            gates.hidden.close(keep_best(handle.meter.hidden_D.to(kept_D.device), counts.hidden or 0, kept_D))
        handle.meter.reset()
    elif is_last:
        gates.close(_chosen(handle, _learned(gates), counts, done))
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


def _gather(handle: WidthSlimmingHandle) -> None:
    """Complete the importance that the coming choice rests on, the same in all processes."""
    meter, batches = handle.meter, handle.recorder.batches
    if handle.config.calibration_batches and batches:
        with handle.recorder.paused():
            measure_importance(handle.model, meter, batches, per_exit=handle.config.criterion == "per_exit")
    if not meter.num_passes:  # converted before a training step: the size of the weights is all there is
        meter.add_sizes()
    meter.reduce()


def _chosen(
    handle: WidthSlimmingHandle, scores: list[LayerScores], counts: Counts, done: int
) -> list[LayerScores]:
    """Return the masks of all layers after a step."""
    config, plan, kept = handle.config, handle.plan, handle.gates.masks
    scores = [_beside(score, mask) for score, mask in zip(scores, kept, strict=True)]
    if config.ranking == "uniform":
        pairs = zip(scores, kept, counts.heads_L, counts.neurons_L, strict=True)
        return [
            LayerScores(
                keep_best(score.heads_G, heads, mask.heads_G > 0).float(),
                keep_best(score.neurons_F, neurons, mask.neurons_F > 0).float(),
            )
            for score, mask, heads, neurons in pairs
        ]
    is_learned = handle.gates.multipliers is not None
    return plan.compete(scores, kept, counts, done, per_cost=not is_learned)


def _beside(score: LayerScores, mask: LayerScores) -> LayerScores:
    return LayerScores(score.heads_G.to(mask.heads_G.device), score.neurons_F.to(mask.neurons_F.device))


def _learned(gates: WidthGates) -> list[LayerScores]:
    """Return the probability that each gate is open, 1 where gates are not learned."""

    def worth(gate: Any) -> torch.Tensor:
        location_K = gate.log_alpha_K
        return torch.ones_like(gate.gate_K) if location_K is None else open_probability(location_K.detach())

    return [
        LayerScores(worth(heads), worth(neurons))
        for heads, neurons in zip(gates.heads, gates.neurons, strict=True)
    ]


def _expected(handle: WidthSlimmingHandle) -> Any:
    """Return how many heads and neurons are open in expectation."""
    scores = _learned(handle.gates)
    sums = [(float(layer.heads_G.sum()), float(layer.neurons_F.sum())) for layer in scores]
    heads, neurons = zip(*sums, strict=True)
    return Counts(heads, neurons, handle.counts.embedding_rank)  # type: ignore[arg-type]


def _forget_batches(model: nn.Module) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, BatchRecorder)]:
        del model._forward_pre_hooks[key]


def _check_trainable(model: nn.Module, meter: ImportanceMeter) -> None:
    read = {id(parameter) for parameter in meter.parameters() if not parameter.requires_grad}
    frozen = [name for name, parameter in model.named_parameters() if id(parameter) in read]
    if frozen:
        raise ValueError(
            f"importance is read off gradients of {len(frozen)} weights that are frozen, such as {frozen[0]}: use "
            "criterion='l0', which learns gates instead, or train these weights"
        )


def _check_width(name: str, value: Width) -> None:
    if value is None:
        return
    is_share = isinstance(value, float)
    if isinstance(value, bool) or not (0.0 < value <= 1.0 if is_share else value >= 1):
        raise ValueError(
            f"{name}={value!r} is neither a count, a whole number from 1, nor a share, a fraction in (0, 1]"
        )

"""One model, its methods in order, their loss terms and their plan: everything but the trainer.

The callbacks drive a :class:`Compressor`; so can a bare PyTorch loop::

    compressor = Compressor(model, [SoftThresholdRankConfig(target_params=0.5)])
    compressor.prepare()
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=2e-5)
    for step, batch in enumerate(batches):
        compressor.update(step / len(batches))
        loss = compressor.task_weight * model(**batch).loss + sum(compressor.take_loss_terms().values())
        loss.backward()
        compressor.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    plan = compressor.convert()
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.auxiliary import AuxiliaryOptimizer
from lightning_compress.losses import TASK_TERMS, TERMS
from lightning_compress.methods import (
    METHODS,
    Companion,
    GradientReader,
    MethodConfig,
    MethodHandle,
    config_from_dict,
    leaves_no_trace,
    method_named,
    restore,
)
from lightning_compress.nn.surgery import Ledger, successors_of
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError

__all__ = ["Compressor"]

_STATE_SCHEMA = 1


class Compressor:
    """Runs the verbs of several methods over one model, in the order in which they compose.

    Args:
        model: The transformers model to compress.
        configs: Method configurations, in any order, each method once.
        plan: What was done to the model before, if it was loaded compressed.
        resources: What methods take beside their configurations, by stem, e.g.
            ``{"contribution_token_dropping": {"teacher_model": teacher}}``; never saved, so to be given again.

    Raises:
        ValueError: If a method is given twice.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Iterable[MethodConfig] = (),
        plan: CompressionPlan | None = None,
        resources: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.model = model
        self.resources = dict(resources or {})
        self.configs: dict[str, MethodConfig] = {}
        self.handles: dict[str, MethodHandle] = {}
        self._loaded = () if plan is None else plan.methods
        self._records: tuple[MethodRecord, ...] = self._loaded
        self._ledgers: list[Ledger] = []
        self._auxiliary = AuxiliaryOptimizer(())
        self._finished: dict[str, dict[str, Any]] = {}
        self._taken: set[str] = set()
        self._is_task_weighed = False
        self._stale: list[nn.Parameter] = []
        for config in configs:
            self.add(config)

    def add(self, config: MethodConfig) -> None:
        """Register a method; the order of calls does not matter.

        Raises:
            ValueError: If the method is registered already, with the same or a contradictory configuration.
        """
        known = self.configs.get(config.stem)
        if known is not None:
            raise ValueError(
                f"{config.stem} is asked for twice, with {known} and {config}: keep one of the two callbacks"
            )
        self.configs = {s: c for s in METHODS for c in [*self.configs.values(), config] if c.stem == s}

    @property
    def is_prepared(self) -> bool:
        """Whether trainable machinery is installed."""
        return bool(self.handles)

    @property
    def is_converted(self) -> bool:
        """Whether the model is in its deployed structure."""
        return bool(self._records or self._finished) and not self.handles

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Settings of methods that ended without leaving anything in the model, by stem; no plan tells of them."""
        return dict(self._finished)

    @property
    def is_on_target(self) -> bool:
        """Whether every method meets its target; a converted model does."""
        return self.is_converted or (self.is_prepared and all(h.is_on_target for h in self.handles.values()))

    @property
    def is_as_deployed(self) -> bool:
        """Whether the model, evaluated now, answers as it would if training ended here and it were converted."""
        return self.is_converted or (
            self.is_prepared and all(h.is_as_deployed for h in self.handles.values())
        )

    @property
    def plan(self) -> CompressionPlan:
        """The plan of the model as it is now."""
        model_type = str(self.model.config.model_type)  # type: ignore[union-attr]
        prepared = tuple(MethodRecord(s, "prepared", h.config.to_dict()) for s, h in self.handles.items())
        return CompressionPlan(model_type, self._records + prepared)

    def prepare(self) -> None:
        """Install the trainable machinery of every method.

        Raises:
            ValueError: If the model is prepared already, went through one of the methods before, or a method cannot
                be installed.
        """
        if self.is_prepared:
            raise ValueError("the model is prepared already: a compressor prepares a model once")
        done = {record.method: record.config for record in self._records}
        for stem, config in self.configs.items():
            if stem in done:
                raise ValueError(
                    f"this model was compressed before, by {stem} with {done[stem]}; it cannot be compressed again by "
                    f"{config}. Start from the dense model, or go on with the compressed one as it is"
                )
        for stem, config in self.configs.items():
            self.handles[stem] = self._prepared(config)
        self._follow_handles()
        for handle in self.handles.values():
            handle.open_resources()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Show the prepared model some inputs, for methods that look at them; for use without training.

        Args:
            batches: Keyword arguments of the model's forward, a few batches.

        Raises:
            ValueError: If the model is not prepared.
        """
        if not self.is_prepared:
            raise ValueError("calibrate needs a prepared model: call prepare first")
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        for module in modes:
            module.training = bool(getattr(module, "is_calibrating", False))
        for batch in batches:
            self.model(**batch)
        for module, mode in modes.items():
            module.training = mode

    def update(self, progress: float) -> None:
        """Move every method's ramps and phases; call before each optimizer step with progress in [0, 1]."""
        for stem, handle in self.handles.items():
            method_named(stem).update(handle, progress)
            stale = handle.pop_stale_moments()
            self._auxiliary.forget(stale)
            self._stale += stale

    def begin_step(self) -> None:
        """Forget which loss terms were taken, and count what earlier passes gathered: a new forward pass begins."""
        self._taken, self._is_task_weighed = set(), False
        self._end_pass()

    @property
    def task_weight(self) -> float:
        """What the task's own loss is to be multiplied with in the coming step, as the methods together have it."""
        return math.prod(getattr(handle, "task_weight", 1.0) for handle in self.handles.values())

    def take_task_weight(self) -> float:
        """Return :attr:`task_weight`, once; 1 if somebody took it or loss terms since :meth:`begin_step`.

        Whoever takes terms himself has an objective of his own, and weighs the task in it.
        """
        is_taken = self._is_task_weighed or bool(self._taken)
        self._is_task_weighed = True
        return 1.0 if is_taken else self.task_weight

    def take_loss_terms(self, stem: str | None = None) -> dict[str, Tensor]:
        """Return weighted scalar loss terms by name ``<stem>/<term>`` and mark them as taken.

        Args:
            stem: One method, or None for all that nobody took since :meth:`begin_step`; nothing for one that does not
                take part.

        Raises:
            ValueError: If no method has that name.
        """
        if stem is not None and stem not in METHODS:
            raise ValueError(f"no method is called {stem!r}; there are {list(METHODS)}")
        stems = [s for s in self.handles if s not in self._taken] if stem is None else [stem]
        self._taken.update(stems)
        handles = {s: self.handles[s] for s in stems if s in self.handles}
        terms = {f"{s}/{name}": term for s, h in handles.items() for name, term in TERMS[s](h).items()}
        weight = self.task_weight
        weighed = [name for name in TASK_TERMS if name in terms and weight != 1.0]
        return {**terms, **{name: weight * terms[name] for name in weighed}}

    def step(self, *optimizers: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """Step the auxiliary parameters and clear moments that a change of phase made stale in ``optimizers``."""
        self._end_pass()
        for handle in self.handles.values():
            if isinstance(handle, GradientReader):
                handle.read_gradients()
        self._auxiliary.step(scaler)
        self.clear_stale_moments(optimizers)

    def _end_pass(self) -> None:
        for handle in self.handles.values():
            handle.end_pass()

    def clear_stale_moments(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Give parameters whose meaning changed fresh moments in the user's optimizers."""
        for optimizer in optimizers:
            for parameter in self._stale:
                optimizer.state.pop(parameter, None)
        self._stale = []

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Parameters that the private optimizer owns; keep them out of other optimizers."""
        return self._auxiliary.parameters

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All trainable parameters of the model but the auxiliary ones."""
        auxiliary = {id(p) for p in self.auxiliary_parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in auxiliary]

    def successors(self) -> dict[int, list[nn.Parameter]]:
        """Map the id of each replaced parameter to the parameters that took its place."""
        return successors_of(self._all_ledgers())

    def newcomers(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters that took nobody's place, such as exits, each with one that it is to be optimised like."""
        return [pair for handle in self.handles.values() for pair in getattr(handle, "newcomers", ())]

    def forget_stale(self) -> None:
        """Release replaced parameters, once every optimizer has been re-pointed by :meth:`successors`."""
        for ledger in self._all_ledgers():
            ledger.forget_stale()

    def dense_skeleton(self) -> nn.Module:
        """Return the dense model on the meta device: shapes to count, no weights."""
        memo: dict[int, Any] = {
            id(t): nn.Parameter(t.to("meta"), t.requires_grad)
            if isinstance(t, nn.Parameter)
            else t.to("meta")
            for t in [*self.model.parameters(), *self.model.buffers()]
        }
        model, ledgers = copy.deepcopy((self.model, self._all_ledgers()), memo)
        for ledger in reversed(ledgers):
            ledger.revert()
        return model

    def metrics(self) -> dict[str, float]:
        """Quantities worth logging, as ``compress/<stem>/<quantity>``."""
        return {
            f"compress/{s}/{name}": value
            for s, h in self.handles.items()
            for name, value in h.metrics().items()
        }

    def convert(self) -> CompressionPlan:
        """Bake every method into plain modules; the model is physically smaller afterwards.

        Raises:
            ValueError: If the model is not prepared.
        """
        if not self.is_prepared:
            state = "converted already" if self.is_converted else "not prepared"
            raise ValueError(f"the model is {state}: convert needs a model in training form")
        for stem, handle in list(self.handles.items()):
            method = method_named(stem)
            structure, config = method.convert(handle), handle.config.to_dict()
            if leaves_no_trace(method):
                self._finished[stem] = config
            else:
                self._records += (MethodRecord(stem, "converted", config, structure),)
            self._ledgers.append(handle.ledger)
        self.handles = {}
        self._follow_handles()
        return self.plan

    def apply_plan(self, plan: CompressionPlan) -> None:
        """Give the model the structure of a plan, growing or shrinking it; the weights are to be loaded next.

        Raises:
            PlanError: If the plan does not belong to this model.
        """
        if _shape_of(plan) == _shape_of(self.plan):
            self._warn_of_changed_configs(plan)
            return
        if _shape_of(plan)[: len(self._loaded)] != _shape_of(self.plan)[: len(self._loaded)]:
            raise PlanError(
                "the model was loaded in a compressed structure that the plan does not begin with"
            )
        for ledger in reversed(self._all_ledgers()):
            ledger.revert()
        self.handles, self._records, self._ledgers, self._finished = {}, self._loaded, [], {}
        done = tuple(record for record in plan.methods if record.stage == "converted")
        self._ledgers = restore(self.model, CompressionPlan(plan.model_type, done[len(self._loaded) :]))
        self._records = done
        for record in plan.methods[len(done) :]:
            method = method_named(record.method)
            try:
                config = self.configs.get(record.method) or config_from_dict(method.Config, record.config)
            except (TypeError, ValueError) as error:
                raise PlanError(
                    f"plan holds an unusable configuration of {record.method}: {error}"
                ) from error
            self.handles[record.method] = self._prepared(config)
        self._warn_of_changed_configs(plan)
        self._follow_handles()

    def state_dict(self) -> dict[str, Any]:
        """Return what neither the model nor its plan holds: phases and the private optimizer."""
        handles = {stem: handle.state_dict() for stem, handle in self.handles.items()}
        return {"schema": _STATE_SCHEMA, "handles": handles, "auxiliary": self._auxiliary.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`, after :meth:`apply_plan`.

        Raises:
            PlanError: If the state is of an unknown schema or for other methods.
        """
        if state.get("schema") != _STATE_SCHEMA or set(state["handles"]) != set(self.handles):
            raise PlanError(
                f"compression state has schema {state.get('schema')!r} and methods {sorted(state.get('handles', ()))}; "
                f"expected schema {_STATE_SCHEMA} and methods {sorted(self.handles)}"
            )
        for stem, handle in self.handles.items():
            handle.load_state_dict(state["handles"][stem])
        self._auxiliary.load_state_dict(state["auxiliary"])

    def _prepared(self, config: MethodConfig) -> MethodHandle:
        resources = self.resources.get(config.stem, {})
        return method_named(config.stem).prepare(self.model, config, **resources)

    def _all_ledgers(self) -> list[Ledger]:
        return self._ledgers + [handle.ledger for handle in self.handles.values()]

    def _follow_handles(self) -> None:
        self._auxiliary = AuxiliaryOptimizer(self.handles.values())
        for handle in self.handles.values():
            if isinstance(handle, Companion):
                handle.meet(self.handles)

    def _warn_of_changed_configs(self, plan: CompressionPlan) -> None:
        for record in plan.methods:
            config = self.configs.get(record.method)
            if config is not None and record.stage == "prepared" and config.to_dict() != record.config:
                changed = {
                    k: (record.config.get(k), v)
                    for k, v in config.to_dict().items()
                    if record.config.get(k) != v
                }
                warnings.warn(
                    f"{record.method} was saved with other settings than it now has (saved, now): {changed}; "
                    "the present settings are used",
                    stacklevel=2,
                )


def _shape_of(plan: CompressionPlan) -> list[tuple[str, str, str]]:
    return [(r.method, r.stage, repr(sorted(r.structure.items()))) for r in plan.methods]

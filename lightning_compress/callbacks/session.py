"""One run of the trainer over one module: what the attached module remembers between hooks.

:class:`Session` keeps the configurations that the callbacks registered, the compressor once the model exists, and
where training stands. It is found on the module as ``module.__dict__["_compression"]`` and is never a submodule.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.randomness import RandomStream
from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, detach_plan, plan_of
from lightning_compress.methods import MethodConfig
from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.plan import CompressionPlan, PlanError

__all__ = [
    "CHECKPOINT_KEY",
    "Session",
    "check_averaging",
    "check_launcher",
    "check_strategy",
    "returns_weights_only",
    "session_of",
    "training_progress",
]

CHECKPOINT_KEY = "lightning_compress"

_SCHEMA = 1
_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


@dataclass
class Session:
    """State of compression on one module."""

    configs: list[MethodConfig] = field(default_factory=list)
    resources: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What methods take beside their configurations, by stem."""
    module_path: str | None = None
    compressor: Compressor | None = None
    last_step: int | None = None
    random: RandomStream = field(default_factory=RandomStream)
    progress: float = 0.0
    """Share of training done at the last update."""
    stepped_auxiliary: bool = False
    """Whether the auxiliary parameters stepped in the running batch."""
    owes_terms: bool = True
    """Whether the loss terms of the coming auxiliary step are still to be added; for manual optimization."""
    task_weight: float = 1.0
    """Weight of the user's loss until the coming auxiliary step; for manual optimization."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Loss terms that were added to the user's loss last."""
    logged_phases: tuple[str, ...] | None = None
    """Phases in which sizes and ranks were logged last."""
    instance_hooks: dict[str, Any] = field(default_factory=dict)
    was_evaluating: bool = False
    """Whether the transformer came in evaluation mode, and is to have it back."""
    unread: Mapping[str, Any] | None = None
    """The checkpoint that hooks are being called with, until :meth:`load` has read it."""
    _trainer: weakref.ref[Trainer] | None = None

    def register(
        self,
        trainer: Trainer,
        config: MethodConfig,
        module_path: str | None,
        resources: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a callback's configuration and what its method takes beside it; a new trainer starts with none.

        Raises:
            ValueError: If callbacks name different modules, or the same method twice.
        """
        if not self.is_of(trainer):
            self._trainer, self.configs, self.module_path = weakref.ref(trainer), [], None
            self.resources = {}
        if any(known is config for known in self.configs):
            return
        if module_path is not None and self.module_path not in (None, module_path):
            raise ValueError(
                f"callbacks disagree: module={self.module_path!r} and module={module_path!r}; name one"
            )
        self.module_path = module_path or self.module_path
        for known in self.configs:
            if known.stem == config.stem:
                raise ValueError(
                    f"{config.stem} is asked for twice, with {known} and {config}: keep one callback"
                )
        self.configs.append(config)
        self.resources[config.stem] = resources or {}

    def is_of(self, trainer: Trainer) -> bool:
        """Whether the callbacks that registered here are this trainer's."""
        return self._trainer is not None and self._trainer() is trainer

    @property
    def phases(self) -> tuple[str, ...]:
        """The phase of each method."""
        return () if self.compressor is None else tuple(h.phase for h in self.compressor.handles.values())

    def is_logging_due(self, trainer: Trainer) -> bool:
        """Whether to log sizes and ranks, which cost a wait for the device: at new phases and as often as loggers."""
        every, is_new = trainer.log_every_n_steps, self.phases != self.logged_phases  # type: ignore[attr-defined]
        self.logged_phases = self.phases
        return is_new or (every > 0 and (trainer.global_step + 1) % every == 0)

    def connect(self, module: LightningModule) -> Compressor:
        """Return the compressor of the module's transformer, created at the first call.

        Raises:
            ValueError: If there is no transformer, more than one, or the family is unknown.
        """
        _, model = find_transformer(module, self.module_path)
        if self.compressor is None or self.compressor.model is not model:
            self.compressor = Compressor(model, plan=plan_of(model))
        self.compressor.resources = self.resources
        return self.compressor

    def prepare(self, module: LightningModule) -> None:
        """Prepare the model for fitting; what was prepared or converted before, by the same settings, stays.

        Raises:
            ValueError: If the model went through a method before, with other settings, or is in the middle of a run
                in which a method is missing.
        """
        compressor = self.connect(module)
        self._start_training(compressor.model)
        if compressor.is_prepared:
            self._check_began(compressor.plan, "the model, which is in training form,")
            return
        done = {record.method: record.config for record in compressor.plan.methods} | compressor.finished
        new = [config for config in self.configs if done.get(config.stem) != config.to_dict()]
        over = [
            config.stem for config in self.configs if config not in new and config.stem in compressor.finished
        ]
        if over:
            rank_zero_warn(
                f"{over} ran on this module before with the same settings and plays no part in this run, which only "
                "fine-tunes: give it other settings to run it again, or leave the callback out"
            )
        if new:
            compressor.configs = {}
            for config in new:
                compressor.add(config)
            compressor.prepare()

    def _start_training(self, model: nn.Module) -> None:
        """Put a transformer into training mode that is wholly in evaluation mode, as ``from_pretrained`` returns it.

        Lightning leaves modes as they are. Decisions that are drawn while training, or exits that only answer in
        evaluation, must not be left to chance; parts that the user put into evaluation mode beside others stay so.
        """
        if not any(part.training for part in model.modules()):
            self.was_evaluating = True
            model.train()
            rank_zero_info(
                f"{type(model).__name__} came in evaluation mode, as from_pretrained leaves it, and trains in training "
                "mode, with its dropout; set the dropout of its config to 0 to train without"
            )

    def stop_training(self) -> None:
        """Give the transformer its evaluation mode back, if it came so."""
        if self.was_evaluating and self.compressor is not None:
            self.compressor.model.eval()
        self.was_evaluating = False

    def save(self, checkpoint: dict[str, Any], *, in_batch: bool) -> None:
        """Write plan, state and random state under :data:`CHECKPOINT_KEY`, as plain containers and tensors, once."""
        if self.compressor is None or not self.compressor.plan.methods or CHECKPOINT_KEY in checkpoint:
            return
        checkpoint[CHECKPOINT_KEY] = {
            "schema": _SCHEMA,
            "module": self.module_path,
            "plan": self.compressor.plan.to_dict(),
            "state": self.compressor.state_dict(),
            "random_state": self.random.state_dict(in_batch=in_batch),
        }

    def load(self, module: LightningModule, checkpoint: Mapping[str, Any], *, fitting: bool) -> None:
        """Give the module's model the structure of a checkpoint, before its weights load.

        Raises:
            PlanError: If the checkpoint was written by a newer schema.
            ValueError: If fitting is to resume from a checkpoint that was written without compression, or without one
                of the methods.
        """
        self.unread = None
        data = checkpoint.get(CHECKPOINT_KEY)
        if data is None:
            self._load_dense(fitting)
            return
        if data.get("schema") != _SCHEMA:
            raise PlanError(
                f"checkpoint has compression schema {data.get('schema')!r}, this release reads {_SCHEMA}"
            )
        self.module_path = self.module_path or data["module"]
        plan = CompressionPlan.from_dict(data["plan"])
        if fitting:
            self._check_began(plan, "the checkpoint")
        compressor = self.connect(module)
        compressor.configs = {config.stem: config for config in self.configs}
        compressor.apply_plan(plan)
        compressor.load_state_dict(data["state"])
        _mark(compressor)
        self.last_step = None
        if fitting and module.trainer.is_global_zero:
            self.random.load_state_dict(data["random_state"])

    def _check_began(self, plan: CompressionPlan, where: str) -> None:
        """Refuse callbacks that nothing would become of, as a run goes on with the methods that it began with.

        Raises:
            ValueError: If there is one.
        """
        prepared = [record.method for record in plan.methods if record.stage == "prepared"]
        new = [c.stem for c in self.configs if c.stem not in {record.method for record in plan.methods}]
        if prepared and new:
            raise ValueError(
                f"{where} began to be compressed by {prepared}, without {new}, which cannot join in the middle of a "
                f"run: leave the callback out, begin anew with all of them, or end the run of {prepared} first "
                "(with convert=True, or lightning_compress.convert(module)) and call fit again"
            )

    def _load_dense(self, fitting: bool) -> None:
        if self.compressor is None or not self.compressor.plan.methods:
            return
        if fitting:
            raise ValueError(
                "the checkpoint was written without compression, so a compressing run cannot resume from it: load its "
                "weights first, e.g. with load_from_checkpoint, and call fit without ckpt_path"
            )
        self.compressor.apply_plan(CompressionPlan(self.compressor.plan.model_type))
        _mark(self.compressor)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the trainer out of copies: the copy of a module is of no run."""
        return {**vars(self), "_trainer": None, "terms": {}}

    def remaining_terms(self) -> dict[str, Tensor]:
        """Loss terms that nobody took in this step."""
        return {} if self.compressor is None else self.compressor.take_loss_terms()


def _mark(compressor: Compressor) -> None:
    """Let the transformers model know its plan exactly while it is in deployed structure."""
    if compressor.is_converted:
        attach_plan(compressor.model, compressor.plan)
    else:
        detach_plan(compressor.model)


def session_of(module: object) -> Session | None:
    """Return the session on a module, if any."""
    session = vars(module).get("_compression")
    return session if isinstance(session, Session) else None


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard parameters before or while they are replaced.

    Raises:
        ValueError: Under FSDP, DeepSpeed or model parallelism.
    """
    names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    refused = sorted(names & set(_REFUSED_STRATEGIES))
    if refused:
        raise ValueError(
            f"{refused[0]} is not supported while compressing: it shards parameters that compression replaces. Use "
            "strategy='ddp' or a single device, or compress first and shard the saved model afterwards"
        )


def check_averaging(trainer: Trainer) -> None:
    """Refuse callbacks that average each parameter over time.

    Raises:
        ValueError: If there is such a callback.
    """
    averaging = (WeightAveraging, StochasticWeightAveraging)
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, averaging)]  # type: ignore[attr-defined]
    if found:
        raise ValueError(
            f"{found[0]} averages parameters over time, but compression gives them a new meaning on the way (each "
            "decomposition starts from other factors). Compress first, then call fit with "
            f"{found[0]} and without the compression callbacks, to average while the compressed model is fine-tuned"
        )


def returns_weights_only(trainer: Trainer) -> bool:
    """Whether the trainer runs in child processes, of which the caller gets nothing back but the weights."""
    return any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(trainer.strategy.launcher).__mro__)


def check_launcher(trainer: Trainer, module_class: type, mixin: type) -> None:
    """Refuse to compress in child processes if the caller's module could not take the compressed model back.

    Raises:
        ValueError: If the strategy spawns or forks, and the module does not inherit the mixin.
    """
    if returns_weights_only(trainer) and not issubclass(module_class, mixin):
        raise ValueError(
            f"{type(trainer.strategy).__name__} runs in processes that it spawns or forks, and {module_class.__name__} "
            f"in the calling process would get weights back that it has no place for. Let it inherit "
            f"lightning_compress.{mixin.__name__} before LightningModule, or use strategy='ddp' in a script"
        )


def training_progress(trainer: Trainer, module: LightningModule, batch_idx: int) -> float:
    """Return how much of training is done, in [0, 1]; where steps and epochs end it, by whichever is nearer.

    Raises:
        ValueError: If the trainer has no end in steps or epochs.
    """
    if module.automatic_optimization:
        spans = [(float(trainer.global_step), float(trainer.estimated_stepping_batches))]
    else:
        batches = float(trainer.num_training_batches)
        done, epochs = trainer.current_epoch * batches + batch_idx, trainer.max_epochs
        spans = [(float(trainer.global_step), float(trainer.max_steps))]
        spans.append((done, -1.0 if epochs is None else epochs * batches))
    shares = [done / total if total else 1.0 for done, total in spans if math.isfinite(total) and total >= 0]
    if not shares:
        raise ValueError(
            "compression schedules need to know how long training takes: set max_steps, or max_epochs with a data "
            "loader that has a length"
        )
    return min(max(shares), 1.0)

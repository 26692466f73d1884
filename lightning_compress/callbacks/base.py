"""The one seam to Lightning: a mixin for modules, and the callback that puts it on modules that lack it.

A callback cannot replace a loss, rebuild a structure before checkpoint weights load, or see optimizers that were
bound too early; a LightningModule can. So the callback gives the user's module a dynamic subclass in ``setup`` and
takes it off in ``teardown``. What is remembered between hooks is in :mod:`lightning_compress.callbacks.session`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_compress.callbacks.manual import add_gradients, trains_compressed_layers
from lightning_compress.callbacks.optimizers import (
    check_every_parameter_is_optimized,
    forget_curvature,
    repair_optimizers,
)
from lightning_compress.callbacks.session import (
    CHECKPOINT_KEY,
    Session,
    check_averaging,
    check_launcher,
    check_strategy,
    returns_weights_only,
    session_of,
    training_progress,
)
from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan
from lightning_compress.methods import MethodConfig
from lightning_compress.plan import CompressionPlan

__all__ = ["CompressionCallback", "CompressionMixin", "attach", "convert", "detach"]


class CompressionMixin:
    """Inherit it before ``LightningModule`` so that ``load_from_checkpoint`` rebuilds compressed structures.

    Everything else about a compressing run is added by the callbacks, for modules with and without the mixin. A
    subclass may have checkpoint hooks of its own; it need not call ``super()`` in them.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class Classifier(CompressionMixin, LightningModule): ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let hooks that do not call ``super()`` do our part too."""
        super().__init_subclass__(**kwargs)
        for name, around in (("on_save_checkpoint", _saving), ("on_load_checkpoint", _loading)):
            hook = getattr(cls, name)
            if hook.__module__ != __name__:
                setattr(cls, name, _including(hook, around))

    @property
    def compressor(self) -> Compressor | None:
        """The compressor of this module's transformer, once there is one."""
        session = session_of(self)
        return None if session is None else session.compressor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write plan and state into the checkpoint."""
        _saving(self, super().on_save_checkpoint, checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the structure that the checkpoint's weights belong to, larger or smaller than now."""
        _loading(self, super().on_load_checkpoint, checkpoint)  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Rebuild the structure of weights that come back from a child process."""
        if CHECKPOINT_KEY in state_dict:
            state_dict = dict(state_dict)
            _session(self).load(self, {CHECKPOINT_KEY: state_dict.pop(CHECKPOINT_KEY)}, fitting=False)  # type: ignore[arg-type]
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


class _Attached:
    """The hooks of a compressing run; combined with the user's class by :func:`attach`."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write plan and state into the checkpoint, whatever the user's hook does."""
        _saving(self, super().on_save_checkpoint, checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the structure of the checkpoint's weights, whatever the user's hook does."""
        _loading(self, super().on_load_checkpoint, checkpoint)  # type: ignore[misc]

    def setup(self, stage: str) -> None:
        """Prepare the model if ``__init__`` or the user's ``setup`` built it."""
        if not _session(self).is_of(self.trainer):  # type: ignore[attr-defined]
            detach(self)  # type: ignore[arg-type] # a run ended in an exception, and this one does not compress
            self.setup(stage)
            return
        super().setup(stage)  # type: ignore[misc]
        if stage == "fit" and not _builds_later(self):
            _session(self).prepare(self)  # type: ignore[arg-type]

    def configure_model(self) -> None:
        """Prepare the model if the user's ``configure_model`` built it."""
        super().configure_model()  # type: ignore[misc]
        if self.trainer.state.fn == "fit" and _builds_later(self):  # type: ignore[attr-defined]
            _session(self).prepare(self)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        """Re-point groups that were bound before surgery, and keep auxiliary parameters out."""
        return _configure_optimizers(self, super().configure_optimizers)  # type: ignore[misc]

    def on_fit_start(self) -> None:
        """Take over the random state when resuming."""
        super().on_fit_start()  # type: ignore[misc]
        _session(self).random.start_fit()

    def on_train_start(self) -> None:
        """Check optimizers and schedule before an epoch is spent."""
        super().on_train_start()  # type: ignore[misc]
        compressor, session = _compressor(self), _session(self)
        check_every_parameter_is_optimized(self, self.trainer.optimizers, compressor.auxiliary_parameters())  # type: ignore[attr-defined,arg-type]
        training_progress(self.trainer, self, 0)  # type: ignore[attr-defined,arg-type]
        compressor.forget_stale()
        session.last_step = session.logged_phases = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Move ramps and phases at the start of each optimizer step."""
        session, trainer = _session(self), self.trainer  # type: ignore[attr-defined]
        session.random.start_batch(batch_idx)
        is_first = session.last_step is None
        if self.automatic_optimization:  # type: ignore[attr-defined]
            is_new_step = session.last_step != trainer.global_step
        else:  # the optimizers that step may be none of ours, or none at all while gradients accumulate
            is_new_step = session.stepped_auxiliary
        session.stepped_auxiliary = False
        if is_first or is_new_step:
            session.last_step = trainer.global_step
            session.owes_terms = True
            self._update(batch_idx)
        return super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]

    def _update(self, batch_idx: int) -> None:
        session, compressor, trainer = _session(self), _compressor(self), self.trainer  # type: ignore[attr-defined]
        session.progress = training_progress(trainer, self, batch_idx)  # type: ignore[arg-type]
        before = session.phases
        compressor.update(session.progress)
        compressor.clear_stale_moments(trainer.optimizers)
        if session.phases != before:
            forget_curvature(trainer.optimizers)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Add the compression terms to the user's loss."""
        return _training_step(self, super().training_step, *args, **kwargs)  # type: ignore[misc]

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Under manual optimization, where the returned loss is ignored, add the terms' gradients once per step."""
        super().on_before_backward(loss)  # type: ignore[misc]
        session = _session(self)
        if self.automatic_optimization:  # type: ignore[attr-defined]
            return
        if session.owes_terms:
            session.owes_terms = False
            session.task_weight = _compressor(self).take_task_weight()
            scaler = _scaler(self)
            scale = 1.0 if scaler is None else scaler.get_scale()
            terms = session.remaining_terms()
            session.terms = {name: term.detach() for name, term in terms.items()}
            add_gradients(terms.values(), self.parameters(), scale)  # type: ignore[attr-defined]
        weight = session.task_weight
        if weight != 1.0 and loss.requires_grad:
            loss.register_hook(lambda gradient: weight * gradient)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the auxiliary parameters along with the user's optimizer of the compressed layers, once a batch."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        session, compressor = _session(self), _compressor(self)
        optimizers = self.trainer.optimizers  # type: ignore[attr-defined]
        if not session.stepped_auxiliary and trains_compressed_layers(optimizer, optimizers, compressor):
            session.stepped_auxiliary = True
            compressor.step(scaler=_scaler(self))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the random state with which training goes on."""
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]
        _session(self).random.end_batch()

    def on_validation_end(self) -> None:
        """Keep random numbers that validation drew away from training, which may resume without it."""
        super().on_validation_end()  # type: ignore[misc]
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:  # type: ignore[attr-defined]
            _session(self).random.end_validation()


class CompressionCallback(Callback):
    """Base of the method callbacks: registers one configuration on the module and converts at the end of fit.

    Args:
        config: The method's configuration.
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to make the model physically smaller when ``fit`` ends.
        resources: What the method takes beside its configuration.
    """

    def __init__(
        self,
        config: MethodConfig,
        module: str | None = None,
        convert: bool = True,
        resources: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.resources = resources
        self.module = module
        self.convert_at_end = convert

    @property
    @override
    def state_key(self) -> str:
        """The method and its settings.

        Lightning wants keys that differ when the trainer is made, before we can say what is wrong with the same method
        twice. So settings are part of it, and on resuming with changed ones Lightning warns that a callback is
        missing. Nothing is lost: the module's part of the checkpoint, not the callback's, holds what matters.
        """
        return f"lightning_compress.{self.config.stem}.{json.dumps(self.config.to_dict(), sort_keys=True)}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the hooks on the module, and this method into its session."""
        check_strategy(trainer)
        session = session_of(pl_module)
        if session is not None and not session.is_of(trainer):
            detach(pl_module)  # what a run that ended in an exception left behind
        if stage == "fit":
            check_launcher(trainer, _own_class(pl_module), CompressionMixin)
            if session is None or session.compressor is None or not session.compressor.is_converted:
                check_averaging(trainer)
        attach(pl_module).register(trainer, self.config, self.module, self.resources)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert the model, once for all methods."""
        session = session_of(pl_module)
        if session is None or session.compressor is None or not session.compressor.is_prepared:
            return
        if self.convert_at_end:
            if not session.compressor.is_on_target and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                done = max(session.progress, training_progress(trainer, pl_module, 0))
                short = [s for s, handle in session.compressor.handles.items() if not handle.is_on_target]
                rank_zero_warn(
                    f"training ended in phase {' + '.join(session.phases)}, after {done:.0%} of its planned length, "
                    f"with {short} not yet at their targets or without their recovery: the model is now converted as "
                    "it is, and may be larger than asked or much worse for it. Train longer (was it stopped early?), "
                    "let recovery begin sooner (search_end, ramp_end, end), ask for less, or pass convert=False and "
                    "resume from a checkpoint"
                )
            convert(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own class back; a child process sends the structure along with the weights."""
        detach(pl_module)
        if stage == "fit" and returns_weights_only(trainer):
            pl_module.register_state_dict_post_hook(_write_session)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write plan and state where the module does not: after fit, when it has its own class back."""
        session = session_of(pl_module)
        if session is not None:
            session.save(checkpoint, in_batch=_is_in_batch(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Settings, as plain values; the plan and all state are written by the module."""
        return {"schema": 1, "config": self.config.to_dict()}


def attach(module: LightningModule) -> Session:
    """Give a module the hooks of a compressing run and return its session; a second call changes nothing."""
    session = _session(module)
    cls = type(module)
    if _Attached not in cls.__bases__:
        # A private name: command lines look classes up by their public short names.
        module.__class__ = type(f"_Compressing{cls.__name__}", (_Attached, cls), {"__doc__": cls.__doc__})
        for name in _WRAPPERS:
            if name in vars(module):
                session.instance_hooks[name] = vars(module)[name]
                inner = session.instance_hooks[name]
                vars(module)[name] = partial(_WRAPPERS[name], module, inner)
    return session


def detach(module: LightningModule) -> None:
    """Take the hooks off again; the session and the compressed model stay."""
    session = session_of(module)
    module.__class__ = _own_class(module)
    if session is not None:
        vars(module).update(session.instance_hooks)
        session.instance_hooks = {}


def convert(module: LightningModule) -> CompressionPlan:
    """Make the compressed model of a module physically smaller, and let it know its plan.

    Returns:
        The plan, which ``model.save_pretrained`` now writes too.

    Raises:
        ValueError: If no compression ran on the module, or it is converted already.
    """
    session = session_of(module)
    if session is None or session.compressor is None:
        raise ValueError(
            f"{type(module).__name__} was not prepared by a compression callback: there is nothing to convert"
        )
    compressor = session.compressor
    plan = compressor.convert()
    session.stop_training()
    attach_plan(compressor.model, plan)
    trainer = getattr(module, "_trainer", None)
    if trainer is not None:  # a checkpoint written from here on holds optimizers that fit the model
        repair_optimizers(trainer.optimizers, compressor, module)
    compressor.forget_stale()
    return plan


def _training_step(module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    session, compressor = _session(module), _compressor(module)
    compressor.begin_step()
    output = inner(*args, **kwargs)
    if not module.automatic_optimization or output is None:
        return output
    weight, terms = compressor.take_task_weight(), compressor.take_loss_terms()
    session.terms = {name: term.detach() for name, term in terms.items()}
    if not module.trainer.barebones:
        numbers = compressor.metrics() if session.is_logging_due(module.trainer) else {}
        module.log_dict({f"compress/{name}": term for name, term in session.terms.items()} | numbers)
    extra = sum(terms.values())
    if isinstance(output, Mapping):
        return {**output, "loss": _weighed(output["loss"], weight) + extra}
    return _weighed(output, weight) + extra


def _weighed(loss: torch.Tensor, weight: float) -> torch.Tensor:
    return loss if weight == 1.0 else weight * loss


def _configure_optimizers(module: Any, inner: Any) -> Any:
    return repair_optimizers(inner(), _compressor(module), module)


def _saving(module: Any, inner: Any, checkpoint: dict[str, Any]) -> None:
    inner(checkpoint)
    session = session_of(module)
    if session is not None:
        session.save(checkpoint, in_batch=_is_in_batch(module))


def _loading(module: Any, inner: Any, checkpoint: dict[str, Any]) -> None:
    """Load once, where the innermost of our hooks is reached, or at the end if the user's calls none of them."""
    session, trainer = _session(module), getattr(module, "_trainer", None)
    session.unread = checkpoint
    try:
        inner(checkpoint)
        if session.unread is not None:
            fitting = trainer is not None and trainer.state.fn == "fit"
            session.load(module, checkpoint, fitting=fitting)
    finally:
        session.unread = None


def _including(hook: Any, around: Any) -> Any:
    @wraps(hook)
    def method(self: Any, checkpoint: dict[str, Any]) -> None:
        around(self, partial(hook, self), checkpoint)

    method.__module__ = __name__  # a subclass of the subclass need not be told again
    return method


_WRAPPERS = {
    "training_step": _training_step,
    "configure_optimizers": _configure_optimizers,
    "on_save_checkpoint": _saving,
    "on_load_checkpoint": _loading,
}


def _builds_later(module: Any) -> bool:
    """Whether the user's class has a ``configure_model`` of its own."""
    after = type(module).__mro__[type(module).__mro__.index(_Attached) + 1 :]
    owner = next(cls for cls in after if "configure_model" in vars(cls))
    return owner.__name__ not in ("LightningModule", "_ModelHooks", "ModelHooks")


def _own_class(module: LightningModule) -> type[LightningModule]:
    cls = type(module)
    return cls.__bases__[1] if _Attached in cls.__bases__ else cls


def _write_session(module: LightningModule, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    session = session_of(module)
    if session is not None and not prefix:
        session.save(state_dict, in_batch=False)


def _is_in_batch(module: Any) -> bool:
    """Whether the batch that training is at was not learned from yet."""
    batches = module.trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.ready > batches.processed


def _session(module: object) -> Session:
    return vars(module).setdefault("_compression", Session())


def _compressor(module: object) -> Compressor:
    session = session_of(module)
    assert session is not None and session.compressor is not None, (
        "the model is prepared before training starts"
    )
    return session.compressor


def _scaler(module: Any) -> torch.amp.GradScaler | None:
    return getattr(module.trainer.precision_plugin, "scaler", None)

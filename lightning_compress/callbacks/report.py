"""What a run came to, written while it happens: ``report.json`` and one self-contained page."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_compress.callbacks.dropping_report import SeenBatches, dropping_handle, dropping_in_step
from lightning_compress.callbacks.exit_report import ExitMeasurement, has_exits, measure_exits
from lightning_compress.callbacks.session import session_of, training_progress
from lightning_compress.callbacks.width_report import calibration_clock, measure_widths
from lightning_compress.compressor import Compressor
from lightning_compress.deploy import plan_of
from lightning_compress.methods.width_batches import PassClock
from lightning_compress.plan import CompressionPlan
from lightning_compress.report import (
    BitsRecord,
    DenseCounts,
    DroppingMeasurement,
    FinalRecord,
    RunRecord,
    StepRecord,
    describe_machine,
    describe_versions,
    measure_dropping,
    ranks_of,
    write_report,
)

__all__ = ["CompressionReport"]

_LOSS = re.compile(r"(^|[/_])loss($|[/_])")
_METRIC = re.compile(r"^val[/_]")
_NO_TEXTS = (
    "No validation batch with input_ids was seen, so the report cannot show which tokens leave, and FLOPs are those of "
    "the last training passes: give the trainer validation data as dicts of model inputs"
)
_VALIDATE = "call trainer.validate(module, ...), without ckpt_path, on this trainer after fit: it completes the report"
_NOT_AS_DEPLOYED = (
    f"Validation ran before the model became what it is, so its metrics are not known: {_VALIDATE}"
)
_OTHER = (
    "The model was compressed further after fit, such as by quantize, and the report stays as fit left it: compare the "
    "metrics by hand, or let BlockQuantization do it in the run"
)
_STALE = f"Metrics are those of {{}} steps before training ended: {_VALIDATE}"


class CompressionReport(Callback):
    """Record sizes, FLOPs, ranks and losses over the steps, and write a report when ``fit`` ends.

    Metrics of the compressed model are those of the last validation, if what ran there is what the model has become:
    not where it is rounded, or a threshold is chosen, only when ``fit`` ends. ``trainer.validate`` after ``fit``,
    without ``ckpt_path``, writes the report again, of the model as it is then; the latest metrics count.

    Args:
        directory: Where to write; by default ``compression_report`` in the trainer's log folder.
        lengths: Tokens of the texts over which FLOPs are counted.
        every_n_steps: Optimizer steps between two points of the curves, at least 1.
        dense_metrics: Metrics of a dense run by the same recipe, to compare with, e.g. ``{"val/acc": 0.91}``.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> CompressionReport(lengths=[64]).every_n_steps
        10
    """

    def __init__(
        self,
        directory: str | None = None,
        lengths: Sequence[int] = (128,),
        every_n_steps: int = 10,
        dense_metrics: Mapping[str, float] | None = None,
    ) -> None:
        if every_n_steps < 1 or not lengths or min(lengths) < 1:
            raise ValueError(f"every_n_steps={every_n_steps} and lengths={lengths} must be at least 1")
        self.directory = directory
        self.lengths = tuple(lengths)
        self.every_n_steps = every_n_steps
        self.dense_metrics = dict(dense_metrics) if dense_metrics else None
        self.path: Path | None = None
        self._steps: list[StepRecord] = []
        self._dense: DenseCounts | None = None
        self._seen = SeenBatches()
        self._clock: PassClock | None = None
        self._written: weakref.ref[Compressor] | None = None
        self._validated: int | None = None
        """At which step what was validated was as deployed."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the dense model."""
        compressor = _compressor_of(pl_module)
        if compressor is None:
            warnings.warn(
                "CompressionReport has nothing to report: no compression callback is active", stacklevel=2
            )
            return
        self._clock = calibration_clock(compressor)
        self._dense = DenseCounts.of(compressor.dense_skeleton(), self.lengths)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where compression stands."""
        compressor, step = _compressor_of(pl_module), trainer.global_step
        is_due = step % self.every_n_steps == 0 and (not self._steps or self._steps[-1].step != step)
        if compressor is None or self._dense is None or not compressor.is_prepared or not is_due:
            return
        sizes = [value for name, value in compressor.metrics().items() if name.endswith("/size_ratio")]
        size = sizes[0] if len(sizes) == 1 else self._dense.size_ratio(compressor.model)
        handle = dropping_handle(compressor)
        kept, of_tokens = (1.0, {}) if handle is None else dropping_in_step(handle, batch)
        self._steps.append(
            StepRecord(
                step=step,
                progress=training_progress(trainer, pl_module, batch_idx + 1),
                phase=" + ".join(handle.phase for handle in compressor.handles.values()),
                size_ratio=size,
                flops_ratio=self._dense.flops_ratio(compressor.model, kept),
                ranks=ranks_of(compressor.model),
                loss=_numbers(trainer.callback_metrics, _LOSS) | _terms_of(pl_module),
                **of_tokens,
            )
        )

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep some texts, to see at the end which of them, and of their tokens, leave."""
        compressor = _compressor_of(pl_module)
        if dataloader_idx != 0 or compressor is None:
            return
        if dropping_handle(compressor) is not None or has_exits(compressor):
            self._seen.see(batch, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether what was validated is what the model will be."""
        compressor = _compressor_of(pl_module)
        is_known = compressor is not None and compressor.is_as_deployed
        self._validated = trainer.global_step if is_known else None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look texts up where validation showed none, while the data are there."""
        compressor = _compressor_of(pl_module)
        if trainer.is_global_zero and (self._drops or (compressor is not None and has_exits(compressor))):
            self._seen.look_up(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the report of a fit, after the model was converted, whatever the order of callbacks."""
        compressor = _compressor_of(pl_module)
        if compressor is None or self._dense is None or not trainer.is_global_zero:
            return
        if stage == "fit":
            self._written = weakref.ref(compressor)
            self.path = write_report(self.record(trainer, compressor), self._folder(trainer))
        elif stage == "validate":
            self._write_again(trainer, compressor)

    def _write_again(self, trainer: Trainer, compressor: Compressor) -> None:
        """Write the report of the model anew that the last one was about, with the metrics there are now."""
        is_ours = self._written is not None and self._written() is compressor and compressor.is_converted
        if self.path is None or not is_ours or not _numbers(trainer.callback_metrics, _METRIC):
            return
        found = plan_of(compressor.model)
        if found is not None and found != compressor.plan:
            warnings.warn(_OTHER, stacklevel=2)
        else:
            write_report(self.record(trainer, compressor), self.path.parent)

    def record(self, trainer: Trainer, compressor: Compressor) -> RunRecord:
        """Return everything noted so far as a record."""
        assert self._dense is not None, "the dense model is counted at the start of training"
        plan, dropping, exits, notes = compressor.plan, None, None, []
        metrics: dict[str, float] | None = _numbers(trainer.callback_metrics, _METRIC)
        if metrics and compressor.is_converted and self._validated is None:
            metrics, notes = None, [_NOT_AS_DEPLOYED]
        elif metrics and self._validated is not None and self._validated < trainer.global_step:
            notes = [_STALE.format(trainer.global_step - self._validated)]
        if compressor.is_converted and has_exits(compressor):
            exits = measure_exits(compressor.model, compressor.dense_skeleton(), self._seen.batches)
        if compressor.is_converted and self._drops:
            dropping = self._measure_dropping(trainer, compressor)
            if dropping is None:
                notes.append(_NO_TEXTS)
                warnings.warn(_NO_TEXTS, stacklevel=2)
            else:
                notes += dropping.misses(_target(plan, compressor))
        return RunRecord(
            model_type=plan.model_type,
            methods=[{"method": record.method, "config": record.config} for record in plan.methods],
            target=_target(plan, compressor),
            steps=self._steps,
            final=self._final(compressor, dropping or exits) if compressor.is_converted else None,
            metrics={"dense": self.dense_metrics, "compressed": metrics},
            dropping=None if dropping is None else dropping.record,
            exits=None if exits is None else exits.record,
            widths=measure_widths(compressor, self._clock) if compressor.is_converted else None,
            bits=BitsRecord.of_plan(plan) if compressor.is_converted else None,
            machine=describe_machine(),
            versions=describe_versions(),
            warnings=notes,
        )

    @property
    def _drops(self) -> bool:
        return any(step.tokens_kept is not None for step in self._steps)

    def _measure_dropping(self, trainer: Trainer, compressor: Compressor) -> DroppingMeasurement | None:
        owners = getattr(trainer, "datamodule", None), trainer.lightning_module
        found = (getattr(owner, "tokenizer", None) for owner in owners)
        tokenizer = next((t for t in found if t is not None), None)
        return measure_dropping(compressor.model, compressor.dense_skeleton(), self._seen.batches, tokenizer)

    def _final(
        self, compressor: Compressor, measured: DroppingMeasurement | ExitMeasurement | None
    ) -> FinalRecord:
        assert self._dense is not None
        spent = None if measured is None else (measured.dense_flops, measured.flops)
        if measured is None and self._drops:
            spent = self._dense.spent(self._steps[-1].flops_ratio)
        return self._dense.against(compressor.model, compressor.dense_skeleton(), spent)

    def _folder(self, trainer: Trainer) -> Path:
        root = trainer.log_dir or trainer.default_root_dir
        return Path(self.directory) if self.directory is not None else Path(root) / "compression_report"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_written": None}

    @override
    def state_dict(self) -> dict[str, Any]:
        """The curves so far, as plain values."""
        return {"schema": 1, "steps": [step.to_dict() for step in self._steps]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a resumed run."""
        self._steps = [StepRecord.from_dict(step) for step in state_dict["steps"]]


def _compressor_of(module: LightningModule) -> Compressor | None:
    session = session_of(module)
    return None if session is None else session.compressor


def _target(plan: CompressionPlan, compressor: Compressor) -> dict[str, Any]:
    """What the first method was asked for; of a method with a goal by default, that one."""
    if not plan.methods:
        return {}
    stem, settings = plan.methods[0].method, plan.methods[0].config
    target = {name: value for name, value in settings.items() if name.startswith("target_")}
    config = compressor.configs.get(stem)
    default = getattr(config, "target", None)
    if config is not None and default is not None and all(value is None for value in target.values()):
        target[config.default_goal] = default
    return target


def _terms_of(module: LightningModule) -> dict[str, float]:
    session = session_of(module)
    terms = {} if session is None else session.terms
    return {f"compress/{name}": float(term.detach()) for name, term in terms.items()}


def _numbers(metrics: Mapping[str, Any], wanted: re.Pattern[str]) -> dict[str, float]:
    numbers = {name: value for name, value in metrics.items() if wanted.search(name)}
    return {name: float(v.detach() if isinstance(v, torch.Tensor) else v) for name, v in numbers.items()}

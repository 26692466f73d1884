"""Killed after any step and resumed, a run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.data.resumable import ResumableDataLoader, ResumableDataModule
from tests.toys import ToyModule, ToyTexts, toy_loader, toy_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

STEPS = 12  # three epochs of four steps: warm-up to step 3, search to step 6 at the latest, then recovery

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "whitened, dropout, validation": {"init": "whitened", "model": DROPOUT},
    "svd, accumulation": {"init": "svd", "accumulate_grad_batches": 2},
    "whitened, accumulation, shuffled": {"init": "whitened", "accumulate_grad_batches": 2, "shuffle": True},
    "whitened, dropout, validation in mid-epoch": {"model": DROPOUT, "val_check_interval": 2},
    "exp regularizer, no warm-up": {"regularizer": "exp", "warmup": 0.0, "model": DROPOUT, "validate": False},
}


class Scheduled(ToyModule):
    """Draws random numbers from all three generators, and warms its learning rate up."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return super().training_step(batch, batch_idx) * (1.0 + 0.1 * noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Texts(ResumableDataModule):
    def __init__(self, batches: int, shuffle: bool) -> None:
        super().__init__()
        self.batches, self.shuffle = batches, shuffle

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(4 * self.batches) if self.shuffle else None
        return self.make_resumable(
            ResumableDataLoader(ToyTexts(4 * self.batches), batch_size=4, sampler=sampler)
        )

    def val_dataloader(self) -> Any:
        return toy_loader(8)


class EpochShuffle(torch.utils.data.Sampler):
    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def run(
    callbacks: list[Callback],
    *,
    ckpt_path: Path | None = None,
    model: Mapping[str, Any] | None = None,
    accumulate_grad_batches: int = 1,
    shuffle: bool = False,
    val_check_interval: float = 1.0,
    validate: bool = True,
    seed: int = 0,
    **method: Any,
) -> dict[str, Any]:
    """Fit for three epochs of four steps, and return everything that must be equal at the end."""
    module = Scheduled(**(model or {}))
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    settings = {"target_params": 0.5, "rank_multiple": 4, "warmup": 0.25, "search_end": 0.6, "convert": False}
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = toy_trainer(
        max_epochs=3,
        callbacks=[SoftThresholdRank(**{**settings, **method}), *callbacks],
        accumulate_grad_batches=accumulate_grad_batches,
        val_check_interval=val_check_interval,
        limit_val_batches=int(2 * validate),
        enable_checkpointing=saves,
    )
    data = Texts(4 * accumulate_grad_batches, shuffle)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return end_of(trainer, module)


def end_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    compressor = module.__dict__["_compression"].compressor
    return {
        "step": trainer.global_step,
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "compression": compressor.state_dict(),
        "plan": compressor.plan.to_dict(),
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two nested states are not bit-equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        odd = [f"{where}/{key} on one side" for key in one.keys() ^ other.keys()]
        shared = sorted(one.keys() & other.keys(), key=str)
        return odd + [d for key in shared for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [where]


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_run_killed_after_any_step_ends_as_the_uninterrupted_one(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    whole = run([every_step(tmp_path)], **variant)
    assert whole["step"] == STEPS
    assert whole["compression"]["handles"]["soft_threshold_rank"]["phase"] == "recovery"
    phases = []
    for step in range(1, STEPS):
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)["lightning_compress"]
        phases.append(saved["state"]["handles"]["soft_threshold_rank"]["phase"])
        resumed = run([], ckpt_path=path, seed=1000 + step, **variant)
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) >= {"search", "recovery"}


class InterruptedByTestError(RuntimeError): ...


class Interrupts(Callback):
    """Stops the run at a hook of the batch that follows ``step`` steps."""

    def __init__(self, step: int, hook: str) -> None:
        self.step, self.hook = step, hook
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedByTestError(self.hook)


IN_BATCH = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
IN_BATCH += ["on_before_optimizer_step", "on_train_batch_end"]
AT_EPOCH_END = ["on_validation_start", "on_validation_end", "on_train_epoch_end"]
STOPS = [(step, hook) for step in (2, 4, 9) for hook in IN_BATCH] + [(8, hook) for hook in AT_EPOCH_END]


@pytest.mark.parametrize(("step", "hook"), STOPS)
def test_an_exception_checkpoint_resumes_without_a_trace(
    step: int, hook: str, tmp_path: Path, uninterrupted: Any
) -> None:
    saves = ModelCheckpoint(
        tmp_path, filename="at_exception", save_on_exception=True, every_n_train_steps=1000
    )
    with pytest.raises(InterruptedByTestError):
        run([Interrupts(step, hook), saves], model=DROPOUT)
    resumed = run([], ckpt_path=tmp_path / "at_exception.ckpt", model=DROPOUT, seed=99)
    assert differences(uninterrupted, resumed) == []


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")
def test_lightnings_exception_checkpoint_resumes_without_a_trace(tmp_path: Path, uninterrupted: Any) -> None:
    with pytest.raises(InterruptedByTestError):
        run([Interrupts(5, "on_after_backward"), OnExceptionCheckpoint(tmp_path)], model=DROPOUT)
    resumed = run([], ckpt_path=tmp_path / "on_exception.ckpt", model=DROPOUT, seed=99)
    assert differences(uninterrupted, resumed) == []


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return run([], model=DROPOUT)


class Terminates(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminated_run_resumes_without_a_trace(tmp_path: Path, uninterrupted: Any) -> None:
    saves = ModelCheckpoint(tmp_path, filename="at_signal", save_on_exception=True, every_n_train_steps=1000)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SIGTERMException):
            run([Terminates(), saves], model=DROPOUT)
    finally:
        signal.signal(signal.SIGTERM, before)
    saved = torch.load(tmp_path / "at_signal.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    resumed = run([], ckpt_path=tmp_path / "at_signal.ckpt", model=DROPOUT, seed=99)
    assert differences(uninterrupted, resumed) == []

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
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import get_linear_schedule_with_warmup

from lightning_compress.callbacks import SoftThresholdRank
from tests.toys import ToyModule
from tests.toys_runs import (
    DROPOUT,
    InterruptedByTestError,
    Interrupts,
    Texts,
    differences,
    every_step,
    interrupted_and_resumed,
    resumptions,
    run_to_the_end,
)

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

STEM = "soft_threshold_rank"
STEPS = 12  # three epochs of four steps: warm-up to step 3, search to step 6 at the latest, then recovery

VARIANTS: dict[str, dict[str, Any]] = {
    "whitened, dropout, validation": {"init": "whitened", "model": DROPOUT},
    "svd, accumulation": {"init": "svd", "accumulate_grad_batches": 2},
    "whitened, accumulation, shuffled": {"init": "whitened", "accumulate_grad_batches": 2, "shuffle": True},
    "whitened, dropout, validation in mid-epoch": {"model": DROPOUT, "val_check_interval": 2},
    "exp regularizer, no warm-up": {"regularizer": "exp", "warmup": 0.0, "model": DROPOUT, "validate": False},
}


class WarmedUp(ToyModule):
    """Draws random numbers from all three generators, and warms its learning rate up."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return super().training_step(batch, batch_idx) * (1.0 + 0.1 * noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


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
    settings = {"target_params": 0.5, "rank_multiple": 4, "warmup": 0.25, "search_end": 0.6, "convert": False}
    return run_to_the_end(
        WarmedUp(**(model or {})),
        [SoftThresholdRank(**{**settings, **method}), *callbacks],
        Texts(4 * accumulate_grad_batches, shuffle),
        ckpt_path,
        seed,
        accumulate_grad_batches=accumulate_grad_batches,
        val_check_interval=val_check_interval,
        limit_val_batches=int(2 * validate),
    )


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_run_killed_after_any_step_ends_as_the_uninterrupted_one(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    whole = run([every_step(tmp_path)], **variant)
    assert whole["step"] == STEPS
    assert whole["phases"][STEM] == "recovery"
    phases = []
    for step, saved, resumed in resumptions(run, range(1, STEPS), tmp_path, STEM, **variant):
        phases.append(saved["phase"])
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) >= {"search", "recovery"}


IN_BATCH = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
IN_BATCH += ["on_before_optimizer_step", "on_train_batch_end"]
AT_EPOCH_END = ["on_validation_start", "on_validation_end", "on_train_epoch_end"]
STOPS = [(step, hook) for step in (2, 4, 9) for hook in IN_BATCH] + [(8, hook) for hook in AT_EPOCH_END]


@pytest.mark.parametrize(("step", "hook"), STOPS)
def test_an_exception_checkpoint_resumes_without_a_trace(
    step: int, hook: str, tmp_path: Path, uninterrupted: Any
) -> None:
    resumed = interrupted_and_resumed(run, step, hook, tmp_path, model=DROPOUT)
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

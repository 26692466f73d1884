"""Runs that are watched, killed, interrupted in mid-batch, resumed and compared; and runs of two processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_compress.callbacks import CompressionMixin
from lightning_compress.data.resumable import ResumableDataLoader, ResumableDataModule
from tests.toys import ToyModule, ToyTexts, toy_loader, toy_trainer

__all__ = [
    "DROPOUT",
    "InterruptedByTestError",
    "Interrupts",
    "Mixed",
    "SameOnAllRanks",
    "Scheduled",
    "Texts",
    "Watch",
    "differences",
    "every_step",
    "ignore_warnings_of_processes",
    "interrupted_and_resumed",
    "resumptions",
    "run_to_the_end",
    "two_processes",
]

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Watch(Callback):
    """Keeps what is logged at each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Scheduled(ToyModule):
    """Draws random numbers beside dropout."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + 0.1 * random.random())


class EpochShuffle(torch.utils.data.Sampler):
    """Another order in every epoch, the same in every run."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Texts(ResumableDataModule):
    """Batches of four texts, and eight texts for validation."""

    def __init__(self, batches: int = 4, shuffle: bool = True) -> None:
        super().__init__()
        self.batches, self.shuffle = batches, shuffle

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(4 * self.batches) if self.shuffle else None
        return self.make_resumable(
            ResumableDataLoader(ToyTexts(4 * self.batches), batch_size=4, sampler=sampler)
        )

    def val_dataloader(self) -> Any:
        return toy_loader(8)


def run_to_the_end(
    module: LightningModule,
    callbacks: Iterable[Callback],
    data: Texts | None = None,
    ckpt_path: Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Fit for three epochs, of four shuffled steps unless told otherwise; return what must be equal at the end."""
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    callbacks = list(callbacks)
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = toy_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=saves, **settings)
    trainer.fit(module, datamodule=data or Texts(), ckpt_path=ckpt_path)
    compressor = module.__dict__["_compression"].compressor
    return {
        "step": trainer.global_step,
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "compression": compressor.state_dict(),
        "phases": {stem: handle.phase for stem, handle in compressor.handles.items()},
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


def resumptions(
    run: Callable[..., dict[str, Any]], steps: Iterable[int], folder: Path, stem: str, **settings: Any
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Resume a run that was saved by ``every_step(folder)`` after these steps, from another random state.

    Yields:
        The step, the state of the method in its checkpoint, and the end of the resumed run.
    """
    for step in steps:
        path = folder / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)["lightning_compress"]["state"]["handles"][stem]
        yield step, saved, run([], ckpt_path=path, seed=1000 + step, **settings)


class InterruptedByTestError(RuntimeError): ...


class Interrupts(Callback):
    """Stops the run at a hook of the batch that follows ``step`` steps."""

    def __init__(self, step: int, hook: str) -> None:
        self.step, self.hook = step, hook
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedByTestError(self.hook)


def interrupted_and_resumed(
    run: Callable[..., dict[str, Any]], step: int, hook: str, folder: Path, **settings: Any
) -> dict[str, Any]:
    """Return the end of a run that fails in a hook, saves itself, and is resumed from another random state."""
    saves = ModelCheckpoint(folder, filename=f"at{step}", save_on_exception=True, every_n_train_steps=1000)
    with pytest.raises(InterruptedByTestError):
        run([Interrupts(step, hook), saves], **settings)
    return run([], ckpt_path=folder / f"at{step}.ckpt", seed=99, **settings)


ignore_warnings_of_processes = pytest.mark.filterwarnings(
    "ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning",
    "ignore:It is recommended to use .* when logging on epoch level in distributed",
)


def two_processes(
    find_unused_parameters: bool = False, start_method: Literal["fork", "spawn"] = "fork", **settings: Any
) -> Trainer:
    """A quiet trainer of two CPU processes."""
    strategy = DDPStrategy(
        start_method=start_method,
        find_unused_parameters=find_unused_parameters,
        process_group_backend="gloo",
    )
    return toy_trainer(strategy=strategy, devices=2, **settings)


class Mixed(CompressionMixin, ToyModule):
    """Ranks see different batches and start from different random states."""

    def on_train_start(self) -> None:
        torch.manual_seed(self.global_rank)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        self.seen = batch["input_ids"].tolist()
        return super().training_step(batch, batch_idx)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class SameOnAllRanks(Callback):
    """Compares weights and the state of compression across ranks, after each batch and at the end."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        mine, others = gathered(pl_module.seen)
        assert mine != others
        self.compare(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.compare(pl_module)

    def compare(self, module: LightningModule) -> None:
        compressor = module.__dict__["_compression"].compressor
        sums = {name: tensor.double().sum().item() for name, tensor in module.state_dict().items()}
        handles = {stem: self.state_of(handle) for stem, handle in compressor.handles.items()}
        one, other = gathered((sums, handles, compressor.plan.to_dict()))
        assert one == other

    def state_of(self, handle: Any) -> tuple[Any, ...]:
        """What must be the same of a method's handle."""
        return handle.phase, handle.progress

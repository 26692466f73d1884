import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import Dataset

from lightning_compress.data.resumable import ResumableDataLoader, ResumableDataModule
from lightning_compress.data.sampling import LengthBucketedSampler

# the resumed runs do not save again
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

NUM_EXAMPLES, BATCH_SIZE, NUM_BATCHES, NUM_EPOCHS = 22, 4, 6, 3


class Numbers(Dataset):
    """Example i is the number i; counts how often it is read."""

    def __init__(self) -> None:
        self.num_reads = 0

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        self.num_reads += 1
        return torch.tensor(float(index))


class NumbersData(ResumableDataModule):
    """Bucketed batches of numbers."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> ResumableDataLoader:
        return self.make_resumable(numbers_loader(num_workers=self.num_workers))

    def val_dataloader(self) -> ResumableDataLoader:
        return numbers_loader()


class Recorder(LightningModule):
    """Records the batches it learns from; may fail in the middle of a step."""

    def __init__(self, asks_for_length: bool = True, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.asks_for_length, self.fail_at = asks_for_length, fail_at
        self.seen: list[tuple[int, ...]] = []
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append((self.current_epoch, batch_idx, *batch.int().tolist()))
        loss = self.layer(batch[:, None] / NUM_EXAMPLES).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/mean", batch.mean())

    def configure_optimizers(self) -> Any:
        if self.asks_for_length:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def numbers_loader(**options: Any) -> ResumableDataLoader:
    sampler = LengthBucketedSampler([1 + i % 5 for i in range(NUM_EXAMPLES)], BATCH_SIZE, seed=3)
    return ResumableDataLoader(Numbers(), batch_size=BATCH_SIZE, sampler=sampler, seed=3, **options)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    length = {} if "max_steps" in settings else {"max_epochs": NUM_EPOCHS}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **{"limit_val_batches": 0, **quiet, **length, **settings},
    )


def fit(folder: Path, *callbacks: Callback, ckpt_path: str | None = None, **settings: Any) -> Recorder:
    module_settings = {
        name: settings.pop(name) for name in ("asks_for_length", "fail_at") if name in settings
    }
    torch.manual_seed(0)
    module = Recorder(**module_settings)
    data = settings.pop("data", None) or NumbersData()
    trainer(folder, *callbacks, **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("asks_for_length", [True, False])
@pytest.mark.parametrize("length", [{}, {"max_steps": NUM_EPOCHS * NUM_BATCHES}])
@pytest.mark.parametrize("saved_after", [1, 4, 5, 6, 7, 11, 12, 13])
def test_a_run_resumed_after_any_step_sees_the_batches_of_the_uninterrupted_run(
    tmp_path, saved_after, length, asks_for_length
):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, saver, asks_for_length=asks_for_length, **length)
    resumed = fit(
        tmp_path, ckpt_path=f"{tmp_path}/step={saved_after}.ckpt", asks_for_length=asks_for_length, **length
    )
    assert len(whole.seen) == NUM_EPOCHS * NUM_BATCHES
    assert resumed.seen == whole.seen[saved_after:]
    assert resumed.losses == whole.losses[saved_after:]


@pytest.mark.parametrize("val_check_interval", [0.5, 1.0])
def test_a_run_resumed_after_a_validation_sees_the_same_batches(tmp_path, val_check_interval):
    settings = {"limit_val_batches": 1, "val_check_interval": val_check_interval, "num_sanity_val_steps": 0}
    saver = ModelCheckpoint(tmp_path, monitor="val/mean", save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, saver, **settings)
    checkpoints = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(checkpoints) == NUM_EPOCHS / val_check_interval
    for checkpoint in checkpoints:
        done = int(checkpoint.stem.removeprefix("step="))
        assert fit(tmp_path, ckpt_path=str(checkpoint), **settings).seen == whole.seen[done:]


def test_a_run_resumed_from_the_end_of_an_epoch_sees_the_same_batches(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, saver)
    resumed = fit(tmp_path, ckpt_path=f"{tmp_path}/step={NUM_BATCHES}.ckpt")
    assert resumed.seen == whole.seen[NUM_BATCHES:]


@pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint):UserWarning")
@pytest.mark.parametrize("fail_at", [2, 6, 9])
def test_the_batch_of_a_step_that_failed_is_learned_from_after_resuming(tmp_path, fail_at):
    whole = fit(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, OnExceptionCheckpoint(tmp_path, "failed"), fail_at=fail_at)
    resumed = fit(tmp_path, ckpt_path=f"{tmp_path}/failed.ckpt")
    assert resumed.seen == whole.seen[fail_at:]
    assert resumed.losses == whole.losses[fail_at:]


def test_resuming_works_with_worker_processes(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, saver, max_steps=9)
    resumed = fit(tmp_path, data=NumbersData(num_workers=1), max_steps=9, ckpt_path=f"{tmp_path}/step=4.ckpt")
    assert resumed.seen == whole.seen[4:9]


def test_resuming_twice_works(tmp_path):
    whole = fit(tmp_path)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path, saver, max_steps=2)
    fit(tmp_path, saver, max_steps=4, ckpt_path=f"{tmp_path}/step=2.ckpt")
    assert fit(tmp_path, ckpt_path=f"{tmp_path}/step=4.ckpt").seen == whole.seen[4:]


def test_a_fit_without_checkpoint_starts_at_the_beginning_even_after_a_test_with_one(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, saver)
    data = NumbersData()
    module = Recorder()
    trainer(tmp_path, limit_val_batches=1).validate(
        module, datamodule=data, ckpt_path=f"{tmp_path}/step=2.ckpt"
    )
    assert fit(tmp_path, data=data).seen == whole.seen


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_lightning_may_turn_off_shuffling_to_overfit(tmp_path):
    module = fit(tmp_path, overfit_batches=2, max_epochs=2, max_steps=-1)
    assert [row[2:] for row in module.seen] == [(0, 1, 2, 3), (4, 5, 6, 7)] * 2


def test_skipping_does_not_read_the_skipped_examples():
    loader = numbers_loader()
    loader.load_state_dict({"epoch": 0, "batches": 4})
    assert len(list(loader)) == 2
    assert loader.dataset.num_reads == NUM_EXAMPLES - 4 * BATCH_SIZE


def test_a_state_of_another_epoch_does_not_skip():
    loader = numbers_loader()
    loader.sampler.set_epoch(1)
    loader.load_state_dict({"epoch": 0, "batches": 4})
    assert len(list(loader)) == NUM_BATCHES


def test_without_epochs_a_finished_pass_is_followed_by_a_whole_one():
    loader = ResumableDataLoader(Numbers(), batch_size=BATCH_SIZE)
    loader.load_state_dict({"epoch": 2, "batches": NUM_BATCHES})
    assert len(list(loader)) == NUM_BATCHES
    assert loader.state_dict() == {"epoch": 3, "batches": NUM_BATCHES}
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 4, "batches": 1}


def test_the_state_before_the_first_batch_is_the_one_that_was_loaded():
    loader = numbers_loader()
    loader.load_state_dict({"epoch": 1, "batches": 2})
    assert loader.state_dict() == {"epoch": 1, "batches": 2}


def test_iterating_leaves_the_global_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(numbers_loader())
    assert torch.equal(torch.rand(3), expected)


def test_an_epoch_seeds_its_workers_alike_whatever_came_before():
    through, resumed = numbers_loader(), numbers_loader()
    list(through)
    for loader in (through, resumed):
        loader.sampler.set_epoch(1)
        list(loader)
    assert torch.equal(through.generator.get_state(), resumed.generator.get_state())


@pytest.mark.parametrize(
    "state", [{}, {"epoch": 0}, {"epoch": -1, "batches": 2}, {"epoch": 0, "batches": -2}]
)
def test_a_malformed_state_is_refused(state):
    with pytest.raises(ValueError, match="needs `epoch` and `batches`"):
        numbers_loader().load_state_dict(copy.copy(state))

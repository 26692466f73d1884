"""Go on in mid-epoch: a loader, and a data module, whose place in the epoch is saved in the checkpoint.

How Lightning (2.6) calls this: ``FitLoop.on_save_checkpoint`` stores ``state_dict()`` of every loader that
has one, ``FitLoop.setup_data`` gives it back right before the first ``iter``. Two things that the loop leaves
open are closed here. If ``configure_optimizers`` asks for ``trainer.estimated_stepping_batches``, the loader
is set up *before* the loop's state is known and never receives its state; the data module's own state, which
is restored earlier, carries it as well. And only the trainer knows whether a batch that was handed out was
also learned from, which matters if an exception ends the run in mid-step; the data module asks it.

The next chapter is :mod:`lightning_compress.data.text_classification`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

__all__ = ["ResumableDataLoader", "ResumableDataModule"]


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` with a place in the epoch that can be saved and returned to.

    Returning skips batches without reading or collating them. The order must be a function of the sampler's
    epoch (``sampler.set_epoch``), as with :class:`~lightning_compress.data.sampling.LengthBucketedSampler` or
    torch's ``DistributedSampler``; a sampler without an epoch is taken to give the same order each time. The
    loader draws from a generator of its own, never from torch's global one, so that a resumed run sees the
    same random numbers.

    Args:
        dataset: Map-style data set.
        *args: As for ``DataLoader``.
        seed: Seed of the loader's generator (seeds of workers).
        **kwargs: As for ``DataLoader``.

    Example:
        >>> first, second = (ResumableDataLoader(range(10), batch_size=2) for _ in range(2))
        >>> batches = iter(first)
        >>> _ = next(batches), next(batches)
        >>> second.load_state_dict(first.state_dict())
        >>> next(iter(second))
        tensor([4, 5])
    """

    num_learned: Callable[[], int] | None = None
    """Counts the batches of the running epoch that were learned from; None: all that were handed out."""

    def __init__(self, dataset: Dataset, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(dataset, *args, **kwargs)
        self._seed = seed
        self._epoch = 0  # of the batches handed out last
        self._handed_out = 0
        self._resume_at: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Tell the epoch and how many of its batches are done."""
        if self._resume_at is not None:
            epoch, batches = self._resume_at
        else:
            epoch, batches = self._epoch, self._handed_out
            if self.num_learned is not None:
                batches = min(batches, self.num_learned())
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on at the saved place if the next pass is over that epoch; any other epoch starts afresh.

        Raises:
            ValueError: The state is not one that ``state_dict`` returns.
        """
        epoch, batches = state_dict.get("epoch", -1), state_dict.get("batches", -1)
        if epoch < 0 or batches < 0:
            raise ValueError(
                f"A loader's state needs `epoch` and `batches`, both 0 or more; got {state_dict}."
            )
        self._resume_at = (epoch, batches)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the sampler's current epoch that are not done yet.

        Everything happens at the first ``next``: Lightning creates the iterator before it sets the epoch.
        """
        epoch = self._upcoming_epoch()
        resume_epoch, skip = self._resume_at or (epoch, 0)
        self._resume_at = None
        if resume_epoch != epoch:
            skip = 0
        self._epoch, self._handed_out = epoch, skip
        assert self.generator is not None
        self.generator.manual_seed(self._seed + epoch)
        for batch in self._rest(skip) if skip else super().__iter__():
            self._handed_out += 1
            yield batch

    def _upcoming_epoch(self) -> int:
        epoch = getattr(self.sampler, "epoch", None)
        if epoch is not None:
            return epoch
        if self._resume_at is not None:
            resume_epoch, batches = self._resume_at
            return resume_epoch + (batches >= len(self))
        return self._epoch + (self._handed_out > 0)

    def _rest(self, skip: int) -> DataLoader:
        assert self.batch_sampler is not None
        return DataLoader(
            self.dataset,
            batch_sampler=list(self.batch_sampler)[skip:],
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            timeout=self.timeout,
            worker_init_fn=self.worker_init_fn,
            multiprocessing_context=self.multiprocessing_context,
            generator=self.generator,
            prefetch_factor=self.prefetch_factor,
        )


class ResumableDataModule(LightningDataModule):
    """A data module with one training loader, whose place in the epoch travels in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableDataLoader | None = None
        self._resume_state: dict[str, int] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Save the training loader's place."""
        loader = None if self.trainer is None else self.trainer.train_dataloader
        if not isinstance(loader, ResumableDataLoader):  # Lightning may have made its own copy of ours
            loader = self._train_loader
        return {} if loader is None else {"train_loader": loader.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for the loader that ``train_dataloader`` is about to make (when fitting only)."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._resume_state = state_dict.get("train_loader")

    @property
    def ranks(self) -> tuple[int, int]:
        """Number of processes and this process's number; ``(1, 0)`` without a trainer."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def make_resumable(self, loader: ResumableDataLoader) -> ResumableDataLoader:
        """Attach a new training loader to the trainer's progress and to the place to resume at, if any."""
        if self.trainer is not None:
            loader.num_learned = self._num_learned
        if self._resume_state is not None:
            loader.load_state_dict(self._resume_state)
            self._resume_state = None
        self._train_loader = loader
        return loader

    def _num_learned(self) -> int:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]

"""Find the parts of a text data set: ``stdlib-docs``, files, a folder saved by ``datasets``, or a hub name.

The next chapter is :mod:`lightning_compress.data.text_classification`, which tokenises what is found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_compress.data.stdlib_docs import STDLIB_DOCS, TOPICS, load_stdlib_docs
from lightning_compress.data.tables import Columns, read_columns

__all__ = ["Part", "TextParts", "load_dataset_parts", "split_off", "take"]

_FOLDER_MARKERS = ("dataset_dict.json", "state.json")
_VALIDATION_NAMES = ("validation", "valid", "dev", "validation_matched")


@dataclass(frozen=True)
class Part:
    """One part of a data set: its columns and what to call it in messages."""

    columns: Columns
    where: str
    label_names: tuple[str, ...] | None = None
    """Names of the classes, where the data set comes with them."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(next(iter(self.columns.values())))


class TextParts:
    """The parts of one data set, each read when it is first asked for.

    Args:
        files: Part (``"train"``, ``"validation"``, ``"test"``, ``"predict"``) to path, or None where not
            given.
        dataset: What to use if no file is given.
        dataset_config: Configuration of a hub data set.
        validation_ratio: Share of the training rows to split off if there is no validation part, in [0, 1).
        limit_train: Number of training rows to keep, at least 1; None keeps all.
        seed: Decides the split and the subset.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        files: dict[str, str | None],
        *,
        dataset: str = STDLIB_DOCS,
        dataset_config: str | None = None,
        validation_ratio: float = 0.1,
        limit_train: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= validation_ratio < 1:
            raise ValueError(f"`validation_ratio` must be in [0, 1), got {validation_ratio}.")
        if limit_train is not None and limit_train < 1:
            raise ValueError(f"`limit_train` must be at least 1, got {limit_train}.")
        self._files = {name: path for name, path in files.items() if path is not None}
        self._dataset = dataset
        self._dataset_config = dataset_config
        self._validation_ratio = validation_ratio
        self._limit_train = limit_train
        self._seed = seed
        self._read: dict[str, Part] = {}

    def __str__(self) -> str:
        """Say what the user gave."""
        return f"the files {self._files}" if self._files else f"`dataset={self._dataset!r}`"

    def prepare(self) -> None:
        """Do what needs doing once per machine: harvest the standard library into the cache."""
        if self._dataset == STDLIB_DOCS and not self._files:
            load_stdlib_docs()

    def find(self, name: str) -> Part | None:
        """Look a part up; prediction falls back to the test part, validation to a share of the training part.

        Raises:
            ValueError: A file or data set cannot be read; the message says why.
        """
        if not self._read and not self._files:
            self._read = load_dataset_parts(self._dataset, self._dataset_config)
            self._complete_training_part()
        if name not in self._read and name in self._files:
            path = self._files[name]
            self._read[name] = Part(read_columns(path), f"the {name} file {path!r}")
            if name == "train":
                self._complete_training_part()
        if name == "validation" and name not in self._read and "train" in self._files:
            self.find("train")
        if name == "predict" and name not in self._read:
            return self.find("test")
        return self._read.get(name)

    def _complete_training_part(self) -> None:
        if "train" not in self._read:
            return
        train = self._read["train"]
        if "validation" not in {**self._read, **self._files} and self._validation_ratio > 0:
            train, self._read["validation"] = split_off(train, self._validation_ratio, self._seed)
        if self._limit_train is not None and self._limit_train < len(train):
            rows = np.random.default_rng(self._seed).permutation(len(train))[: self._limit_train]
            train = take(train, np.sort(rows))
        self._read["train"] = train


def load_dataset_parts(dataset: str, config: str | None = None) -> dict[str, Part]:
    """Load the parts of a named data set.

    Args:
        dataset: ``"stdlib-docs"``, a folder that ``datasets``' ``save_to_disk`` wrote, or a name on the hub.
        config: Configuration of a hub data set, e.g. ``"sst2"`` of ``nyu-mll/glue``.

    Raises:
        ValueError: A folder that is not a data set, a path that is a file or does not exist, a hub name that
            cannot be loaded.
    """
    if dataset == STDLIB_DOCS:
        splits = load_stdlib_docs()
        return {name: Part(table, f"{STDLIB_DOCS} ({name})", tuple(TOPICS)) for name, table in splits.items()}
    path = Path(dataset).expanduser()
    if path.is_file():
        raise ValueError(
            f"`dataset={dataset!r}` is a file; give it as `train=`, `validation=` or `test=` instead."
        )
    if path.is_dir():
        return _parts_of(_from_folder(path), f"the folder {dataset!r}")
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise ValueError(
            f"`dataset={dataset!r}` does not exist. Give a folder written by `save_to_disk`, a hub name"
            f" (`owner/name`) or {STDLIB_DOCS!r}; single files go to `train=`."
        )
    return _parts_of(_from_hub(dataset, config), f"the hub data set {dataset!r}")


def take(part: Part, rows: np.ndarray) -> Part:
    """Keep the given rows of a part, in that order."""
    columns = {name: [values[row] for row in rows] for name, values in part.columns.items()}
    return Part(columns, part.where, part.label_names)


def split_off(part: Part, ratio: float, seed: int) -> tuple[Part, Part]:
    """Divide a part at random into ``(rest, share)`` where the share has ``ratio`` of the rows.

    Args:
        part: What to divide, at least two rows.
        ratio: Share in (0, 1); at least one row ends up on either side.
        seed: Decides which rows.
    """
    if len(part) < 2:
        raise ValueError(
            f"{part.where} has {len(part)} row: too few to split a validation part off; give `validation=`."
        )
    order = np.random.default_rng(seed).permutation(len(part))
    share = min(max(round(len(part) * ratio), 1), len(part) - 1)
    return take(part, np.sort(order[share:])), take(part, np.sort(order[:share]))


def _from_folder(path: Path) -> Any:
    import datasets

    if not any((path / marker).is_file() for marker in _FOLDER_MARKERS):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{str(path)!r} is not a data set folder: it holds none of {_FOLDER_MARKERS} (it holds: {found})."
            " Give the folder that `datasets.DatasetDict.save_to_disk` wrote, or files as `train=`."
        )
    return datasets.load_from_disk(str(path))


def _from_hub(name: str, config: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(name, config)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"`dataset={name!r}` (config {config!r}) is neither a local folder nor could it be loaded from"
            f" the Hugging Face hub: {error}"
        ) from error


def _parts_of(loaded: Any, where: str) -> dict[str, Part]:
    import datasets

    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    parts: dict[str, Part] = {}
    for name, rows in loaded.items():
        key = "validation" if name in _VALIDATION_NAMES else str(name)
        if key in parts:
            continue
        if not len(rows):
            raise ValueError(f"The part {name!r} of {where} is empty.")
        columns = {column: list(rows[column]) for column in rows.column_names}
        parts[key] = Part(columns, f"the part {name!r} of {where}", _class_names(rows))
    return parts


def _class_names(rows: Any) -> tuple[str, ...] | None:
    import datasets

    named = [feature for feature in rows.features.values() if isinstance(feature, datasets.ClassLabel)]
    return tuple(named[0].names) if len(named) == 1 else None

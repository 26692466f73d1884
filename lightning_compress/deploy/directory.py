"""Directories replaced as a whole: a reader, or a crash, sees either the old model or the new one.

Everything is written to a folder beside the target, flushed to the disk, and then put in the target's place
in one step. Files of the target that the new model does not bring are carried over.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

__all__ = ["check_target", "replaced_directory"]

_OLD_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_target(target: Path) -> None:
    """Refuse a place where a model must not be written.

    Raises:
        ValueError: If ``target`` is a file, or a folder with content that is not a model, or a peft adapter.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file: choose a folder to save the model in")
    names = {path.name for path in target.iterdir()}
    if names and "config.json" not in names:
        raise ValueError(
            f"{target} is not empty and not a model directory (it has no config.json, but "
            f"{sorted(names)[:3]}): "
            "choose a new or empty folder"
        )
    if "adapter_config.json" in names:
        raise ValueError(f"{target} holds a peft adapter, which loads on top: choose another folder")


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends well, it takes the place of ``target``.

    A killed process leaves the target as it was, and its unfinished folder ``.<name>.*.saving`` beside it.
    If the block raises, the target is as it was and the new folder is gone. Weights of the replaced model are
    not carried over, every other file without a successor is. Where the system can exchange two folders in
    one step (Linux), there is no moment without a model; elsewhere there is one between two renames.

    Args:
        target: The folder to create or replace; links are followed.
    """
    check_target(target)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".saving", dir=target.parent))
    try:
        yield fresh
        if target.exists():
            _carry_over(target, fresh)
        fresh.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o777 & ~_umask())
        _flush(fresh)
        _put_in_place(fresh, target)
        _flush_folder(target.parent)
    finally:
        if fresh.exists():  # the unfinished new folder, or after the exchange the old one
            shutil.rmtree(fresh)


def _carry_over(old: Path, new: Path) -> None:
    """Link the files of ``old`` that ``new`` does not replace into ``new``, or copy them."""
    for source in sorted(old.rglob("*")):
        relative = source.relative_to(old)
        goal = new / relative
        if source.is_dir() and not source.is_symlink():
            goal.mkdir(exist_ok=True)
        elif not goal.exists() and not _is_old_weight(relative):
            _link(source, goal)


def _is_old_weight(relative: Path) -> bool:
    return len(relative.parts) == 1 and any(fnmatch(relative.name, pattern) for pattern in _OLD_WEIGHTS)


def _link(source: Path, goal: Path) -> None:
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, goal, follow_symlinks=False)


def _put_in_place(new: Path, target: Path) -> None:
    is_free = not target.exists() or not any(target.iterdir())
    if is_free:
        if target.exists():
            target.rmdir()
        new.rename(target)
    elif not _exchange(new, target):
        aside = new.with_suffix(".replaced")
        target.rename(aside)
        try:
            new.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir() and not path.is_symlink():
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # folders cannot be opened elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

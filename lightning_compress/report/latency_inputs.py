"""Checks and prepares what `latency` times: opens folders, refuses impossible shapes, draws batches."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.quantized_parts import QuantizedEmbedding

__all__ = [
    "CLOCKS",
    "DTYPES",
    "check_clock",
    "check_lengths",
    "check_lists",
    "check_numbers",
    "load_any",
    "name_folders",
    "random_batch",
]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names accepted for `dtypes`."""

CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
"""Names accepted for `clock`, and what reads each, in nanoseconds."""


def load_any(directory: str | Path) -> nn.Module:
    """Open a model folder, compressed by this library or not, in fp32 and without the network.

    Args:
        directory: Folder written by `save_pretrained`.

    Returns:
        A sequence classifier, a causal language model or else the bare encoder; in eval mode.

    Raises:
        ValueError: If it is not a folder, or holds no readable `config.json`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder: give one that `save_pretrained` wrote")
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ValueError(
            f"{directory} holds no config.json, so it is not a model: give one `save_pretrained` wrote"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_path} is not JSON ({error}): save the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds a {type(config).__name__}, not settings: save the model again")
    if (config.get("quantization_config") or {}).get("quant_method") == "lightning_compress":
        from lightning_compress.deploy.load import load  # only compressed folders need it

        return load(directory, dtype=torch.float32).eval()
    auto = _auto_class(config.get("architectures") or [])
    return auto.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()


def _auto_class(architectures: Sequence[str]) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return AutoModelForSequenceClassification
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return AutoModelForCausalLM
    return AutoModel


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Name each folder by its last part, or by its whole path where two share that."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"{[str(f) for f in folders]} names a folder twice: a model held against itself shows nothing"
        )
    last = [path.name for path in paths]
    unique = len(set(last)) == len(last)
    return {name if unique else str(folder): folder for name, folder in zip(last, folders, strict=True)}


def check_lists(models: Mapping[str, Any], *lists: Sequence[Any]) -> None:
    """Refuse empty lists, repetitions, and unknown dtypes; `lists` are batch sizes, lengths and dtypes."""
    for name, values in zip(("models", "batch_sizes", "lengths", "dtypes"), (models, *lists), strict=True):
        if not values:
            raise ValueError(f"{name} is empty: give at least one")
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={list(values)} repeats an entry: give each once")
    unknown = [name for name in lists[-1] if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown dtypes {unknown}: choose from {list(DTYPES)}")


def check_numbers(batch_sizes: Sequence[int], lengths: Sequence[int], **numbers: int) -> None:
    """Refuse any number below 1, by its name."""
    named = (
        [("batch_sizes", n) for n in batch_sizes] + [("lengths", n) for n in lengths] + list(numbers.items())
    )
    for name, number in named:
        if number < 1:
            raise ValueError(f"{name} holds {number}: give whole numbers of at least 1")


def check_clock(clock: str, threads: int, device: str) -> None:
    """Refuse unknown clocks, and processor time where it would not be a latency."""
    if clock not in CLOCKS:
        raise ValueError(f"unknown clock {clock!r}: choose from {list(CLOCKS)}")
    if clock == "cpu" and (threads != 1 or torch.device(device).type != "cpu"):
        raise ValueError(
            f"clock='cpu' adds up the time of all threads, so with {threads} thread(s) on {device!r} it is "
            "no latency: use threads=1 and device='cpu', or clock='wall'"
        )


def check_lengths(name: str, model: nn.Module, lengths: Sequence[int]) -> None:
    """Refuse lengths for which there are no positions; RoBERTa's table holds padding_idx + 1 rows more."""
    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise TypeError(
            f"{name!r} is a {type(model).__name__} without config.vocab_size: give a transformers model"
        )
    limit = getattr(config, "max_position_embeddings", None)
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding | QuantizedEmbedding):
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    if limit is not None and max(lengths) > limit:
        raise ValueError(
            f"lengths holds {max(lengths)}, but {name!r} has {limit} positions: give at most {limit}"
        )


def random_batch(
    models: Mapping[str, nn.Module], batch_size: int, length: int, seed: int, device: str
) -> dict[str, Tensor]:
    """Ids that every model knows, none of them padding: int32 [batch_size, length], and a mask of ones."""
    configs: list[Any] = [model.config for model in models.values()]
    vocabulary = min(config.vocab_size for config in configs)
    padding = {getattr(config, "pad_token_id", None) for config in configs}
    allowed = torch.tensor([token for token in range(vocabulary) if token not in padding], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(allowed), (batch_size, length), generator=generator)
    mask = torch.ones(batch_size, length, dtype=torch.int64)
    return {"input_ids": allowed[picks].to(device), "attention_mask": mask.to(device)}

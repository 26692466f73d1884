"""``LanguageModelingData``: plain text files, tokenised, joined and cut into blocks of equal length.

The next chapter is :mod:`lightning_compress.tasks.causal_language_model`, the module that learns from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_compress.data.embedded import resolve_pretrained
from lightning_compress.data.resumable import ResumableDataLoader, ResumableDataModule
from lightning_compress.data.sampling import LengthBucketedSampler

__all__ = ["LanguageModelingData", "TokenBlocks", "pack_blocks", "split_documents"]


class TokenBlocks(Dataset):
    """Blocks of token ids; labels are the same ids (the model shifts them).

    Args:
        blocks_NT: Token ids ``[blocks, block_size]``.
    """

    def __init__(self, blocks_NT: Tensor) -> None:
        self.blocks_NT = blocks_NT

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.blocks_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one block as ``input_ids`` and ``labels``, each ``[block_size]``."""
        return {"input_ids": self.blocks_NT[index], "labels": self.blocks_NT[index]}


def split_documents(text: str, separator: str | None) -> list[str]:
    r"""Cut a text at the lines that equal the separator; empty documents are left out.

    Args:
        text: Whole content of a file.
        separator: The line between documents, or None if the text is one document.

    Example:
        >>> split_documents("One.\n<|endoftext|>\nTwo.\n", "<|endoftext|>")
        ['One.', 'Two.']
    """
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if separator is not None and line.strip() == separator:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ("\n".join(lines).strip("\n") for lines in documents)
    return [document for document in joined if document.strip()]


def pack_blocks(documents: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Tensor:
    """Tokenise documents, join them, each opened by the beginning-of-text token, and cut blocks.

    A tokenizer without such a token marks the border by its end-of-text token, or, without that, not at all.
    What does not fill the last block is left out.

    Args:
        documents: Texts.
        tokenizer: Any fast tokenizer.
        block_size: Tokens per block.

    Returns:
        Token ids ``[blocks, block_size]``; possibly no block.
    """
    border = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    opening = [] if border is None else [border]
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    stream = [token for ids in encoded["input_ids"] for token in (*opening, *ids)]  # type: ignore[misc]
    whole = len(stream) - len(stream) % block_size
    return torch.tensor(stream[:whole], dtype=torch.long).view(-1, block_size)


class LanguageModelingData(ResumableDataModule):
    """Text files for :class:`~lightning_compress.tasks.CausalLanguageModel` or a module of your own.

    Batches are dicts of ``input_ids`` and ``labels``, integers ``[batch, block_size]``. There is no padding
    and no mask: a block may hold the end of one document and the beginning of the next.

    Args:
        tokenizer: Folder or hub name of the tokenizer. Must fit the model.
        train: Text file, or several, to learn from.
        validation: Text file to validate on; if there is none, the last ``validation_ratio`` of the training
            blocks.
        test: Text file to test on.
        block_size: Tokens per block, at least 2.
        separator: The line that stands between documents; None if each file is one document.
        batch_size: Blocks per batch and device.
        limit_train: Learn from so many blocks only, chosen by ``seed``.
        validation_ratio: Share of the training blocks to validate on where there is no file, in [0, 1).
        seed: Decides the subset and the order of batches.
        num_workers: Worker processes per loader. The blocks are in memory: 0 is usually fastest.
    """

    def __init__(
        self,
        tokenizer: str,
        train: list[str] | str | None = None,
        validation: list[str] | str | None = None,
        test: list[str] | str | None = None,
        block_size: int = 256,
        separator: str | None = "<|endoftext|>",
        batch_size: int = 16,
        limit_train: int | None = None,
        validation_ratio: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer_name = tokenizer
        self.files = {
            name: [files] if isinstance(files, str) else list(files or [])
            for name, files in (("train", train), ("validation", validation), ("test", test))
        }
        self.block_size = block_size
        self.separator = separator
        self.batch_size = batch_size
        self.limit_train = limit_train
        self.validation_ratio = validation_ratio
        self.seed = seed
        self.num_workers = num_workers
        for name, least in (("block_size", 2), ("batch_size", 1), ("limit_train", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0 <= validation_ratio < 1:
            raise ValueError(f"`validation_ratio` must be in [0, 1), got {validation_ratio}.")
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._blocks: dict[str, TokenBlocks] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at the first use."""
        if self._tokenizer is None:
            source = resolve_pretrained(self.tokenizer_name, marker="tokenizer_config.json")
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise ValueError(f"`tokenizer={self.tokenizer_name!r}` cannot be loaded: {error}") from error
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows; the model must have at least as many embeddings."""
        return len(self.tokenizer)

    @override
    def setup(self, stage: str) -> None:
        """Read, tokenise and pack the files that the stage needs."""
        if stage == "test" or (stage == "validate" and self.files["validation"]):
            self._load("test" if stage == "test" else "validation")
        elif stage in ("fit", "validate"):
            self._load_training_blocks()

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        """Blocks in an order that differs between epochs, resumable in mid-epoch."""
        blocks = self._blocks["train"]
        return self.make_resumable(
            ResumableDataLoader(
                blocks, seed=self.seed, sampler=self._sampler(blocks, True), **self._options()
            )
        )

    @override
    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Blocks in the order of the file; an empty list if there is no validation part."""
        return self._eval_loader("validation") if "validation" in self._blocks else []

    @override
    def test_dataloader(self) -> DataLoader:
        """Blocks in the order of the file."""
        return self._eval_loader("test")

    def _eval_loader(self, name: str) -> DataLoader:
        blocks = self._blocks[name]
        return DataLoader(blocks, sampler=self._sampler(blocks, False), **self._options())

    def _sampler(self, blocks: TokenBlocks, shuffle: bool) -> LengthBucketedSampler:
        num_ranks, rank = self.ranks
        lengths = [self.block_size] * len(blocks)
        return LengthBucketedSampler(
            lengths,
            self.batch_size,
            shuffle=shuffle,
            bucket=False,
            seed=self.seed,
            num_replicas=num_ranks,
            rank=rank,
        )

    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "num_workers": self.num_workers}

    def _load_training_blocks(self) -> None:
        train_NT = self._load("train").blocks_NT
        if self.files["validation"]:
            self._load("validation")
        elif self.validation_ratio > 0:
            share = min(max(round(len(train_NT) * self.validation_ratio), 1), len(train_NT) - 1)
            if share < 1:
                raise ValueError(
                    f"{self.files['train']} fill one block of {self.block_size} tokens: too few to split a"
                    " validation part off; give `validation=` or `validation_ratio=0`."
                )
            self._blocks["validation"] = TokenBlocks(train_NT[-share:])
            train_NT = train_NT[:-share]
        if self.limit_train is not None and self.limit_train < len(train_NT):
            rows = np.random.default_rng(self.seed).permutation(len(train_NT))[: self.limit_train]
            train_NT = train_NT[np.sort(rows)]
        self._blocks["train"] = TokenBlocks(train_NT)

    def _load(self, name: str) -> TokenBlocks:
        if not self.files[name]:
            raise ValueError(f"No {name} text: give one or more text files as `{name}=`.")
        documents = [document for path in self.files[name] for document in self._read(path, name)]
        blocks_NT = pack_blocks(documents, self.tokenizer, self.block_size)
        if not len(blocks_NT):
            raise ValueError(
                f"{self.files[name]} (`{name}`) do not fill one block of {self.block_size} tokens; lower"
                " `block_size`."
            )
        self._blocks[name] = TokenBlocks(blocks_NT)
        return self._blocks[name]

    def _read(self, path: str, name: str) -> list[str]:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"`{name}={path!r}` is not a file; give the path of a text file.")
        try:
            documents = split_documents(file.read_text(encoding="utf-8"), self.separator)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`{name}={path!r}` is not UTF-8 text ({error.reason} at byte {error.start})."
            ) from error
        if not documents:
            raise ValueError(f"`{name}={path!r}` is empty: it holds no text.")
        return documents

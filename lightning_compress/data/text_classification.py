"""``TextClassificationData``: labelled texts, single or in pairs, from wherever a user has them.

The next chapter is :mod:`lightning_compress.tasks.text_classifier`, the module that learns from them.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_compress.data.embedded import MINILM
from lightning_compress.data.encoding import EncodedTexts, PadBatch, encode_texts, load_tokenizer
from lightning_compress.data.labels import LabelSpace, infer_label_space
from lightning_compress.data.resumable import ResumableDataLoader, ResumableDataModule
from lightning_compress.data.sampling import LengthBucketedSampler
from lightning_compress.data.sources import Part, TextParts
from lightning_compress.data.stdlib_docs import STDLIB_DOCS
from lightning_compress.data.tables import column

__all__ = ["TextClassificationData"]

_PARTS_OF_STAGE = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class TextClassificationData(ResumableDataModule):
    """Texts with labels, for :class:`~lightning_compress.tasks.TextClassifier` or a module of your own.

    Batches are dicts of ``input_ids``, ``attention_mask`` and, where the tokenizer makes them,
    ``token_type_ids`` (integers ``[batch, longest]``), and ``labels`` (``[batch]``, integers; floats for
    regression). Everything that can be wrong with the data is reported by ``setup``, before training.

    Args:
        dataset: ``"stdlib-docs"`` (documentation strings of this Python's standard library, nine topics), a
            folder written by ``datasets``' ``save_to_disk``, or a name on the Hugging Face hub. Not used if
            files are given.
        dataset_config: Configuration of a hub data set.
        train: TSV, CSV, JSONL or parquet file to learn from. TSV is read without quoting.
        validation: File to validate on; if there is none, ``validation_ratio`` of the training rows are split
            off.
        test: File to test on.
        predict: File to predict on, labels not needed; the test part if there is none.
        text_column: Column with the text; several are joined by a blank.
        text_pair_column: Column with the second text of a pair.
        label_column: Column with the label: whole numbers from 0, names, or, for regression, real numbers.
        tokenizer: ``"minilm"`` (the embedded model's), a folder, or a hub name. Must fit the model.
        max_length: Longer texts are cut to this many tokens.
        batch_size: Examples per batch and device.
        limit_train: Learn from so many training rows only, chosen by ``seed``.
        validation_ratio: Share of the training rows to split off where there is no validation part, in [0,
            1); 0 validates on nothing.
        num_classes: Number of classes; found in the training part if None.
        regression: Labels are real numbers.
        seed: Decides the split, the subset and the order of batches.
        bucket_by_length: Put texts of similar length into the same batch (training, validation and test).
        num_workers: Worker processes per loader. The texts are in memory: 0 is usually fastest.

    Example:
        >>> data = TextClassificationData(train="reviews.tsv", text_column=["title", "body"], max_length=64)
        >>> data.hparams["batch_size"]
        32
    """

    def __init__(
        self,
        dataset: str = STDLIB_DOCS,
        dataset_config: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        text_column: list[str] | str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        tokenizer: str = MINILM,
        max_length: int = 128,
        batch_size: int = 32,
        limit_train: int | None = None,
        validation_ratio: float = 0.1,
        num_classes: int | None = None,
        regression: bool = False,
        seed: int = 0,
        bucket_by_length: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.text_pair_column = text_pair_column
        self.label_column = label_column
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_classes = num_classes
        self.regression = regression
        self.seed = seed
        self.bucket_by_length = bucket_by_length
        self.num_workers = num_workers
        self._check_arguments()
        self._parts = TextParts(
            {"train": train, "validation": validation, "test": test, "predict": predict},
            dataset=dataset,
            dataset_config=dataset_config,
            validation_ratio=validation_ratio,
            limit_train=limit_train,
            seed=seed,
        )
        self._encoded: dict[str, EncodedTexts] = {}
        self._label_space: LabelSpace | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at the first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
            if self.max_length > self._tokenizer.model_max_length:
                raise ValueError(
                    f"`max_length={self.max_length}` is more than the {self._tokenizer.model_max_length}"
                    f" tokens that the tokenizer {self.tokenizer_name!r} allows."
                )
        return self._tokenizer

    @property
    def label_space(self) -> LabelSpace:
        """The labels of the training part; reads it if that has not been done."""
        if self._label_space is None:
            self._label_space = self._find_label_space()
        return self._label_space

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        return self.label_space.num_labels

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their numbers, if they have names."""
        return self.label_space.names

    def lengths(self, part: str) -> list[int]:
        """Numbers of tokens, without padding, of a part's texts (part: ``"train"``, ``"test"``, …)."""
        return self._encode(part).lengths

    @override
    def prepare_data(self) -> None:
        """Harvest the standard library once per machine, so that the ranks find it in the cache."""
        self._parts.prepare()

    @override
    def setup(self, stage: str) -> None:
        """Read, check and tokenise the parts that the stage needs."""
        for name in _PARTS_OF_STAGE[stage]:
            if name == "validation" and stage == "fit" and self._parts.find(name) is None:
                continue
            self._encode(name)

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        """Batches in an order that differs between epochs, resumable in mid-epoch."""
        data = self._encode("train")
        return self.make_resumable(
            ResumableDataLoader(
                data, seed=self.seed, sampler=self._sampler(data, shuffle=True), **self._options()
            )
        )

    @override
    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches in a fixed order; an empty list if there is no validation part."""
        return self._eval_loader("validation") if self._parts.find("validation") is not None else []

    @override
    def test_dataloader(self) -> DataLoader:
        """Batches in a fixed order."""
        return self._eval_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        """Batches in the order of the file, without labels."""
        return DataLoader(self._encode("predict"), shuffle=False, **self._options())

    def _eval_loader(self, name: str) -> DataLoader:
        data = self._encode(name)
        return DataLoader(data, sampler=self._sampler(data, shuffle=False), **self._options())

    def _sampler(self, data: EncodedTexts, shuffle: bool) -> LengthBucketedSampler:
        num_ranks, rank = self.ranks
        return LengthBucketedSampler(
            data.lengths,
            self.batch_size,
            shuffle=shuffle,
            bucket=self.bucket_by_length,
            seed=self.seed,
            num_replicas=num_ranks,
            rank=rank,
        )

    def _options(self) -> dict[str, Any]:
        pad_token_id = self.tokenizer.pad_token_id
        assert isinstance(pad_token_id, int)
        side = "left" if self.tokenizer.padding_side == "left" else "right"
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": PadBatch(pad_token_id, side),
        }

    def _encode(self, name: str) -> EncodedTexts:
        """Tokenise a part once; the result is kept."""
        if name not in self._encoded:
            part = self._parts.find(name)
            if part is None:
                raise ValueError(f"There is no {name} part in {self._parts}; give a file as `{name}=`.")
            labels = None
            if name != "predict":
                values = column(part.columns, self.label_column, part.where, "label_column")
                labels = self.label_space.encode(values, part.where)
            pairs = self._texts(part, [self.text_pair_column]) if self.text_pair_column is not None else None
            texts = self._texts(part, self.text_columns)
            self._encoded[name] = encode_texts(self.tokenizer, texts, pairs, labels, self.max_length)
        return self._encoded[name]

    def _texts(self, part: Part, names: list[str]) -> list[str]:
        argument = "text_pair_column" if names == [self.text_pair_column] else "text_column"
        columns = [column(part.columns, name, part.where, argument) for name in names]
        for name, values in zip(names, columns, strict=True):
            if None in values:
                raise ValueError(
                    f"{part.where}, row {values.index(None) + 1}: the column {name!r} holds no text."
                )
        return [" ".join(str(value) for value in row) for row in zip(*columns, strict=True)]

    def _find_label_space(self) -> LabelSpace:
        if self.regression:
            return LabelSpace(1, is_regression=True)
        train = self._parts.find("train")
        if train is None:
            if self.num_classes is None:
                raise ValueError(
                    "Without a training part the classes are unknown: give `train=` or `num_classes=`."
                )
            return LabelSpace(self.num_classes)
        values = column(train.columns, self.label_column, train.where, "label_column")
        return infer_label_space(values, train.where, num_classes=self.num_classes, names=train.label_names)

    def _check_arguments(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", 4), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.num_classes is not None and (self.regression or self.num_classes < 2):
            raise ValueError(
                "`num_classes` must be at least 2 and goes without `regression=True`, got"
                f" {self.num_classes}. For regression leave it out."
            )
        if not self.text_columns:
            raise ValueError("`text_column` must name at least one column.")

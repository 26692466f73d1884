"""Compare the tokens that a token-dropping model keeps with the tokens that humans marked as their reasons.

ERASER movie reviews, cut at the model's length. At each layer the kept set of the dropping model stands beside sets of
the same size, document by document, picked by the explanations of a dense fine-tuned model: gradient saliency,
attention of the classification token in the last layer, attention rollout; and at random. Special tokens and
padding never count. A row is one dense and one dropping model; what the results file already holds is
skipped. Data are looked for in the folder named by LIGHTNING_COMPRESS_DATA, in ``movies_rationales/``.

    python benchmarks/rationales.py run --dense DENSE_DIR --dropping COMPRESSED_DIR
    python benchmarks/rationales.py table

Shape legend: B documents, T padded length, N packed rows, H heads, W words.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rows import append, provenance, rows_in
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import lightning_compress
from lightning_compress.metrics import RationaleAgreement, TokensKept
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.saliency import gradient_saliency
from lightning_compress.nn.segments import Segments, segment_softmax
from lightning_compress.runtime import PackedEncoder, packed_encoder

RESULTS = Path(__file__).parent / "results" / "rationales.jsonl"
METHODS = ("dropping", "saliency", "attention", "rollout", "random")


@dataclass(frozen=True)
class Document:
    """A review, in the model's tokens."""

    ids: list[int]
    is_special: list[bool]
    """Classification and separator tokens."""
    is_rationale: list[bool]
    """Tokens of words that humans marked."""
    label: int


@dataclass(frozen=True)
class Batch:
    """Documents padded to the longest of them."""

    inputs: dict[str, Tensor]
    valid_BT: Tensor
    rationale_BT: Tensor
    labels_B: Tensor


def read_documents(file: Path, tokenizer: Any, max_length: int) -> list[Document]:
    """Tokenise reviews, cut at ``max_length``, and bring the word spans over to the tokens."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        align(row["text"], row["rationale_spans"], int(row["label"]), tokenizer, max_length) for row in rows
    ]


def align(text: str, spans: str, label: int, tokenizer: Any, max_length: int) -> Document:
    """Mark the tokens that begin inside a marked word; ``spans`` count blank-split words, ``"2:5;7:8"``."""
    starts_W = [0, *accumulate(len(word) + 1 for word in text.split(" "))][:-1]
    marked = {word for span in spans.split(";") if span for word in range(*map(int, span.split(":")))}
    encoded = tokenizer(
        text,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    is_special = [bool(special) for special in encoded["special_tokens_mask"]]
    words = [bisect_right(starts_W, start) - 1 for start, _ in encoded["offset_mapping"]]
    is_rationale = [not special and word in marked for word, special in zip(words, is_special, strict=True)]
    return Document(encoded["input_ids"], is_special, is_rationale, label)


def batches(documents: list[Document], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Pad documents, neighbours together."""
    for first in range(0, len(documents), batch_size):
        part = documents[first : first + batch_size]
        width = max(len(document.ids) for document in part)

        def padded(rows: list[list[Any]], value: Any, width: int = width) -> Tensor:
            return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

        ids_BT = padded([document.ids for document in part], pad_token_id)
        mask_BT = padded([[1] * len(document.ids) for document in part], 0)
        yield Batch(
            inputs={"input_ids": ids_BT, "attention_mask": mask_BT},
            valid_BT=~padded([document.is_special for document in part], True),
            rationale_BT=padded([document.is_rationale for document in part], False),
            labels_B=torch.tensor([document.label for document in part]),
        )


def cls_attention(attentions: tuple[Tensor, ...]) -> Tensor:
    """Return what the classification token sees in the last layer, mean over heads, ``[B, T]``."""
    return attentions[-1].mean(dim=1)[:, 0]


def attention_rollout(attentions: tuple[Tensor, ...]) -> Tensor:
    """Return what reaches the classification token through all layers, ``[B, T]``.

    The first row of the product of all layers' row-normalised A + I, with A the mean over heads.
    """
    eye_TT = torch.eye(attentions[0].shape[-1])
    reach_BT = eye_TT[0].expand(attentions[0].shape[0], -1)
    for attention_BHTT in reversed(attentions):
        mixed_BTT = attention_BHTT.mean(dim=1).float() + eye_TT
        mixed_BTT = mixed_BTT / mixed_BTT.sum(dim=-1, keepdim=True)
        reach_BT = torch.einsum("bi,bij->bj", reach_BT, mixed_BTT)
    return reach_BT


def top_tokens(scores_BT: Tensor, valid_BT: Tensor, counts_B: Tensor) -> Tensor:
    """Return the best ``counts_B`` valid tokens of each document, the earlier one of equals, bool ``[B, T]``."""
    order_BT = scores_BT.masked_fill(~valid_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen_BT = torch.arange(scores_BT.shape[1]) < counts_B[:, None]
    return torch.zeros_like(valid_BT).scatter(1, order_BT, chosen_BT) & valid_BT


def kept_tokens(encoder: PackedEncoder, mask_BT: Tensor) -> list[Tensor]:
    """Return which tokens entered each layer of the latest pass, bool ``[B, T]``."""
    kept = []
    for segments in encoder.latest:
        keep_BT = torch.zeros(mask_BT.shape, dtype=torch.bool)
        keep_BT.view(-1)[segments.origin_N] = True
        kept.append(keep_BT)
    return kept


@contextmanager
def predicted_logits(encoder: PackedEncoder) -> Iterator[dict[int, Tensor]]:
    """Note what the predictors of the encoder's policy, if it has such, say of the rows they see, by layer."""
    logits: dict[int, Tensor] = {}
    predictors = getattr(encoder.policy, "predictors", nn.ModuleDict())

    def noting(layer: int) -> Callable[..., None]:
        return lambda module, args, output: logits.update({layer: output.squeeze(-1)})

    handles = [module.register_forward_hook(noting(int(layer))) for layer, module in predictors.items()]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def survival_scores(encoder: PackedEncoder, logits: dict[int, Tensor], mask_BT: Tensor) -> Tensor:
    """Return the number of layers each token entered, plus its share of the last decision it took part in."""
    depth_BT = torch.stack(kept_tokens(encoder, mask_BT)).sum(dim=0).float()
    share_BT = torch.zeros_like(depth_BT)
    arrived = [Segments.of(mask_BT.bool()), *encoder.latest]
    for layer in sorted(logits):
        shares_N = segment_softmax(logits[layer], arrived[layer])
        share_BT.view(-1)[arrived[layer].origin_N] = shares_N.float()
    return depth_BT + share_BT


def dropping_encoder(model: PreTrainedModel) -> PackedEncoder:
    """Return the packed encoder of a model that drops tokens."""
    encoder = packed_encoder(model)
    if encoder is None or encoder.policy is None:
        raise SystemExit("--dropping must be a model saved after token dropping; this one drops nothing")
    return encoder


def explain(
    dense: PreTrainedModel, batch: Batch, labels_B: Tensor | None, chance: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the scores of each way to explain the dense model, and its predictions ``[B]``."""
    with torch.no_grad():
        out = dense(**batch.inputs, output_attentions=True)
    scores = {
        "saliency": gradient_saliency(dense, batch.inputs, labels_B),
        "attention": cls_attention(out.attentions),
        "rollout": attention_rollout(out.attentions),
        "random": torch.rand(batch.valid_BT.shape, generator=chance),
    }
    return scores, out.logits.argmax(dim=1)


def compare(
    dense: PreTrainedModel,
    dropping: PreTrainedModel,
    documents: list[Document],
    batch_size: int,
    class_of: str,
) -> dict[str, Any]:
    """Return the agreement of every method at every layer, and the accuracies."""
    encoder, num_layers = dropping_encoder(dropping), len(describe(dropping).layers)
    agreement = [{method: RationaleAgreement() for method in METHODS} for _ in range(num_layers)]
    tokens, right = TokensKept(num_layers), {"dense": 0, "dropping": 0}
    chance = torch.Generator().manual_seed(0)
    for batch in batches(documents, batch_size, dense.config.pad_token_id):
        mask_BT = batch.inputs["attention_mask"]
        gold = batch.labels_B if class_of == "gold" else None
        scores, predicted_B = explain(dense, batch, gold, chance)
        with torch.no_grad(), predicted_logits(encoder) as logits:
            chosen_B = dropping(**batch.inputs).logits.argmax(dim=1)
        scores["dropping"] = survival_scores(encoder, logits, mask_BT)
        kept = kept_tokens(encoder, mask_BT)
        right["dense"] += int((predicted_B == batch.labels_B).sum())
        right["dropping"] += int((chosen_B == batch.labels_B).sum())
        tokens.update(torch.stack([keep_BT.sum(dim=1) for keep_BT in kept], dim=1), mask_BT.sum(dim=1))
        for metrics, keep_BT in zip(agreement, kept, strict=True):
            counts_B = (keep_BT & batch.valid_BT).sum(dim=1)
            for method, metric in metrics.items():
                same_size_BT = top_tokens(scores[method], batch.valid_BT, counts_B)
                chosen_BT = keep_BT if method == "dropping" else same_size_BT
                metric.update(chosen_BT, batch.rationale_BT, batch.valid_BT, scores[method])
    return {
        "accuracy": {name: count / len(documents) for name, count in right.items()},
        "kept": [round(share, 5) for share in tokens.compute().tolist()],
        "layers": [{method: _rounded(metric) for method, metric in metrics.items()} for metrics in agreement],
    }


def _rounded(metric: RationaleAgreement) -> dict[str, float | None]:
    """Return the values; None for what is not a number, such as the precision of a layer that keeps nothing."""
    values = {name: value.item() for name, value in metric.compute().items()}
    return {name: None if math.isnan(value) else round(value, 5) for name, value in values.items()}


def _statistics(documents: list[Document]) -> dict[str, Any]:
    valid = sum(len(document.ids) - sum(document.is_special) for document in documents)
    return {
        "documents": len(documents),
        "without_rationale": sum(not any(document.is_rationale) for document in documents),
        "rationale_share": round(sum(sum(document.is_rationale) for document in documents) / valid, 5),
    }


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def run(args: argparse.Namespace) -> None:
    """Compare one pair of models, unless the results file holds it, and append the row."""
    key = {
        "part": args.part, "max_length": args.max_length, "class_of": args.class_of,
        "dense": [args.dense.name, _digest(args.dense)],
        "dropping": [args.dropping.name, _digest(args.dropping)],
    }  # fmt: skip
    if args.limit is None and any(
        all(row[name] == value for name, value in key.items()) for row in rows_in(RESULTS)
    ):
        return
    folder = os.environ.get("LIGHTNING_COMPRESS_DATA")
    if folder is None:
        raise SystemExit("set LIGHTNING_COMPRESS_DATA to the folder that holds movies_rationales/test.tsv")
    dense = AutoModelForSequenceClassification.from_pretrained(args.dense, attn_implementation="eager").eval()
    dropping = lightning_compress.load(args.dropping).eval()
    file = Path(folder) / "movies_rationales" / f"{args.part}.tsv"
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    documents = read_documents(file, tokenizer, args.max_length)[: args.limit]
    row = {
        **key,
        **_statistics(documents),
        **compare(dense, dropping, documents, args.batch_size, args.class_of),
        **provenance(),
    }
    if args.limit is None:
        append(RESULTS, row)
    print_table([row])


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a table per row: layer by layer, the dropping model against sets of equal size."""
    for row in rows:
        accuracy = ", ".join(f"{name} {100 * value:.1f} %" for name, value in row["accuracy"].items())
        caption = (
            f"{row['documents']} documents ({row['part']}), cut at {row['max_length']} tokens, of which rationale "
            f"{100 * row['rationale_share']:.1f} %; accuracy: {accuracy}; saliency of the {row['class_of']} class; "
            f"commit {row['commit']}"
        )
        names = {
            "false_positive_rate": "FPR", "precision": "prec.", "token_f1": "F1", "iou_f1": "IoU",
            "average_precision": "AP", "auprc": "AUPRC",
        }  # fmt: skip
        title = f"{row['dropping'][0]} against {row['dense'][0]}"
        table = Table("layer", "kept", "method", *names.values(), title=title, caption=caption)
        for index, methods in enumerate(row["layers"]):
            for method, values in methods.items():
                place = [str(index + 1), f"{row['kept'][index]:.3f}"] if method == METHODS[0] else ["", ""]
                table.add_row(*place, method, *(_shown(values[name]) for name in names))
            table.add_section()
        Console().print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--dense", type=Path, required=True, help="folder of the fine-tuned dense model")
    running.add_argument("--dropping", type=Path, required=True, help="folder of the token-dropping model")
    running.add_argument("--part", default="test", choices=["test", "dev"])
    running.add_argument("--max-length", type=int, default=512)
    running.add_argument("--batch-size", type=int, default=4)
    running.add_argument("--class-of", default="predicted", choices=["predicted", "gold"])
    running.add_argument("--limit", type=int, help="first documents only; prints, and keeps no row")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    else:
        print_table(rows_in(RESULTS))


if __name__ == "__main__":
    main()

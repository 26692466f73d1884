"""Fine-tune an encoder with ContributionTokenDropping, and say how many tokens it still reads.

    python examples/contribution_token_dropping.py --steps 400 --target-flops 0.5

Without options it needs no network: the encoder is the embedded all-MiniLM-L6-v2, the texts are the
documentation strings of the Python that runs it.

Shape legend: B texts, L layers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_compress import CompressionReport, ContributionTokenDropping, load, save_pretrained
from lightning_compress.data import TextClassificationData
from lightning_compress.nn.kept_flops import count_kept_flops
from lightning_compress.runtime import packed_encoder
from lightning_compress.tasks import TextClassifier

__all__ = ["main", "measure", "options", "train"]


def train(args: argparse.Namespace, data: TextClassificationData) -> Path:
    """Fine-tune, let tokens go, and save; returns the folder of the compressed model.

    Args:
        args: What :func:`options` read.
        data: The texts.
    """
    seed_everything(0)
    module = TextClassifier(args.model, learning_rate=1e-4)  # your own LightningModule goes here, as it is
    trainer = Trainer(
        max_steps=args.steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[
            ContributionTokenDropping(target_flops=args.target_flops),  # the one line that compresses
            CompressionReport(str(args.output / "report"), lengths=[args.max_length]),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data)
    return save_pretrained(module, args.output / "model", tokenizer=data.tokenizer)


@torch.inference_mode()
def measure(folder: Path, data: TextClassificationData) -> str:
    """Run the saved model over the validation texts and return what it kept, in words.

    Args:
        folder: Where the model is.
        data: The texts.
    """
    model = load(folder).eval()
    encoder = packed_encoder(model)
    assert encoder is not None, "token dropping leaves a packed encoder behind"
    kept, lengths = [], []
    data.setup("validate")
    batches: Any = data.val_dataloader()
    for batch in batches:
        model(**batch)
        kept.append(torch.stack([segments.lengths_B for segments in encoder.latest], dim=1))
        lengths.append(batch["attention_mask"].sum(dim=1))
    kept_BL, lengths_B = torch.cat(kept), torch.cat(lengths)
    all_BL = lengths_B[:, None].expand_as(kept_BL)
    spent = count_kept_flops(model, kept_BL, lengths_B).sum()
    dense = count_kept_flops(model, all_BL, lengths_B, policy_flops_per_token=0).sum()
    layers = ", ".join(f"{share:.0%}" for share in kept_BL.sum(dim=0) / lengths_B.sum())
    return (
        f"{len(lengths_B)} validation texts: {float(kept_BL.sum() / all_BL.sum()):.1%} of the tokens kept "
        f"({layers} layer by layer), {float(spent / dense):.1%} of the FLOPs"
    )


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: Words after the script's name; None means ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(description="Fine-tune an encoder and learn which tokens may leave.")
    parser.add_argument("--model", default="minilm", help="minilm, a folder with a tokenizer, or a hub name.")
    parser.add_argument(
        "--train-file", help="TSV, CSV, JSONL or parquet with text and label; or embedded texts."
    )
    parser.add_argument("--max-length", type=int, default=64, help="Longer texts are cut to so many tokens.")
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps.")
    parser.add_argument("--target-flops", type=float, default=0.5, help="Share of the FLOPs to spend.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/contribution_token_dropping"), help="Where to write."
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say what the model on disk keeps."""
    args = options(arguments)
    data = TextClassificationData(train=args.train_file, tokenizer=args.model, max_length=args.max_length)
    folder = train(args, data)
    print(f"{folder}: {measure(folder, data)}")


if __name__ == "__main__":
    main()

"""Fine-tune an encoder with an exit after every layer, and see how far texts go.

    python examples/multi_exit.py --steps 400 --max-drop 0.01

Without options it needs no network: the encoder is the embedded all-MiniLM-L6-v2, the texts are the
documentation strings of the Python that runs it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_compress import CompressionReport, MultiExit, load, save_pretrained, sweep_exit_threshold
from lightning_compress.data import TextClassificationData
from lightning_compress.runtime.exit_dial import ExitPoint
from lightning_compress.tasks import TextClassifier

__all__ = ["main", "options", "train"]


def train(args: argparse.Namespace, data: TextClassificationData) -> Path:
    """Fine-tune, choose a threshold, and save; returns the folder of the model.

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
            MultiExit(max_drop=args.max_drop, rule=args.rule),  # the one callback that adds exits
            CompressionReport(str(args.output / "report"), lengths=[args.max_length]),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data)
    return save_pretrained(module, args.output / "model", tokenizer=data.tokenizer)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: Words after the script's name; None means ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(description="Fine-tune an encoder whose easy texts leave early.")
    parser.add_argument("--model", default="minilm", help="minilm, a folder with a tokenizer, or a hub name.")
    parser.add_argument(
        "--train-file", help="TSV, CSV, JSONL or parquet with text and label; or embedded texts."
    )
    parser.add_argument("--max-length", type=int, default=64, help="Longer texts are cut to so many tokens.")
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps.")
    parser.add_argument("--max-drop", type=float, default=0.01, help="Loss of accuracy that is acceptable.")
    parser.add_argument("--rule", default="entropy", help="entropy, max_prob, margin, patience or learned.")
    parser.add_argument("--output", type=Path, default=Path("runs/multi_exit"), help="Where to write.")
    return parser.parse_args(arguments)


def say(point: ExitPoint) -> str:
    """Put a threshold into words."""
    return (
        f"threshold {point.threshold:.3g}: {point.mean_depth:.2f} layers on average, {point.flops_ratio:.1%} of the "
        f"FLOPs, accuracy {point.score:.1%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say what the model on disk does at several thresholds, from nobody leaving to everybody."""
    args = options(arguments)
    data = TextClassificationData(train=args.train_file, tokenizer=args.model, max_length=args.max_length)
    folder = train(args, data)
    data.setup("validate")
    for point in sweep_exit_threshold(load(folder), list(data.val_dataloader())):
        print(f"{folder}: {say(point)}")


if __name__ == "__main__":
    main()

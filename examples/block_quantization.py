"""Fine-tune an encoder, hold its weights in blocks of few bits, and see what that costs.

    python examples/block_quantization.py --steps 400 --preset w4a8 --start 0.5

Without options it needs no network: the encoder is the embedded all-MiniLM-L6-v2, the texts are the
documentation strings of the Python that runs it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_compress import BlockQuantization, CompressionReport, load, save_pretrained
from lightning_compress.data import TextClassificationData
from lightning_compress.deploy import disk_bytes
from lightning_compress.nn.flops import count_parameters
from lightning_compress.tasks import TextClassifier

__all__ = ["main", "options", "train"]


def train(args: argparse.Namespace, data: TextClassificationData) -> Path:
    """Fine-tune, quantise and save; returns the folder of the model.

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
            BlockQuantization(preset=args.preset, start=args.start),  # the one callback that rounds
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
    parser = argparse.ArgumentParser(description="Fine-tune an encoder and hold it in few bits.")
    parser.add_argument("--model", default="minilm", help="minilm, a folder with a tokenizer, or a hub name.")
    parser.add_argument(
        "--train-file", help="TSV, CSV, JSONL or parquet with text and label; or embedded texts."
    )
    parser.add_argument("--max-length", type=int, default=64, help="Longer texts are cut to so many tokens.")
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps.")
    parser.add_argument("--preset", default="w8a8", help="w8a8, w4a8, w4a4 or w8.")
    parser.add_argument(
        "--start", type=float, default=1.0, help="Share of training after which it sees the rounding."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/block_quantization"), help="Where to write."
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say how large the model on disk is."""
    args = options(arguments)
    data = TextClassificationData(train=args.train_file, tokenizer=args.model, max_length=args.max_length)
    folder = train(args, data)
    held, numbers = disk_bytes(folder), count_parameters(load(folder)).total
    print(
        f"{folder}: {held:,} bytes of weights on disk, {8 * held / numbers:.2f} bits for each of {numbers:,}"
    )


if __name__ == "__main__":
    main()

"""Fine-tune an encoder with BottleneckTokenDropping, and turn the dial of what is left.

    python examples/bottleneck_token_dropping.py --steps 400 --target-flops 0.5

Without options it needs no network: the encoder is the embedded all-MiniLM-L6-v2, the texts are the
documentation strings of the Python that runs it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_compress import BottleneckTokenDropping, CompressionReport, load, save_pretrained
from lightning_compress.data import TextClassificationData
from lightning_compress.runtime.dial import DialPoint, sweep_threshold_scale
from lightning_compress.tasks import TextClassifier

__all__ = ["main", "options", "train"]

DIAL = (0.0, 0.5, 1.0, 2.0)
"""0 drops nothing, 1 is as trained, larger drops more."""


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
            BottleneckTokenDropping(  # the one callback that compresses
                target_flops=args.target_flops, sampler_width=args.sampler_width, warmup=0.3, ramp_end=0.8
            ),
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
    parser = argparse.ArgumentParser(description="Fine-tune an encoder and learn which tokens may leave.")
    parser.add_argument("--model", default="minilm", help="minilm, a folder with a tokenizer, or a hub name.")
    parser.add_argument(
        "--train-file", help="TSV, CSV, JSONL or parquet with text and label; or embedded texts."
    )
    parser.add_argument("--max-length", type=int, default=64, help="Longer texts are cut to so many tokens.")
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps.")
    parser.add_argument("--target-flops", type=float, default=0.5, help="Share of the FLOPs to spend.")
    parser.add_argument("--sampler-width", type=int, default=64, help="Neurons of each sampler.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bottleneck_token_dropping"), help="Where to write."
    )
    return parser.parse_args(arguments)


def say(point: DialPoint) -> str:
    """Put a setting of the dial into words."""
    kept = sum(point.tokens_kept_L) / len(point.tokens_kept_L)
    return (
        f"dial at {point.scale:g}: {kept:.1%} of the tokens kept, {point.flops_ratio:.1%} of the FLOPs, "
        f"accuracy {point.score:.1%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say what the model on disk does at several settings of its dial."""
    args = options(arguments)
    data = TextClassificationData(train=args.train_file, tokenizer=args.model, max_length=args.max_length)
    folder = train(args, data)
    data.setup("validate")
    for point in sweep_threshold_scale(load(folder), list(data.val_dataloader()), DIAL):
        print(f"{folder}: {say(point)}")


if __name__ == "__main__":
    main()

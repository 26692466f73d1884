"""Fine-tune an encoder, and let the result hold it up while its layers become thin.

    python examples/distillation.py --steps 400

Without options it needs no network: the encoder is the embedded all-MiniLM-L6-v2, the texts are the
documentation strings of the Python that runs it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_compress import CompressionReport, Distillation, SoftThresholdRank, load, save_pretrained
from lightning_compress.data import TextClassificationData
from lightning_compress.nn.flops import count_parameters
from lightning_compress.tasks import TextClassifier

__all__ = ["main", "options", "train"]

TAUGHT_FROM = 0.4
"""Share of training after which the model is its own teacher, and begins to lose ranks."""


def train(args: argparse.Namespace) -> Path:
    """Fine-tune, compress under a teacher and save; returns the folder of the compressed model.

    Args:
        args: What :func:`options` read.
    """
    seed_everything(0)
    data = TextClassificationData(train=args.train_file, tokenizer=args.model, max_length=args.max_length)
    module = TextClassifier(args.model, learning_rate=2e-4)  # your own LightningModule goes here, as it is
    trainer = Trainer(
        max_steps=args.steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[
            SoftThresholdRank(target_params=args.target_params, warmup=TAUGHT_FROM, search_end=0.6),
            Distillation(teacher=args.teacher, start=TAUGHT_FROM),  # the one line that teaches
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
    parser = argparse.ArgumentParser(description="Fine-tune an encoder and compress it under a teacher.")
    parser.add_argument("--model", default="minilm", help="minilm, a folder with a tokenizer, or a hub name.")
    parser.add_argument("--teacher", default="self", help="self, or the folder of a fine-tuned model.")
    parser.add_argument(
        "--train-file", help="TSV, CSV, JSONL or parquet with text and label; or embedded texts."
    )
    parser.add_argument("--max-length", type=int, default=64, help="Longer texts are cut to so many tokens.")
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps.")
    parser.add_argument("--target-params", type=float, default=0.5, help="Share of linear weights to keep.")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"), help="Where to write.")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say what is on disk: nothing of the teacher."""
    folder = train(options(arguments))
    parameters = count_parameters(load(folder))
    print(f"{folder}: {parameters.linear:,} linear weights, {parameters.total:,} parameters in all")


if __name__ == "__main__":
    main()

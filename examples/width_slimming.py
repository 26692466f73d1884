"""Fine-tune an encoder with WidthSlimming, and say how wide its layers are in the end.

    python examples/width_slimming.py --steps 400 --target-params 0.5

Without options it needs no network: the encoder is the embedded all-MiniLM-L6-v2, the texts are the
documentation strings of the Python that runs it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_compress import CompressionReport, WidthSlimming, load, save_pretrained
from lightning_compress.data import TextClassificationData
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_parameters
from lightning_compress.tasks import TextClassifier

__all__ = ["main", "options", "train"]


def train(args: argparse.Namespace) -> Path:
    """Fine-tune, slim and save; returns the folder of the compressed model.

    Args:
        args: What :func:`options` read.
    """
    seed_everything(0)
    data = TextClassificationData(train=args.train_file, tokenizer=args.model, max_length=args.max_length)
    module = TextClassifier(args.model, learning_rate=1e-4)  # your own LightningModule goes here, as it is
    trainer = Trainer(
        max_steps=args.steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[
            WidthSlimming(  # the one callback that compresses
                target_params=args.target_params, scope=args.scope, ranking=args.ranking, start=0.2
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
    parser = argparse.ArgumentParser(description="Fine-tune an encoder and make its layers narrower.")
    parser.add_argument("--model", default="minilm", help="minilm, a folder with a tokenizer, or a hub name.")
    parser.add_argument(
        "--train-file", help="TSV, CSV, JSONL or parquet with text and label; or embedded texts."
    )
    parser.add_argument("--max-length", type=int, default=64, help="Longer texts are cut to so many tokens.")
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps.")
    parser.add_argument("--target-params", type=float, default=0.5, help="Share of parameters to keep.")
    parser.add_argument("--scope", default="encoder", help="Of what: linear, encoder or total.")
    parser.add_argument("--ranking", default="uniform", help="uniform, or global: layers may differ.")
    parser.add_argument("--output", type=Path, default=Path("runs/width_slimming"), help="Where to write.")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say what is on disk."""
    folder = train(options(arguments))
    model = load(folder)
    parameters = count_parameters(model)
    print(f"{folder}: {parameters.encoder:,} parameters in the layers, {parameters.total:,} in all")
    for layer in describe(model).layers:
        print(f"layer {layer.index}: {layer.num_heads} heads, {layer.intermediate_size} neurons")


if __name__ == "__main__":
    main()

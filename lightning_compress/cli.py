"""The command line: a LightningCLI for training runs, and four commands of our own.

``lightning-compress fit|validate|test|predict --config run.yaml`` is Lightning's own command line with this
package's tasks, data and callbacks known by their short names. ``demo``, ``report``, ``bench`` and ``export`` are ours.
"""

# ruff: noqa: E402
from __future__ import annotations

import logging

# Imported by peft, bitsandbytes tells of kernels that nobody asked for, before any command has run.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn
from typing_extensions import override

from lightning_compress import __version__
from lightning_compress.callbacks import CompressedModelCheckpoint, CompressionReport, SoftThresholdRank
from lightning_compress.callbacks.session import session_of
from lightning_compress.data import LanguageModelingData, TextClassificationData
from lightning_compress.demo import run_demo
from lightning_compress.deploy import plan_of, save_pretrained
from lightning_compress.deploy.export import EXTRA, Runtime, export_onnx
from lightning_compress.deploy.text_counts import counts_on_texts
from lightning_compress.report import render_run, run_bench
from lightning_compress.report.latency_inputs import load_any
from lightning_compress.runtime import packed_encoder
from lightning_compress.tasks import CausalLanguageModel, TextClassifier

__all__ = ["CompressionCLI", "main"]

USAGE = """\
usage: lightning-compress COMMAND ...

Compress transformers while they fine-tune.

training runs (Lightning's command line; each takes --config run.yaml and --help):
  fit          train, and compress where the configuration lists a compression callback
  validate     evaluate on the validation part
  test         evaluate on the test part
  predict      predict

others:
  demo         fine-tune a real encoder dense and compressed, and print what was gained
  report       render the page of a finished run anew from its report.json
  bench        time saved models against each other, interleaved
  export       write a saved model as ONNX, with fixed shapes

  --help       show this text (COMMAND --help for one command)
  --version    show the version
"""

_KNOWN_BY_SHORT_NAME = (
    CausalLanguageModel,
    CompressedModelCheckpoint,
    CompressionReport,
    LanguageModelingData,
    SoftThresholdRank,
    TextClassificationData,
    TextClassifier,
)


class CompressionCLI(LightningCLI):
    """LightningCLI with this package's defaults; after ``fit`` a compressed model is saved as a folder."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--output``, defaults for model and data, and what the model takes from the data."""
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="Folder for the compressed model (default: LOG_DIR/model).",
        )
        parser.set_defaults(
            {"model": {"class_path": "TextClassifier"}, "data": {"class_path": "TextClassificationData"}}
        )
        for name in ("num_labels", "label_names"):
            parser.link_arguments("data", f"model.init_args.{name}", _reader(name), apply_on="instantiate")

    def after_fit(self) -> None:
        """Save a converted model, its tokenizer and its card, or say why there is none."""
        root = self.trainer.log_dir or self.trainer.default_root_dir  # asks all ranks
        output = self._get(self.config, "output")
        folder = Path(output or Path(root) / "model")
        if not self.trainer.is_global_zero:
            return
        session = session_of(self.model)
        compressor = None if session is None else session.compressor
        if compressor is not None and not compressor.is_converted:
            print(
                f"Nothing is saved in {folder}: the model is in training form. Leave convert=False out to convert it"
            )
            return
        model = self.model if compressor is None else compressor.model
        if _is_compressed(model):
            save_pretrained(model, folder, tokenizer=getattr(self.datamodule, "tokenizer", None))
            print(f"The compressed model is in {folder}")
        elif output is not None:
            print(f"Nothing is saved in {folder}: no compression callback is in trainer.callbacks")


def _is_compressed(module: nn.Module) -> bool:
    try:
        return plan_of(module) is not None
    except ValueError:  # no transformer inside, or more than one
        return False


def _reader(name: str) -> Any:
    def read(data: Any) -> Any:
        value = getattr(data, name, None)
        return list(value) if isinstance(value, tuple) else value

    return read


def report_parser() -> ArgumentParser:
    """Return the parser of ``lightning-compress report``."""
    parser = ArgumentParser(prog="lightning-compress report", description="Render a run's page anew.")
    parser.add_argument("run_dir", type=str, help="Folder that holds report.json, directly or beneath it.")
    return parser


def bench_parser() -> ArgumentParser:
    """Return the parser of ``lightning-compress bench``."""
    parser = ArgumentParser(
        prog="lightning-compress bench", description="Time saved models against each other."
    )
    parser.add_argument("model_dir", type=str, help="Folder of the model, compressed or dense.")
    parser.add_argument("--against", type=str, nargs="+", required=True, help="Folders to compare with.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="Sequences per batch.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128], help="Tokens per sequence.")
    parser.add_argument("--dtypes", type=str, nargs="+", default=["fp32", "bf16"], help="Number formats.")
    parser.add_argument("--rounds", type=int, default=21, help="Timed passes of each model, in turns.")
    parser.add_argument("--threads", type=int | None, default=None, help="Threads inside an operator.")
    parser.add_argument(
        "--backend", type=str | None, default=None, help="Engine of quantised linears, such as auto or int8."
    )
    parser.add_argument("--json", type=str | None, default=None, help="Also write the table to this file.")
    return parser


def demo_parser() -> ArgumentParser:
    """Return the parser of ``lightning-compress demo``."""
    parser = ArgumentParser(
        prog="lightning-compress demo", description="Fine-tune dense and compressed, and compare."
    )
    parser.add_argument("--steps", type=int, default=300, help="Optimizer steps of each of the two runs.")
    parser.add_argument(
        "--target-params", type=float, default=0.5, help="Share of linear weights to keep, in (0, 1]."
    )
    parser.add_argument("--output", type=str, default="demo-output", help="Folder for models and report.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of both runs.")
    return parser


def export_parser() -> ArgumentParser:
    """Return the parser of ``lightning-compress export``."""
    parser = ArgumentParser(
        prog="lightning-compress export", description="Write a saved model as ONNX, with fixed shapes."
    )
    parser.add_argument("model_dir", type=str, help="Folder of the model, compressed or dense.")
    parser.add_argument("--format", type=Literal["onnx"], default="onnx", help="What to write.")
    parser.add_argument("--length", type=int, default=128, help="Tokens per text, padding included.")
    parser.add_argument("--exit", type=int | None, default=None, help="Layer, from 0, whose exit answers.")
    parser.add_argument("--int8", action="store_true", help="Write the weights of layers and tables in int8.")
    parser.add_argument(
        "--runtime", type=Runtime, default="onnxruntime", help="Where an int8 file is to be fast."
    )
    parser.add_argument(
        "--texts", type=str | None, default=None, help="Typical texts, one per line, to count kept tokens on."
    )
    parser.add_argument(
        "--quantile", type=float, default=0.95, help="Share of these texts that keeps all it would."
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=None, help="Instead: tokens that enter each layer."
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="File to write (default: MODEL_DIR/model.onnx)."
    )
    return parser


def _report(args: Namespace) -> None:
    print(render_run(args.run_dir))


def _bench(args: Namespace) -> None:
    shapes = (args.batch_sizes, args.lengths, args.dtypes)
    run_bench(
        args.model_dir, args.against, *shapes, args.rounds, args.threads, args.json, backend=args.backend
    )


def _demo(args: Namespace) -> None:
    run_demo(steps=args.steps, target_params=args.target_params, output=Path(args.output), seed=args.seed)


def _export(args: Namespace) -> None:
    if args.texts is not None and args.counts is not None:
        raise ValueError("--texts and --counts both say how many tokens to keep: give one of them")
    model, counts = load_any(args.model_dir), args.counts
    if args.texts is not None:
        counts = counts_on_texts(
            model, args.model_dir, args.texts, length=args.length, quantile=args.quantile
        )
        print(f"Tokens that enter each layer: {' '.join(map(str, counts))}")
    encoder = packed_encoder(model)
    if encoder is not None and encoder.exits is not None and args.exit is None:
        print(
            "Exits are left out, as shapes in ONNX are fixed: every text runs all layers (--exit names one)"
        )
    target = args.output or Path(args.model_dir) / "model.onnx"
    form: Any = {"exit_layer": args.exit, "int8": args.int8, "runtime": args.runtime}
    print(export_onnx(model, target, length=args.length, counts=counts, **form))


_OWN = {
    "report": (report_parser, _report),
    "bench": (bench_parser, _bench),
    "demo": (demo_parser, _demo),
    "export": (export_parser, _export),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors that the user can mend are printed without a traceback.

    Args:
        arguments: Words after the program's name; None means ``sys.argv[1:]``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    if words[0] == "--version":
        print(__version__)
        return
    if words[0] in _OWN:
        make_parser, run = _OWN[words[0]]
        args = make_parser().parse_args(words[1:])
        with _one_line_for_what_the_user_can_mend():
            run(args)
        return
    with _one_line_for_what_the_user_can_mend():
        CompressionCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            args=arguments if arguments is None else words,
        )


@contextmanager
def _one_line_for_what_the_user_can_mend() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f"error: {error}")
    except (ValueError, FileNotFoundError) as error:
        is_wrapped = str(error).startswith("Call to compute_fn of link")  # jsonargparse's, around any error
        cause = error.__cause__ if is_wrapped else error
        if not isinstance(cause, ValueError | FileNotFoundError):
            raise
        sys.exit(f"error: {cause}")


if __name__ == "__main__":
    main()

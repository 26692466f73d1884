"""Compress small decoders and append perplexities to a results file: a pretrained Llama, a GPT-2 and a Mamba.

The Llama (stories260k) is pretrained; the GPT-2 and the Mamba are trained from scratch for as many steps as every
later run gets. ``base`` is what compression starts from; ``dense`` goes on without it for the same steps. After
saving, each compressed model is opened again and has to generate the same tokens. LIGHTNING_COMPRESS_LLAMA names the
folder of the pretrained Llama and its tokenizer, LIGHTNING_COMPRESS_DATA the one that holds tinystories_sample/.

    python benchmarks/language_models.py --families llama gpt2 mamba --variants base dense rank50 uniform50
    python benchmarks/language_models.py --table
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

import lightning_compress
from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.data import LanguageModelingData
from lightning_compress.deploy import disk_bytes
from lightning_compress.nn.flops import count_parameters
from lightning_compress.report import describe_machine, describe_versions
from lightning_compress.tasks import CausalLanguageModel

DATA, LLAMA = (os.environ.get(name, "") for name in ("LIGHTNING_COMPRESS_DATA", "LIGHTNING_COMPRESS_LLAMA"))
RESULTS = Path(__file__).parent / "results" / "language_models.jsonl"
MODELS = Path("runs") / "benchmarks" / "language_models"
STEPS, BLOCK, BATCH, LEARNING_RATE = 400, 64, 16, 1e-3

TOKENS = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
SCRATCH: dict[str, dict[str, Any]] = {
    "gpt2": {
        **TOKENS,
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "mamba": {**TOKENS, "hidden_size": 128, "num_hidden_layers": 4, "state_size": 8},
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "dense": None,
    "rank50": {"target_params": 0.5, "rank_multiple": 4},
    "uniform50": {"target_params": 0.5, "rank_multiple": 4, "allocation": "uniform"},
}


def data() -> LanguageModelingData:
    """Return TinyStories in blocks of tokens; the validation file is the test part."""
    stories = Path(DATA) / "tinystories_sample"
    return LanguageModelingData(
        tokenizer=LLAMA,
        train=str(stories / "train.txt"),
        test=str(stories / "valid.txt"),
        block_size=BLOCK,
        batch_size=BATCH,
    )


def start_of(family: str, variant: str) -> str:
    """Return the folder that a run starts from; a bare configuration for a base from scratch."""
    if variant != "base":
        return str(MODELS / f"{family}-base")
    if family == "llama":
        return LLAMA
    folder = MODELS / f"{family}-config"
    CONFIG_MAPPING[family](**SCRATCH[family]).save_pretrained(folder)
    return str(folder)


def run(family: str, variant: str) -> dict[str, Any]:
    """Train (but for the pretrained base), test, save, open again, and return the row."""
    seed_everything(0)
    settings = VARIANTS[variant]
    callbacks: list[Callback] = [] if settings is None else [SoftThresholdRank(**settings)]
    steps = 0 if (family, variant) == ("llama", "base") else STEPS
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, limit_val_batches=0,
    )  # fmt: skip
    module, corpus = CausalLanguageModel(start_of(family, variant), learning_rate=LEARNING_RATE), data()
    if steps:
        trainer.fit(module, datamodule=corpus)
    (metrics,) = trainer.test(module, datamodule=corpus, verbose=False)
    folder, model = MODELS / f"{family}-{variant}", module.model
    assert model is not None
    if settings is None:
        model.save_pretrained(folder)
    else:
        lightning_compress.save_pretrained(model, folder, tokenizer=corpus.tokenizer)
        check_generation(model, folder, corpus.tokenizer)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    counted = count_parameters(model)
    return {
        "family": family,
        "variant": variant,
        "steps": steps,
        "perplexity": metrics["test/perplexity"],
        "parameters": {scope: getattr(counted, scope) for scope in ("linear", "encoder", "total")},
        "weight_bytes": disk_bytes(folder),
        "commit": commit.stdout.strip(),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def check_generation(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless the saved model generates what the live one does."""
    prompt = tokenizer("Once upon a time, there was a little", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    models = model.eval(), lightning_compress.load(folder)
    live, saved = (m.generate(prompt, **settings) for m in models)  # type: ignore[operator]
    if not torch.equal(live, saved):
        raise RuntimeError(f"{folder} generates other tokens than the model it was saved from")
    print(tokenizer.decode(saved[0], skip_special_tokens=True))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print perplexities, each against the dense run of the same family (itself where there is none yet)."""
    dense = {row["family"]: row for row in rows if row["variant"] == "dense"}
    table = Table("family", "variant", "steps", "perplexity", "vs dense", "linear", "total", "MB")
    for row in rows:
        base = dense.get(row["family"], row)
        share = {s: row["parameters"][s] / base["parameters"][s] for s in ("linear", "total")}
        table.add_row(
            row["family"], row["variant"], str(row["steps"]), f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / base['perplexity']:.3f}", f"{share['linear']:.3f}", f"{share['total']:.3f}",
            f"{row['weight_bytes'] / 1e6:.2f}",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=["llama", "gpt2", "mamba"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if not args.table and not (DATA and LLAMA):
        raise SystemExit(
            "set LIGHTNING_COMPRESS_DATA and LIGHTNING_COMPRESS_LLAMA; see the head of this file"
        )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.touch()
    for family in [] if args.table else args.families:
        for variant in args.variants:
            rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
            if not any((row["family"], row["variant"]) == (family, variant) for row in rows):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(run(family, variant)) + "\n")
    print_table([json.loads(line) for line in RESULTS.read_text().splitlines()])


if __name__ == "__main__":
    main()

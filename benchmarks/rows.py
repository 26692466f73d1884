"""The results files of benchmarks: one JSON row per run; what is there is not run again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_compress.report.machine import describe_machine, describe_versions

__all__ = ["RESULTS", "append", "provenance", "rows_in", "sweep_missing", "train_missing"]

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def rows_in(file: str | Path) -> list[Row]:
    """Return the rows of a results file, named within ``results/`` or by its whole path."""
    path = RESULTS / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(file: str | Path, row: Row) -> None:
    """Add a row to a results file, named within ``results/`` or by its whole path."""
    path = RESULTS / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def provenance() -> Row:
    """Return the commit, the machine and the versions that a row is made by."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return {
        "commit": commit.stdout.strip(),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def train_missing(
    file: str, tasks: list[str], variants: list[str], seeds: list[int], train: Callable[[str, str, int], Row]
) -> Iterator[Row]:
    """Train what a results file does not hold, and append each row before it is yielded.

    Args:
        file: Results file, looked at anew before each run.
        tasks: Data sets.
        variants: What to train on each.
        seeds: All variants of a seed are trained before the next seed.
        train: Makes the row of a task, a variant and a seed.

    Yields:
        The new rows.
    """
    for name in tasks:
        for seed in seeds:
            for variant in variants:
                key = (name, variant, seed)
                if any((r["task"], r["variant"], r["seed"]) == key for r in rows_in(file)):
                    continue
                row = train(*key)
                append(file, row)
                yield row


def sweep_missing(
    file: str,
    field: str,
    tasks: list[str],
    variants: list[str],
    values: list[float],
    evaluate: Callable[[str, str, int, list[float]], Iterator[Row]],
) -> Iterator[Row]:
    """Evaluate trained models of seed 0 at those values that a results file does not hold, and append each row.

    Args:
        file: Results file.
        field: Field of a row that holds the value.
        tasks: Data sets.
        variants: Trained models of each.
        values: Settings to evaluate at.
        evaluate: Yields the rows of a task, a variant and a seed at some values.

    Yields:
        The new rows.
    """
    for name in tasks:
        for variant in variants:
            done = {(r["task"], r["variant"], r[field]) for r in rows_in(file)}
            left = [value for value in values if (name, variant, value) not in done]
            for row in evaluate(name, variant, 0, left) if left else ():
                append(file, row)
                yield row

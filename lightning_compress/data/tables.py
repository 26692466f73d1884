"""Read a table of texts from a file into columns, and say exactly what is wrong when it cannot be read.

The next chapter is :mod:`lightning_compress.data.sources`, which finds the tables of a data set.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

__all__ = ["Columns", "column", "read_columns"]

Columns = dict[str, list[Any]]
"""A table: column name to values, all of the same length."""


def read_columns(path: str | Path) -> Columns:
    """Read a TSV, CSV, JSONL or parquet file.

    TSV is read without quoting (a quotation mark is text), CSV with the usual double quotes. The first line
    of both names the columns. JSONL holds one object per line; a key that a line lacks is read as None.

    Args:
        path: File whose extension is one of ``.tsv``, ``.csv``, ``.jsonl``, ``.ndjson``, ``.parquet``.

    Returns:
        The columns, at least one row.

    Raises:
        ValueError: The file is missing, empty, of an unknown extension or malformed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"The data file {str(path)!r} {kind}. Give the path of one of {_extensions()}.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"The data file {str(path)!r} has the unknown extension {path.suffix!r}; known are"
            f" {_extensions()}."
        )
    try:
        columns = reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error
    if not columns or not len(next(iter(columns.values()))):
        raise ValueError(f"The data file {str(path)!r} is empty: it must hold at least one row of data.")
    return columns


def column(columns: Columns, name: str, where: str, argument: str) -> list[Any]:
    """Take one column by name.

    Args:
        columns: The table.
        name: Name of the column.
        where: What the table is, for the message.
        argument: The argument by which the user chose the name, for the message.

    Raises:
        ValueError: The column is absent; the message lists those present.
    """
    if name not in columns:
        raise ValueError(
            f"{where} has no column {name!r}; it has {list(columns)}. Set `{argument}` to one of them."
        )
    return columns[name]


def _read_tsv(path: Path) -> Columns:
    with path.open(encoding="utf-8-sig") as file:
        return _from_rows((line.rstrip("\n").split("\t") for line in file), path)


def _read_csv(path: Path) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return _from_rows(csv.reader(file, strict=True), path)
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is not well-formed CSV: {error}.") from error


def _from_rows(rows: Any, path: Path) -> Columns:
    rows = iter(rows)
    header = next(rows, [])
    if len(set(header)) != len(header):
        raise ValueError(f"{str(path)!r} names a column twice in its first line: {header}.")
    table: list[list[str]] = [[] for _ in header]
    for number, row in enumerate(rows, start=2):
        if row in ([], [""]):
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{str(path)!r}: record {number} has {len(row)} fields, the first line names {len(header)}"
                f" ({header})."
            )
        for values, value in zip(table, row, strict=True):
            values.append(value)
    return dict(zip(header, table, strict=True))


def _read_jsonl(path: Path) -> Columns:
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path)!r}: line {number} is not JSON: {error.msg}.") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{str(path)!r}: line {number} must be a JSON object, is a {type(record).__name__}."
                )
            records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    return {name: [record.get(name) for record in records] for name in names}


def _read_parquet(path: Path) -> Columns:
    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is not a readable parquet file: {error}") from error


def _extensions() -> str:
    return ", ".join(_READERS)


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}

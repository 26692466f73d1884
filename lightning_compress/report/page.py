"""Writes the report of a run: `report.json`, and one HTML page that needs nothing but itself.

The page answers in the order a reader asks: what was gained, what it cost, which tokens and texts left early, whether
it is faster on a real machine, what the model looks like inside, and how the run got there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_compress.report import sections
from lightning_compress.report.bits_sections import bits
from lightning_compress.report.dropping_sections import tokens
from lightning_compress.report.exit_sections import exits
from lightning_compress.report.files import write_text_atomically
from lightning_compress.report.markup import element, escape
from lightning_compress.report.record import RunRecord
from lightning_compress.report.style import STYLE
from lightning_compress.report.width_sections import widths

__all__ = ["JSON_NAME", "PAGE_NAME", "read_record", "render_page", "render_run", "write_report"]

JSON_NAME = "report.json"
PAGE_NAME = "report.html"


def write_report(record: RunRecord | Mapping[str, Any], directory: str | Path) -> Path:
    """Write `report.json` and `report.html`, each atomically.

    Args:
        record: The run, as a record or as the dictionary that `RunRecord.to_dict` gives.
        directory: Folder for both files; made if absent.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a dictionary is not a valid record.
    """
    run = record if isinstance(record, RunRecord) else RunRecord.from_dict(record)
    directory = Path(directory)
    page = render_page(run)
    write_text_atomically(directory / JSON_NAME, run.to_json())
    return write_text_atomically(directory / PAGE_NAME, page)


def render_run(run_dir: str | Path) -> Path:
    """Render the page anew from a run's `report.json`, in the folder or beneath it.

    Args:
        run_dir: Folder of a run.

    Returns:
        The path of the page, beside the `report.json` it was read from.

    Raises:
        ValueError: If there is no such folder, no record or more than one, or the record is not valid.
    """
    path = _find_record(Path(run_dir))
    return write_text_atomically(path.with_name(PAGE_NAME), render_page(read_record(path)))


def read_record(path: str | Path) -> RunRecord:
    """Read and validate one `report.json`.

    Raises:
        ValueError: If the file is not JSON, or not a record of the schema this version reads.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): run again with the CompressionReport callback"
        ) from error
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{path} holds a {type(data).__name__}, not a record: run again with CompressionReport"
        )
    try:
        return RunRecord.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def render_page(record: RunRecord) -> str:
    """Return the whole page as HTML text; every text of the record is escaped."""
    title = sections.title(record)
    parts = [
        element("h1", escape(title)),
        sections.lead(record),
        sections.tiles(record),
        sections.warnings(record),
        sections.size(record),
        sections.quality(record),
        tokens(record),
        exits(record),
        sections.latency(record),
        widths(record),
        bits(record),
        sections.ranks(record),
        sections.course(record),
        sections.reproduction(record),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(part for part in parts if part)}</main>\n</body>\n</html>\n"
    )


def _find_record(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: give the folder of a run")
    direct = run_dir / JSON_NAME
    found = [direct] if direct.is_file() else sorted(run_dir.rglob(JSON_NAME))
    if not found:
        raise ValueError(
            f"no {JSON_NAME} in {run_dir} or beneath it: add the CompressionReport callback to the run, "
            "or give the folder it wrote to"
        )
    if len(found) > 1:
        raise ValueError(
            f"{run_dir} holds several records {[str(path) for path in found]}: give one's folder"
        )
    return found[0]

"""``stdlib-docs``: a text data set that every Python installation carries, labelled by topic.

The texts are the documentation strings of the standard library's modules, classes and functions; the label is
the topic of the module. Files are parsed, never imported. What is found is cached as parquet.
The next chapter is :mod:`lightning_compress.data.sources`, which offers it beside files and hub data sets.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lightning_compress.data.tables import Columns

__all__ = ["STDLIB_DOCS", "TOPICS", "cache_folder", "harvest_docstrings", "load_stdlib_docs", "split_of"]

logger = logging.getLogger(__name__)

STDLIB_DOCS = "stdlib-docs"
_SCHEMA_VERSION = 1
_MIN_WORDS = 6
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

TOPICS: dict[str, tuple[str, ...]] = {
    topic: tuple(modules.split())
    for topic, modules in {
        "network": "asynchat asyncore cgi cgitb email ftplib http imaplib ipaddress mailbox mailcap"
        " mimetypes netrc nntplib nturl2path poplib smtpd smtplib socket socketserver ssl telnetlib urllib"
        " uuid webbrowser wsgiref xmlrpc",
        "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched"
        " selectors signal subprocess threading",
        "gui": "curses tkinter turtle turtledemo",
        "text": "_markupbase base64 codecs configparser csv difflib encodings gettext html json locale"
        " plistlib quopri re shlex sre_compile sre_constants sre_parse string stringprep textwrap tomllib uu"
        " xml",
        "math & time": "_pydatetime _pydecimal _strptime calendar colorsys datetime decimal fractions"
        " numbers random statistics zoneinfo",
        "files": "_compression _pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io linecache"
        " lzma ntpath os pathlib posixpath shelve shutil stat tarfile tempfile zipfile",
        "devtools": "_pyrepl ast bdb cProfile code codeop dis doctest inspect lib2to3 modulefinder opcode pdb"
        " pickletools profile pstats pyclbr pydoc symtable tabnanny timeit token tokenize trace traceback"
        " tracemalloc unittest",
        "packaging": "_aix_support _osx_support compileall distutils ensurepip imp importlib pkgutil"
        " py_compile runpy site sysconfig venv zipapp zipimport",
        "containers": "_collections_abc _py_abc _weakrefset abc array bisect collections contextlib copy"
        " copyreg dataclasses enum functools graphlib heapq operator pprint reprlib types typing weakref",
    }.items()
}
"""Topic to the top-level modules it covers; modules of several topics, or of none, are left out."""


def load_stdlib_docs(stdlib: Path | None = None) -> dict[str, Columns]:
    """Load the data set from the cache, building the cache first if it is absent or damaged.

    Args:
        stdlib: Folder of the standard library; the running interpreter's by default.

    Returns:
        ``{"train", "validation", "test"}`` to columns ``text`` and ``label`` (0..8, the order of
        :data:`TOPICS`), about 80 / 10 / 10 % of some 6,200 texts on CPython 3.11.
    """
    stdlib = stdlib if stdlib is not None else Path(sysconfig.get_path("stdlib"))
    path = cache_folder() / _cache_name(stdlib)
    table = _read_cache(path)
    if table is None:
        table = _build(stdlib)
        _write_cache(table, path)
    splits: dict[str, Columns] = {name: {"text": [], "label": []} for name in ("train", "validation", "test")}
    for row in table.to_pylist():
        for name, values in splits[row["split"]].items():
            values.append(row[name])
    return splits


def harvest_docstrings(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Walk the library's source files and yield ``(text, topic)``, each text once.

    Texts are normalised to single blanks and hold at least six words; one that occurs in several modules
    belongs to the first in the order of paths. Files that do not parse (some are kept broken on purpose) are
    skipped.

    Args:
        stdlib: Folder of the standard library.
    """
    topic_of = {module: topic for topic, modules in TOPICS.items() for module in modules}
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        topic = topic_of.get(parts[0].removesuffix(".py"))
        if topic is None or _SKIPPED_FOLDERS.intersection(parts):
            continue
        for text in _docstrings(path):
            if text not in seen and len(text.split()) >= _MIN_WORDS:
                seen.add(text)
                yield text, topic


def split_of(text: str) -> str:
    """Assign a text to a part by its own hash, so that it stays there whatever else is harvested.

    Example:
        >>> split_of("Return the absolute value of the argument.")
        'train'
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def cache_folder() -> Path:
    """Folder for what is built once: ``$LIGHTNING_COMPRESS_CACHE`` or ``~/.cache/lightning_compress``."""
    chosen = os.environ.get("LIGHTNING_COMPRESS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lightning_compress"


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split())


def _build(stdlib: Path) -> pyarrow.Table:
    number_of = {topic: number for number, topic in enumerate(TOPICS)}
    pairs = list(harvest_docstrings(stdlib))
    if not pairs:
        raise ValueError(
            f"No documentation strings under {str(stdlib)!r}: this Python keeps no library sources. Use"
            " another interpreter, or give `train=` files."
        )
    texts = [text for text, _ in pairs]
    labels = [number_of[topic] for _, topic in pairs]
    return pyarrow.table({"text": texts, "label": labels, "split": [split_of(text) for text in texts]})


def _cache_name(stdlib: Path) -> str:
    place = hashlib.sha256(str(stdlib).encode()).hexdigest()[
        :8
    ]  # two builds of one version may differ (tkinter)
    return f"{STDLIB_DOCS}-v{_SCHEMA_VERSION}-python{platform.python_version()}-{place}.parquet"


def _read_cache(path: Path) -> pyarrow.Table | None:
    if not path.is_file():
        return None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        logger.warning("The cache %s is damaged (%s); building it again.", path, error)
        return None
    if table.column_names != ["text", "label", "split"] or table.num_rows == 0:
        logger.warning("The cache %s does not hold what was written; building it again.", path)
        return None
    return table


def _write_cache(table: pyarrow.Table, path: Path) -> None:
    """Write beside the target, then rename: a reader, or a second process, never sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError as error:
        warnings.warn(
            f"{STDLIB_DOCS!r} cannot be cached in {str(path.parent)!r} ({error}) and is built on every run;"
            " set the environment variable LIGHTNING_COMPRESS_CACHE to a writable folder.",
            stacklevel=2,
        )
        return
    try:
        with os.fdopen(handle, "wb") as file:
            pyarrow.parquet.write_table(table, file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)

import logging
from pathlib import Path

import pytest

from lightning_compress.data import stdlib_docs
from lightning_compress.data.stdlib_docs import (
    TOPICS,
    cache_folder,
    harvest_docstrings,
    load_stdlib_docs,
    split_of,
)

SOURCE = '''"""Read   the lines\\nof a file, one by one."""
import does_not_exist

class Reader:
    """Too short."""
    async def read(self):
        """Return the next line, or nothing at the end."""
        raise RuntimeError("imported and called")
'''


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A standard library of a few files."""
    folder = tmp_path / "lib"
    for name, text in {
        "asyncio/tasks.py": '"""Run several coroutines at the same time, please."""',
        "fileinput.py": SOURCE,
        "asyncio/test/test_tasks.py": '"""Check that the tasks really run in parallel."""',
        "site-packages/json/a.py": '"""Somebody else\'s package that is not looked at."""',
        "json/__init__.py": '"""Run several coroutines at the same time, please."""',
        "json/broken.py": "def broken(:",
        "this.py": '"""A module that belongs to no topic at all."""',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_texts_are_harvested_without_importing_normalised_long_enough_and_once(stdlib):
    assert list(harvest_docstrings(stdlib)) == [
        ("Run several coroutines at the same time, please.", "concurrency"),
        ("Read the lines of a file, one by one.", "files"),
        ("Return the next line, or nothing at the end.", "files"),
    ]


def test_there_are_nine_topics_and_no_module_has_two():
    modules = [module for names in TOPICS.values() for module in names]
    assert len(TOPICS) == 9
    assert len(modules) == len(set(modules))


def test_a_text_always_falls_into_the_same_part_and_the_parts_have_their_shares():
    parts = [split_of(f"text number {number}") for number in range(2000)]
    shares = [parts.count(name) / len(parts) for name in ("train", "validation", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert [split_of(text) for text in "abcd"] == ["test", "train", "test", "train"]


def test_the_cache_is_built_once_and_read_afterwards(stdlib, cache, monkeypatch):
    first = load_stdlib_docs(stdlib)
    assert sum(len(part["text"]) for part in first.values()) == 3
    assert [path.suffix for path in cache.iterdir()] == [".parquet"]
    monkeypatch.setattr(stdlib_docs, "harvest_docstrings", lambda folder: pytest.fail("harvested again"))
    assert load_stdlib_docs(stdlib) == first


@pytest.mark.parametrize("damage", [b"", b"PAR1 half a file", None])
def test_a_damaged_cache_is_built_again(stdlib, cache, damage, caplog):
    first = load_stdlib_docs(stdlib)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert load_stdlib_docs(stdlib) == first
    assert "is damaged" in caplog.text
    assert load_stdlib_docs(stdlib) == first


def test_a_cache_with_other_columns_is_built_again(stdlib, cache, caplog):
    first = load_stdlib_docs(stdlib)
    (path,) = cache.iterdir()
    stdlib_docs.pyarrow.parquet.write_table(stdlib_docs.pyarrow.table({"text": ["x"]}), path)
    assert load_stdlib_docs(stdlib) == first
    assert "does not hold what was written" in caplog.text


def test_another_standard_library_has_a_cache_of_its_own(stdlib, cache):
    load_stdlib_docs(stdlib)
    (stdlib / "fileinput.py").rename(stdlib.parent / "fileinput.py")
    moved = stdlib.rename(stdlib.parent / "other")
    assert sum(len(part["text"]) for part in load_stdlib_docs(moved).values()) == 1
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop(stdlib, cache):
    cache.write_text("a file stands in the way")
    with pytest.warns(UserWarning, match="set the environment variable LIGHTNING_COMPRESS_CACHE"):
        splits = load_stdlib_docs(stdlib)
    assert sum(len(part["text"]) for part in splits.values()) == 3


def test_a_python_without_library_sources_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="keeps no library sources"):
        load_stdlib_docs(tmp_path / "empty")


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("LIGHTNING_COMPRESS_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/.cache/lightning_compress")


@pytest.mark.slow
def test_the_standard_library_of_this_python_gives_thousands_of_texts_in_nine_topics():
    splits = load_stdlib_docs()
    labels = [label for part in splits.values() for label in part["label"]]
    assert len(labels) > 3000
    assert set(labels) == set(range(9)) or set(labels) == set(range(9)) - {2}, "only tkinter may be absent"

import os
from pathlib import Path

import pytest

from lightning_compress.report.files import write_text_atomically


def test_the_file_holds_the_text_and_nothing_is_left_beside_it(tmp_path: Path):
    path = write_text_atomically(tmp_path / "new" / "a.txt", "σ − α")
    assert path.read_text(encoding="utf-8") == "σ − α"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failing_rename_keeps_the_old_file_and_removes_the_new_one(tmp_path: Path, monkeypatch):
    path = write_text_atomically(tmp_path / "a.txt", "old")

    def fail(source: str, goal: str) -> None:
        raise OSError("no space")

    monkeypatch.setattr("lightning_compress.report.files.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_text_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_the_file(tmp_path: Path):
    path = write_text_atomically(tmp_path / "a.txt", "")
    assert path.stat().st_mode & 0o777 == 0o644

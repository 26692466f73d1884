"""Says on what machine, and with which versions, a number was measured.

A latency without its machine means nothing; both dictionaries go into every record and table.
"""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightning_compress._version import __version__

__all__ = ["describe_machine", "describe_versions"]

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "sve")
_PACKAGES = ("torch", "transformers", "lightning")


def describe_machine() -> dict[str, Any]:
    """Return the processor, its telling instruction sets, and how busy it was.

    Returns:
        `cpu` (model name), `cores`, `flags` (those that decide the speed of products),
        `capability` (what torch dispatches to), `memory_gib`, `load_average` (one minute; None if unknown),
        `system`, and `gpu` where torch sees one.
    """
    name, flags = _read_cpuinfo(Path("/proc/cpuinfo"))
    machine: dict[str, Any] = {
        "cpu": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide speed; absent packages are left out."""
    versions = {"lightning-compress": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _read_cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    """Model name and instruction-set flags of the first processor; empty where the file is absent."""
    if not path.is_file():
        return "", frozenset()
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name", fields.get("hardware", ""))
    return name, frozenset(fields.get("flags", fields.get("features", "")).split())


def _memory_gib() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)

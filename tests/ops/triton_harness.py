"""What the tests of all Triton kernels share: scripts of checks run as processes, and what compiled kernels must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["CAPABILITIES", "assert_no_spilling", "needs_triton", "run_checks"]

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90, 100])

# Where Triton exists it has to be there: CI must not skip these checks unseen.
needs_triton = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Triton is published for Linux only"
)


def run_checks(script: str, which: str, cache: Path, root: Path, **environment: str) -> Any:
    """Returns the answer of a script of this folder, run with warnings as errors."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", f"tests/ops/{script}", which],
        cwd=root,
        env=inherited | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_no_spilling(
    compiled: dict[str, Any], capability: int, count: int, shared_memory_limit: int
) -> None:
    """Asserts that as many kernels were compiled for a GPU, within its shared memory and its registers."""
    kernels = [kernel for kernel in compiled["kernels"] if kernel["capability"] == capability]
    assert len(kernels) == count
    for kernel in kernels:
        assert f".target sm_{capability}" in kernel["ptx"], kernel["name"]
        assert kernel["cubin_bytes"] > 0, kernel["name"]
        assert kernel["shared"] < shared_memory_limit, kernel["name"]
        assert ".local" not in kernel["ptx"], kernel["name"]
        assert (kernel["resources"]["STACK"], kernel["resources"]["LOCAL"]) == (0, 0), kernel["name"]

"""What a test file's ``SCRIPT`` of checks says of its Triton kernels; each runs once for the file."""

from typing import Any

import pytest

from tests.ops.triton_harness import run_checks


@pytest.fixture(scope="module")
def differences(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, list[str]]:
    """What differs between interpreted kernels and references, by check."""
    cache = tmp_path_factory.mktemp("triton")
    return run_checks(request.module.SCRIPT, "interpret", cache, pytestconfig.rootpath, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Any]:
    """The kernels compiled ahead of time, and which packages imported theirs unasked."""
    cache = tmp_path_factory.mktemp("triton")
    return run_checks(request.module.SCRIPT, "compile", cache, pytestconfig.rootpath)

"""The tests mirror the sources: whoever reads a module knows where its tests are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_compress"


def has_behaviour(path: Path) -> bool:
    """Returns whether the module defines a function, or a class with a method."""
    return any(
        isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


SOURCES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if not path.stem.startswith("_") and has_behaviour(path)
]

# Parts of one mechanism that only shows as a whole.
TESTED_TOGETHER = {
    "callbacks/optimizers.py": "callbacks/test_base.py",
    "callbacks/randomness.py": "callbacks/test_resume.py",
    "callbacks/session.py": "callbacks/test_base.py",
    "losses/base.py": "losses/test_soft_threshold_rank.py",
}


def possible_tests(source: Path) -> list[Path]:
    """Returns the mirrored test file, and for a module of a subpackage also that of the subpackage."""
    module = source.relative_to(PACKAGE)
    tests = ROOT / "tests" / module.parent
    mirrored = [tests / f"test_{source.stem}.py", tests.parent / f"test_{tests.name}.py"]
    together = TESTED_TOGETHER.get(module.as_posix())
    return [ROOT / "tests" / together] if together else mirrored if len(module.parts) > 2 else mirrored[:1]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_with_behaviour_has_tests(source: Path):
    assert any(path.is_file() for path in possible_tests(source))


def test_what_is_tested_together_still_exists():
    assert [module for module in TESTED_TOGETHER if not (PACKAGE / module).is_file()] == []

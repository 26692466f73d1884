"""The public API is the documented API."""

import ast
import re
from pathlib import Path

import pytest

import lightning_compress


def public_modules(root: Path) -> list[Path]:
    files = sorted((root / "lightning_compress").rglob("*.py"))
    return [path for path in files if not path.stem.startswith("_") or path.stem == "__init__"]


def test_the_reference_lists_exactly_the_public_names(pytestconfig: pytest.Config):
    page = (Path(pytestconfig.rootpath) / "docs/reference/index.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| \[`(\w+)`\]", page, flags=re.MULTILINE)
    assert sorted(documented) == sorted(set(lightning_compress.__all__) - {"__version__"})


def test_public_names_are_unique():
    assert len(set(lightning_compress.__all__)) == len(lightning_compress.__all__)


def test_every_module_says_what_it_is_and_what_is_public(pytestconfig: pytest.Config):
    silent = []
    for path in public_modules(Path(pytestconfig.rootpath)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {
            t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        assigned |= {
            n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        if ast.get_docstring(tree) is None or "__all__" not in assigned:
            silent.append(str(path.relative_to(pytestconfig.rootpath)))
    assert silent == []

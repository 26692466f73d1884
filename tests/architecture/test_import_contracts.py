"""The layers of the code hold: the contracts in pyproject.toml are kept, and they cover every package."""

import subprocess
import sys
import tomllib
from pathlib import Path

MAY_IMPORT_LIGHTNING = {"cli", "demo", "callbacks", "data", "tasks"}


def test_each_layer_imports_only_those_beneath_it(pytestconfig):
    # a process of its own: import-linter reconfigures logging for the whole process
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())",
    ]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_upper_layers_may_import_lightning(pytestconfig):
    root = Path(pytestconfig.rootpath)
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contracts = [c for c in settings["contracts"] if "lightning" in c.get("forbidden_modules", [])]
    forbidden = {module for contract in contracts for module in contract["source_modules"]}
    children = [
        path for path in (root / "lightning_compress").iterdir() if not path.name.startswith(("_", "."))
    ]
    modules = {path.stem for path in children if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert forbidden == {"lightning_compress"} | {
        f"lightning_compress.{m}" for m in modules - MAY_IMPORT_LIGHTNING
    }

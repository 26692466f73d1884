"""The tree of files in the README is the tree of files in the repository."""

import re
import subprocess
from pathlib import Path

import pytest

PACKAGE = "lightning_compress"


def read_tree(readme: str) -> dict[str, str]:
    """Returns path -> caption from the fenced block of the README that shows the package's tree.

    A line is `name  caption` or `name name  caption`; the column at which the name starts tells the depth,
    with or without drawn branches.
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, flags=re.DOTALL | re.MULTILINE)
    texts = [block for language, block in blocks if language in ("", "text")]
    trees = [text for text in texts if re.search(rf"^\W*{PACKAGE}/", text, flags=re.MULTILINE)]
    assert len(trees) == 1, f"README.md must hold exactly one tree of {PACKAGE}/, found {len(trees)}"
    captions: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # (column, path) of the folders that enclose the current line
    for line in trees[0].splitlines():
        plain = re.sub("[│├└─]", " ", line)
        if not plain.strip():
            continue
        column = len(plain) - len(plain.lstrip())
        names, _, caption = re.sub(r"\s{2,}", "\0", plain.strip(), count=1).partition("\0")
        while parents and parents[-1][0] >= column:
            parents.pop()
        prefix = parents[-1][1] if parents else ""
        for name in names.split():
            captions[prefix + name] = caption.strip()
        if names.endswith("/"):
            parents.append((column, prefix + names.split()[-1]))
    return captions


@pytest.fixture(scope="module")
def tree(pytestconfig: pytest.Config) -> dict[str, str]:
    return read_tree((Path(pytestconfig.rootpath) / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tracked(pytestconfig: pytest.Config) -> list[str]:
    command = ["git", "ls-files", "--cached"]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if not path.startswith(".")]


def children(paths: list[str], folder: str) -> set[str]:
    """Returns the paths directly inside the folder ("" for the root); those of folders end in a slash."""
    inside = [path.removeprefix(folder) for path in paths if path.startswith(folder)]
    return {folder + path.split("/")[0] + ("/" if "/" in path else "") for path in inside}


def test_every_path_in_the_tree_exists(tree: dict[str, str], pytestconfig: pytest.Config):
    root = Path(pytestconfig.rootpath)
    wrong = [p for p in tree if not ((root / p).is_dir() if p.endswith("/") else (root / p).is_file())]
    assert wrong == []


def test_every_line_has_a_caption(tree: dict[str, str]):
    assert [path for path, caption in tree.items() if not caption and path != f"{PACKAGE}/"] == []


def test_the_tree_names_every_top_level_file_and_folder(tree: dict[str, str], tracked: list[str]):
    assert children(tracked, "") - set(tree) == set()


def test_the_tree_names_every_module_and_package(tree: dict[str, str], tracked: list[str]):
    unnamed = {f"{PACKAGE}/_version.py", f"{PACKAGE}/py.typed"}
    assert children(tracked, f"{PACKAGE}/") - set(tree) - unnamed == set()

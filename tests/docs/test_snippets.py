"""What is not executed is not documented: runs the Python blocks of the README and of every page.

A page is one program: its blocks run in order, in one namespace, in an empty folder, offline. Two HTML
comments steer it:

* `<!-- not executed: reason -->` right before a block leaves that block out;
* `<!-- executed: ... -->`, with Python lines inside, runs them in their place, unseen by the reader.
"""

import re
import symtable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?P<indent> *)```python\b[^\n]*\n(?P<shown>.*?)^ *```|^<!-- executed:\n(?P<hidden>.*?)^-->",
    flags=re.DOTALL | re.MULTILINE,
)
EXCLUDED = re.compile(r"<!-- not executed: \S[^\n]* -->\s*\Z")


@dataclass(frozen=True)
class Snippet:
    """A block of Python in a page."""

    line: int
    code: str


def read_snippets(text: str) -> list[Snippet]:
    """Returns the blocks to execute, in order, without the indentation they have inside tabs and lists."""
    snippets = []
    for match in BLOCK.finditer(text):
        if EXCLUDED.search(text[: match.start()]):
            continue
        indent = len(match["indent"] or "")
        lines = (match["shown"] or match["hidden"] or "").splitlines()
        line = text.count("\n", 0, match.start()) + 2
        snippets.append(Snippet(line, "\n".join(line[indent:] for line in lines)))
    return snippets


def names_bound_by(code: str) -> set[str]:
    """Returns the names that a block is to leave in the namespace: assigned, imported and defined ones."""
    symbols = symtable.symtable(code, "a block", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def pages() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in files if path.is_file() and read_snippets(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_runs_as_it_is_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in read_snippets(page.read_text(encoding="utf-8")):
        code = "\n" * (snippet.line - 1) + snippet.code  # so that a traceback names the line of the page
        exec(compile(code, str(page), "exec"), namespace)
        assert names_bound_by(snippet.code) <= namespace.keys(), f"the block of line {snippet.line}"


def test_the_names_that_a_block_leaves_are_those_of_its_own_level():
    code = "import a.b\nfrom c import d as e\nfor f in e:\n    g = [h for h in f]\ndef i():\n    j = g"
    assert names_bound_by(code) == {"a", "e", "f", "g", "i"}


def test_a_block_is_read_with_its_line_and_without_its_indentation():
    text = "Words.\n\n    ```python\n    a = 1\n    if a:\n        b = 2\n    ```\n"
    assert read_snippets(text) == [Snippet(4, "a = 1\nif a:\n    b = 2")]


def test_a_hidden_block_is_executed_in_its_place():
    text = "<!-- executed:\na = 1\n-->\n```python\nb = a\n```\n"
    assert [snippet.code for snippet in read_snippets(text)] == ["a = 1", "b = a"]


@pytest.mark.parametrize(
    ("comment", "number"),
    [("<!-- not executed: needs a GPU -->", 0), ("<!-- not executed -->", 1), ("<!-- not executed: -->", 1)],
)
def test_only_a_comment_with_a_reason_excludes_a_block(comment: str, number: int):
    assert len(read_snippets(f"{comment}\n```python\na = 1\n```\n")) == number


def test_a_comment_excludes_the_next_block_only():
    text = "<!-- not executed: slow -->\n```python\na\n```\n\n```python\nb\n```\n"
    assert [snippet.code for snippet in read_snippets(text)] == ["b"]

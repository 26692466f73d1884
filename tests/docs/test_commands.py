"""The commands that the README and the pages show can be typed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL_BLOCK = re.compile(
    r"^ *```(?:bash|console|sh|shell)\b[^\n]*\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE
)


def shell_lines() -> list[tuple[str, str]]:
    """Returns (page, command) for every command line, continuation lines joined, prompts removed."""
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        for block in SHELL_BLOCK.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.strip().removeprefix("$ ").partition(" #")[0].strip()
                if command:
                    found.append((str(page.relative_to(ROOT)), command))
    return found


LINES = shell_lines()


def matching(pattern: str) -> list[tuple[str, str]]:
    return [(page, match[1]) for page, line in LINES for match in re.finditer(pattern, line)]


def test_every_make_target_exists():
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    shown = matching(r"^make ([a-z-]+)")
    assert shown
    assert [found for found in shown if found[1] not in targets] == []


def test_every_script_and_configuration_that_is_named_exists():
    shown = matching(r"(?:^| )((?:configs|examples|benchmarks|tests|docs)/[\w./-]+)")
    assert [found for found in shown if not (ROOT / found[1]).exists()] == []


@pytest.mark.parametrize("target", ["demo", "test", "check", "docs", "bench", "format", "help"])
def test_the_makefile_has_the_promised_targets(target: str):
    assert re.search(
        rf"^{target}:.*## \w", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )

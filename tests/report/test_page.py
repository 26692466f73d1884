import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_compress.report.page import read_record, render_page, render_run, write_report
from lightning_compress.report.record import RunRecord

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Balance(HTMLParser):
    """Checks that every element is closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_both_files_are_written_and_agree(tmp_path: Path, run: dict):
    page = write_report(run, tmp_path / "report")
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]
    assert read_record(page.with_name("report.json")) == RunRecord.from_dict(run)
    assert page.read_text(encoding="utf-8") == render_page(RunRecord.from_dict(run))


def test_the_page_needs_nothing_but_itself_and_is_well_formed(run: dict):
    text = render_page(RunRecord.from_dict(run))
    checker = Balance()
    checker.feed(text)
    assert checker.open == []
    assert {"svg", "table", "details", "style"} <= checker.seen
    assert {"script", "link", "img", "iframe"}.isdisjoint(checker.seen)
    assert not re.search(r"https?://|url\((?!#)|@import", text)


@pytest.mark.parametrize("kind", ["run", "dropping_run"])
def test_ids_on_the_page_are_unique(kind: str, request: pytest.FixtureRequest):
    run = request.getfixturevalue(kind)
    ids = re.findall(r'\bid="([^"]+)"', render_page(RunRecord.from_dict(run)))
    assert ids
    assert len(set(ids)) == len(ids)


def test_light_and_dark_are_both_styled(run: dict):
    text = render_page(RunRecord.from_dict(run))
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))


def test_a_page_about_tokens_is_well_formed_and_needs_nothing_but_itself(dropping_run: dict):
    text = render_page(RunRecord.from_dict(dropping_run))
    checker = Balance()
    checker.feed(text)
    assert checker.open == []
    assert "article" in checker.seen
    assert not re.search(r"https?://|url\((?!#)|@import", text)


def test_every_text_about_tokens_is_escaped(dropping_run: dict):
    evil = "<script>x</script>"
    dropping_run["dropping"]["metric"] = evil
    for text in dropping_run["dropping"]["texts"]:
        text.update(tokens=[evil] * len(text["tokens"]), label=evil, prediction="no" + evil)
    page = render_page(RunRecord.from_dict(dropping_run))
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;") > 5


def test_every_text_of_the_record_is_escaped(run: dict):
    evil = "<script>x</script>"
    run["model_type"] = evil
    run["methods"] = [{"method": evil, "config": {evil: evil}}]
    run["target"] = {evil: evil}
    run["warnings"] = [evil]
    run["machine"] = {evil: evil}
    run["versions"] = {evil: evil}
    run["metrics"] = {"dense": {evil: 0.5}, "compressed": {evil: 0.5}}
    run["final"]["ranks"] = {f"a.0.{evil}": [1, 2, "low_rank"]}
    for step in run["steps"]:
        step.update(phase=evil, ranks={f"a.0.{evil}": 1}, loss={evil: 1.0})
    for timing in run["latency"]["timings"]:
        timing["model"] += evil
    run["latency"]["baselines"] = ["dense" + evil]
    text = render_page(RunRecord.from_dict(run))
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;") > 20


def test_a_run_that_just_began_has_a_page(tmp_path: Path):
    page = write_report(RunRecord(model_type="bert"), tmp_path)
    assert "<h1>bert</h1>" in page.read_text(encoding="utf-8")


def test_a_run_is_rendered_anew_from_its_record(tmp_path: Path, run: dict):
    page = write_report(run, tmp_path / "version_0" / "report")
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert render_run(tmp_path) == page
    assert page.read_text(encoding="utf-8") == before
    assert render_run(page.parent) == page


def test_a_folder_without_a_record_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ValueError, match="add the CompressionReport callback"):
        render_run(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        render_run(tmp_path / "absent")


def test_a_folder_of_several_runs_is_refused(tmp_path: Path, run: dict):
    write_report(run, tmp_path / "a")
    write_report(run, tmp_path / "b")
    with pytest.raises(ValueError, match="several records"):
        render_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "holds a list"), ('{"schema": 9}', "schema 9")]
)
def test_a_broken_record_is_refused_with_its_path(tmp_path: Path, content: str, message: str):
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        render_run(tmp_path)
    assert "report.json" in str(caught.value)


def test_an_invalid_record_writes_nothing(tmp_path: Path, run: dict):
    run["steps"][0]["progress"] = 2
    with pytest.raises(ValueError, match="progress"):
        write_report(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_plain_json(tmp_path: Path, run: dict):
    write_report(run, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["schema"] == 1

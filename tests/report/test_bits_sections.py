import re

from lightning_compress.report import sections
from lightning_compress.report.bits_sections import bits
from lightning_compress.report.page import render_page
from lightning_compress.report.record import RunRecord


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).strip()


def test_the_section_names_operators_bits_and_blocks(bits_run: dict):
    record = RunRecord.from_dict(bits_run)
    words = text_of(bits(record))
    assert "Linear weights 1,200 4 32 × 32 shift" in words and "Softmax 6 integers – –" in words
    assert "<h2>Bits</h2>" in render_page(record)


def test_bytes_are_told_beside_parameters(bits_run: dict):
    record = RunRecord.from_dict(bits_run)
    assert "On disk 12.5 % 1.43 MiB of 11.4 MiB" in text_of(sections.tiles(record))
    assert "On disk 11.4 MiB 1.43 MiB 12.5 % 8.00×" in text_of(sections.size(record))
    bits_run["final"]["bytes_on_disk"] = None
    assert "On disk" not in text_of(sections.tiles(RunRecord.from_dict(bits_run)))


def test_a_model_of_few_bits_whose_tokens_leave_is_not_as_large_as_before(bits_run: dict, dropping_run: dict):
    assert bits_run is dropping_run, "the second fixture changes the record of the first"
    both = RunRecord.from_dict(dropping_run)
    assert "as large as before" not in text_of(sections.size(both))
    del dropping_run["bits"]
    assert "as large as before" in text_of(sections.size(RunRecord.from_dict(dropping_run)))


def test_where_nothing_was_quantised_there_is_no_section(run: dict):
    assert bits(RunRecord.from_dict(run)) == ""
    assert "On disk" not in text_of(sections.tiles(RunRecord.from_dict(run)))

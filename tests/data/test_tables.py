import json

import pyarrow
import pyarrow.parquet
import pytest

from lightning_compress.data.tables import column, read_columns


def test_tsv_is_read_without_quoting(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"so called" fun\t1\nan "open quote\t0\n\n', encoding="utf-8")
    assert read_columns(path) == {"text": ['"so called" fun', 'an "open quote'], "label": ["1", "0"]}


def test_tsv_keeps_unicode_line_separators_inside_a_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("\ufefftext\tlabel\none\u2028two\x85three\t1\n", encoding="utf-8")
    assert read_columns(path) == {"text": ["one\u2028two\x85three"], "label": ["1"]}


def test_csv_is_read_with_quotes_and_line_ends_inside_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one, ""two""\nthree",1\n', encoding="utf-8")
    assert read_columns(path) == {"text": ['one, "two"\nthree'], "label": ["1"]}


def test_jsonl_and_parquet_keep_types_and_mark_what_is_absent(tmp_path):
    rows = [{"text": "one", "label": 1}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = {"text": ["one", "two"], "label": [1, None]}
    assert read_columns(tmp_path / "a.jsonl") == expected
    assert read_columns(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "is empty"),
        ("a.tsv", "text\tlabel\n", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.tsv", "text\tlabel\none\n", "record 2 has 1 fields, the first line names 2"),
        ("a.tsv", "text\ttext\none\ttwo\n", "names a column twice"),
        ("a.csv", 'text,label\n"open,1\n', "not well-formed CSV"),
        ("a.jsonl", '{"text": 1}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 must be a JSON object, is a list"),
        ("a.parquet", "no parquet", "not a readable parquet file"),
        ("a.xlsx", "x", r"unknown extension '.xlsx'; known are .tsv, .csv, .jsonl, .ndjson, .parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_columns(tmp_path / name)


def test_a_missing_file_a_folder_and_a_wrong_encoding_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.tsv' does not exist"):
        read_columns(tmp_path / "nothing.tsv")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_columns(tmp_path)
    (tmp_path / "latin.csv").write_bytes("text\nÄ\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_columns(tmp_path / "latin.csv")


def test_an_absent_column_is_named_with_those_present_and_the_argument():
    with pytest.raises(ValueError, match=r"the file has no column 'body'; it has \['text'\].*`text_column`"):
        column({"text": ["a"]}, "body", "the file", "text_column")

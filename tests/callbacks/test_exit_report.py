"""What the report says of exits agrees with what the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress import Compressor, MultiExitConfig, set_exit_threshold
from lightning_compress.callbacks import CompressionReport, ContributionTokenDropping, MultiExit
from lightning_compress.callbacks.exit_report import has_exits, measure_exits
from lightning_compress.metrics import ExitDepth
from lightning_compress.nn.flops import count_flops
from lightning_compress.nn.kept_flops import count_kept_flops
from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.trial import kept_counts
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer
from tests.toys_exits import labelled_batches

LENGTHS = [[9, 4, 12, 2, 7], [7, 1, 5, 11]]


def run(folder: Path, module: ToyModule, *methods: Any, **settings: Any) -> dict[str, Any]:
    report = CompressionReport(str(folder), lengths=[6], every_n_steps=2)
    trainer = toy_trainer(callbacks=[report, *methods], max_steps=12, **settings)
    trainer.fit(module, toy_loader(48), toy_loader(24))
    return json.loads((folder / "report.json").read_text())


def exiting_bert(num_labels: int = 2, **settings: Any) -> torch.nn.Module:
    model = tiny_bert(num_hidden_layers=4, initializer_range=0.3, num_labels=num_labels)
    compressor = Compressor(model, [MultiExitConfig(**settings)])
    compressor.prepare()
    compressor.convert()
    for head in model.exits.values():
        head.classifier.weight.data.mul_(50.0)  # sure of something
    return model.eval()


def test_a_run_with_exits_leaves_a_page_about_them(tmp_path: Path) -> None:
    data = run(tmp_path, ToyModule(num_hidden_layers=4), MultiExit(target_flops=0.8))
    page, exits = (tmp_path / "report.html").read_text(), data["exits"]
    assert "<h2>Exits</h2>" in page and 'id="thresholds-' in page
    assert exits["num_texts"] == 24 and exits["rule"] == "entropy"
    assert data["final"]["flops"]["dense"] == count_flops(tiny_bert(num_hidden_layers=4), [6]).total
    spent = data["final"]["flops"]["compressed"] / data["final"]["flops"]["dense"]
    assert 0.3 < spent <= 0.8
    assert exits["curve"][0]["threshold"] is None and exits["curve"][0]["flops_ratio"] == 1.0
    assert min(point["flops_ratio"] for point in exits["curve"]) < 0.8
    assert sum(exits["leaves"][:-1]) > 0 and exits["threshold"] > 0
    assert data["metrics"]["compressed"] is None, "validation ran before there was a threshold"
    assert len(data["warnings"]) == 1 and "call trainer.validate" in data["warnings"][0]


def test_exits_that_nobody_uses_yet_are_reported_too(tmp_path: Path) -> None:
    data = run(tmp_path, ToyModule(num_hidden_layers=4), MultiExit())
    assert data["exits"]["threshold"] is None and data["exits"]["asked"] == []
    assert data["exits"]["leaves"] == [0.0, 0.0, 0.0, 1.0]
    assert data["final"]["flops"]["compressed"] == data["final"]["flops"]["dense"]


def test_where_validation_never_ran_its_data_are_looked_up(tmp_path: Path) -> None:
    settings = {"num_sanity_val_steps": 0, "val_check_interval": 1000, "check_val_every_n_epoch": None}
    data = run(tmp_path, ToyModule(num_hidden_layers=4), MultiExit(threshold=0.6), **settings)
    assert data["exits"]["num_texts"] == 24


@pytest.mark.filterwarnings("ignore:target_flops")
def test_tokens_and_texts_that_leave_are_told_apart_and_priced_together(tmp_path: Path) -> None:
    methods = (
        ContributionTokenDropping(target_flops=0.6, warmup=0.2, threshold_init=0.99),
        MultiExit(threshold=0.6),
    )
    data = run(tmp_path, ToyModule(num_hidden_layers=4), *methods)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Exits</h2>" in page and "<h2>Tokens</h2>" in page
    assert data["exits"]["curve"][0]["flops_ratio"] < 1.05, "tokens are dropped, whoever leaves"


@pytest.mark.parametrize("rule", [{"threshold": 0.6}, {"rule": "patience", "threshold": 1}])
def test_what_is_measured_is_what_a_pass_from_which_texts_leave_does(rule: dict[str, Any]) -> None:
    model, batches = exiting_bert(**rule), labelled_batches(LENGTHS)
    found = measure_exits(model, tiny_bert(num_hidden_layers=4), batches)
    assert found is not None
    depth, spent, right = ExitDepth(4), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            out = model(batch["input_ids"], batch["attention_mask"])
            depth.update(out.exit_depth)
            right += int((out.logits.argmax(-1) == batch["labels"]).sum())
            kept_BL = kept_counts(packed_encoder(model))
            spent += count_kept_flops(model, kept_BL, batch["attention_mask"].sum(1)).sum().item()
    assert 1.0 < found.record.mean_depth < 4.0
    assert found.record.leaves == pytest.approx(depth.shares_L.tolist())
    assert found.flops == pytest.approx(spent / 9)
    here = next(point for point in found.record.curve if point.threshold == found.record.threshold)
    assert here.mean_depth == pytest.approx(found.record.mean_depth)
    assert here.score == right / 9
    assert here.flops_ratio == pytest.approx(found.flops / found.dense_flops)


def test_without_labels_there_is_no_curve_and_without_texts_or_exits_nothing() -> None:
    model, dense = exiting_bert(threshold=0.6), tiny_bert(num_hidden_layers=4)
    bare = [{name: v for name, v in batch.items() if name != "labels"} for batch in labelled_batches(LENGTHS)]
    found = measure_exits(model, dense, bare)
    assert found is not None and found.record.curve == () and found.record.mean_depth < 4
    assert measure_exits(model, dense, []) is None
    assert measure_exits(dense, dense, bare) is None


def test_regression_is_scored_by_correlation() -> None:
    model = exiting_bert(rule="patience", num_labels=1, tolerance=0.5)
    batches = [{**batch, "labels": batch["labels"].float()} for batch in labelled_batches(LENGTHS)]
    found = measure_exits(model, tiny_bert(num_hidden_layers=4), batches)
    assert found is not None and found.record.metric == "correlation"
    logits = torch.cat([model(b["input_ids"], b["attention_mask"]).logits[:, 0] for b in batches])
    by_hand = torch.corrcoef(torch.stack([logits, torch.cat([b["labels"] for b in batches])]))[0, 1]
    assert found.record.curve[0].score == pytest.approx(by_hand.item(), abs=1e-5)


def test_only_runs_that_train_exits_have_them() -> None:
    compressor = Compressor(tiny_bert(), [MultiExitConfig()])
    assert not has_exits(compressor)
    compressor.prepare()
    assert has_exits(compressor)
    compressor.convert()
    assert has_exits(compressor)
    set_exit_threshold(compressor.model, 0.5)

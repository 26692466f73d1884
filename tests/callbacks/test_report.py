"""The report of a real (tiny) run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.callbacks import CompressionReport, SoftThresholdRank
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.report import render_run
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer


@pytest.mark.parametrize("report_first", [True, False])
def test_a_run_leaves_a_report_that_agrees_with_the_model(tmp_path: Path, report_first: bool) -> None:
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4)
    report = CompressionReport(
        str(tmp_path / "report"), lengths=[6], every_n_steps=2, dense_metrics={"val/loss": 0.6}
    )
    module = ToyModule()
    callbacks = [report, method] if report_first else [method, report]
    toy_trainer(callbacks=callbacks, max_steps=12).fit(module, toy_loader(), toy_loader())
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    dense, compressed = count_parameters(tiny_bert()), count_parameters(module.model)
    assert data["final"]["parameters"]["dense"]["total"] == dense.total
    assert data["final"]["parameters"]["compressed"]["linear"] == compressed.linear <= 0.5 * dense.linear
    assert data["final"]["flops"]["dense"] == count_flops(tiny_bert(), [6]).total
    assert [step["step"] for step in data["steps"]] == [2, 4, 6, 8, 10, 12]
    assert {step["phase"] for step in data["steps"]} == {"warmup", "search", "recovery"}
    assert data["steps"][-1]["size_ratio"] == compressed.linear / dense.linear
    assert data["metrics"]["dense"] == {"val/loss": 0.6} and "val/loss" in data["metrics"]["compressed"]
    assert "<html" in (tmp_path / "report" / "report.html").read_text()
    assert render_run(tmp_path) == tmp_path / "report" / "report.html"


class LogsMuch(ToyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict({"interval": 1.0, "glossary": 1.0, "train_loss": 1.0, "compress/other": 1.0})
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val_acc": 0.5, "evaluations": 1.0})


def test_only_losses_and_terms_are_losses_and_only_validation_is_a_metric(tmp_path: Path) -> None:
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4, exclude=["*layer.0*"], threshold_lr=1e-9)
    report = CompressionReport(str(tmp_path), lengths=[6], every_n_steps=1)
    trainer = toy_trainer(callbacks=[method, report], max_epochs=2, log_every_n_steps=1)
    trainer.fit(LogsMuch(), toy_loader(), toy_loader())
    data = json.loads((tmp_path / "report.json").read_text())
    assert set(data["metrics"]["compressed"]) == {"val_acc"}
    term = "compress/soft_threshold_rank/size_over_budget"
    losses = {step["phase"]: set(step["loss"]) for step in data["steps"]}
    assert losses["search"] == {"train_loss", "train/loss", term}
    assert losses["warmup"] == losses["recovery"] == {"train_loss", "train/loss"}
    logged = float(trainer.callback_metrics["compress/soft_threshold_rank/size_ratio"])
    assert data["steps"][-1]["size_ratio"] == pytest.approx(logged, rel=1e-6)


def test_a_report_without_a_method_says_that_it_is_empty(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to report"):
        toy_trainer(callbacks=[CompressionReport(str(tmp_path))], max_steps=1).fit(ToyModule(), toy_loader())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"lengths": []}, {"lengths": [0]}], ids=str)
def test_numbers_below_one_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CompressionReport(**bad)

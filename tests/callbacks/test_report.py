"""The report of a real (tiny) run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lightning_compress import quantize, save_pretrained
from lightning_compress.callbacks import (
    BlockQuantization,
    CompressionCallback,
    CompressionReport,
    ContributionTokenDropping,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
    convert,
)
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


def test_metrics_of_a_model_before_it_was_rounded_are_not_those_of_the_integers(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[BlockQuantization(preset="w4a4", block=(0, 0)), report], max_epochs=1)
    trainer.fit(module, toy_loader(), toy_loader())
    of_floats = float(trainer.callback_metrics["val/loss"])
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["metrics"]["compressed"] is None
    assert len(data["warnings"]) == 1 and "call trainer.validate(module, ...)" in data["warnings"][0]
    trainer.validate(module, toy_loader(), verbose=False)
    completed = json.loads((tmp_path / "report.json").read_text())
    assert completed["warnings"] == [] and completed["final"] == data["final"]
    measured = completed["metrics"]["compressed"]["val/loss"]
    assert measured == float(trainer.callback_metrics["val/loss"]) != of_floats
    assert f"{measured:.4g}" in (tmp_path / "report.html").read_text()


def test_a_run_that_leaves_no_trace_in_the_model_is_reported_on_again(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[Distillation(start=0.3), report], max_epochs=2)
    trainer.fit(module, toy_loader(), toy_loader())
    (tmp_path / "report.json").unlink()
    trainer.validate(module, toy_loader(), verbose=False)
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["compressed"]["val/loss"] > 0


def test_validating_another_model_leaves_the_report_alone(tmp_path: Path) -> None:
    report = CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[BlockQuantization(), report], max_epochs=1)
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    other = ToyModule()
    toy_trainer(callbacks=[BlockQuantization()], max_steps=1).fit(other, toy_loader())
    before = (tmp_path / "report.json").read_text()
    for module in (ToyModule(), other):
        trainer.validate(module, toy_loader(), verbose=False)
        assert (tmp_path / "report.json").read_text() == before


def test_a_validation_that_logs_no_metric_leaves_the_report_alone(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[BlockQuantization(start=0.0, ramp_end=0.1), report], max_epochs=1)
    trainer.fit(module, toy_loader(), toy_loader())
    before = (tmp_path / "report.json").read_text()
    assert json.loads(before)["metrics"]["compressed"] is not None
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    trainer.validate(module, toy_loader(), verbose=False)
    assert (tmp_path / "report.json").read_text() == before


@pytest.mark.parametrize(
    "method",
    [lambda: WidthSlimming(heads=2, end=0.5), lambda: SoftThresholdRank(target_params=0.5, rank_multiple=4)],
    ids=["widths", "ranks"],
)
def test_a_model_that_was_compressed_further_after_fit_is_not_reported_on(
    tmp_path: Path, method: Callable[[], CompressionCallback]
) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[method(), report], max_epochs=2)
    trainer.fit(module, toy_loader(), toy_loader())
    before = (tmp_path / "report.json").read_text()
    quantize(module, "w4a8")
    with pytest.warns(UserWarning, match="compressed further after fit"):
        trainer.validate(module, toy_loader(), verbose=False)
    assert (tmp_path / "report.json").read_text() == before
    pickle.dumps(report)


def test_metrics_of_some_steps_before_the_end_are_said_to_be(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path), lengths=[6])
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4)
    trainer = toy_trainer(callbacks=[method, report], max_epochs=3, check_val_every_n_epoch=2)
    trainer.fit(module, toy_loader(), toy_loader())
    data = json.loads((tmp_path / "report.json").read_text())
    steps = trainer.global_step // 3
    assert f"Metrics are those of {steps} steps before training ended" in data["warnings"][0]
    trainer.validate(module, toy_loader(), verbose=False)
    completed = json.loads((tmp_path / "report.json").read_text())
    assert completed["warnings"] == [] and completed["steps"] == data["steps"]
    assert completed["metrics"]["compressed"] != data["metrics"]["compressed"]


def test_a_model_that_is_converted_later_is_told_when_it_is_validated(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[BlockQuantization(convert=False), report], max_epochs=1)
    trainer.fit(module, toy_loader(), toy_loader())
    assert json.loads((tmp_path / "report.json").read_text())["final"] is None
    convert(module)
    trainer.validate(module, toy_loader(), verbose=False)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["final"]["bytes_on_disk"]["compressed"] < data["final"]["bytes_on_disk"]["dense"]
    assert data["bits"]["operators"][0]["bits"] == 8 and data["metrics"]["compressed"]["val/loss"] > 0


@pytest.mark.parametrize(
    ("method", "is_known"),
    [
        (lambda: BlockQuantization(start=0.2, ramp_end=0.5), True),
        (lambda: SoftThresholdRank(target_params=0.5, rank_multiple=4), True),
        (lambda: WidthSlimming(heads=2), True),
        (lambda: MultiExit(threshold=0.3), True),
        (lambda: MultiExit(target_flops=0.7), False),
        (lambda: ContributionTokenDropping(warmup=0.2), True),
        (lambda: ContributionTokenDropping(warmup=0.2, max_drop=0.1), False),
    ],
    ids=[
        "rounded",
        "ranks",
        "widths",
        "exits",
        "goal of exits",
        "tokens",
        "dial of tokens",
    ],
)
def test_metrics_are_told_where_the_last_validation_was_of_the_model_as_it_became(
    tmp_path: Path, method: Callable[[], CompressionCallback], is_known: bool
) -> None:
    report = CompressionReport(str(tmp_path), lengths=[6])
    trainer = toy_trainer(callbacks=[report, method()], max_epochs=3)
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["metrics"]["compressed"] is not None) == is_known
    assert any("trainer.validate" in note for note in data["warnings"]) != is_known


def test_bits_and_bytes_are_those_of_the_saved_model(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path / "report"), lengths=[6])
    trainer = toy_trainer(callbacks=[BlockQuantization(preset="w4a8"), report], max_steps=2)
    trainer.fit(module, toy_loader())
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    save_pretrained(module, tmp_path / "small")
    tiny_bert().save_pretrained(tmp_path / "dense")
    for name, folder in (("dense", "dense"), ("compressed", "small")):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            held = [file.get_tensor(key) for key in file.offset_keys()]
        assert data["final"]["bytes_on_disk"][name] == sum(h.numel() * h.element_size() for h in held)
    assert [row["operator"] for row in data["bits"]["operators"]] == [
        "linear weights",
        "inputs of linears",
        "tables",
    ]
    assert "<h2>Bits</h2>" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"lengths": []}, {"lengths": [0]}], ids=str)
def test_numbers_below_one_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CompressionReport(**bad)

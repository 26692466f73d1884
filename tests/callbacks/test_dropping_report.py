"""What the report says of dropped tokens agrees with what the model does."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_compress import Compressor
from lightning_compress.callbacks import CompressionReport, ContributionTokenDropping, SoftThresholdRank
from lightning_compress.callbacks.dropping_report import SeenBatches, dropping_handle, dropping_in_step
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig, update
from lightning_compress.nn.flops import count_flops
from tests.toys import ToyModule, ToyTexts, tiny_bert, toy_loader, toy_trainer
from tests.toys_dropping import ToyTokenizer, ragged_batch

FAST: dict[str, Any] = {"warmup": 0.2, "threshold_init": 0.99}


class ToyData(ToyModule):
    """Carries a tokenizer, as a data module would."""

    def __init__(self, **overrides: Any) -> None:
        super().__init__(**overrides)
        self.tokenizer = ToyTokenizer()


def run(
    folder: Path, module: ToyModule, method: ContributionTokenDropping, **settings: Any
) -> dict[str, Any]:
    report = CompressionReport(str(folder), lengths=[6], every_n_steps=2)
    trainer = toy_trainer(callbacks=[report, method], max_steps=20, **settings)
    trainer.fit(module, toy_loader(80), toy_loader(24))
    return json.loads((folder / "report.json").read_text())


def test_a_run_that_drops_tokens_leaves_a_page_about_them(tmp_path: Path) -> None:
    module = ToyData()
    data = run(tmp_path, module, ContributionTokenDropping(target_flops=0.6, **FAST))
    page, dropping = (tmp_path / "report.html").read_text(), data["dropping"]
    assert "<h2>Tokens</h2>" in page and "scheduled" in page and 'id="dial-' in page
    assert dropping["num_texts"] == 24
    assert len(dropping["texts"]) == 12 and len(dropping["curve"]) == 5
    assert all(token.startswith(("w", "<s>")) for text in dropping["texts"] for token in text["tokens"])
    assert data["final"]["flops"]["dense"] == count_flops(tiny_bert(), [6]).total
    deployed = next(
        point for point in dropping["curve"] if point["scale"] == pytest.approx(dropping["scale"])
    )
    spent = data["final"]["flops"]["compressed"] / data["final"]["flops"]["dense"]
    assert deployed["flops_ratio"] == pytest.approx(spent)
    assert dropping["curve"][0]["flops_ratio"] > 1.0, "nothing is dropped, and the predictors cost"
    assert data["warnings"] == []


def test_steps_tell_what_was_measured_and_what_was_scheduled(tmp_path: Path) -> None:
    data = run(tmp_path, ToyModule(), ContributionTokenDropping(target_flops=0.6, **FAST))
    first, last = data["steps"][0], data["steps"][-1]
    assert (first["phase"], first["flops_ratio"], first["target"]) == ("warmup", 1.0, 1.0)
    assert (last["phase"], last["target"]) == ("recovery", pytest.approx(0.6))
    assert last["flops_ratio"] == last["ratio"] < 1.0
    assert last["tokens_kept"] < 1.0 and last["size_ratio"] == 1.0 and last["threshold"] > 0


def test_a_goal_by_default_is_the_target_that_is_shown(tmp_path: Path) -> None:
    assert run(tmp_path, ToyModule(), ContributionTokenDropping(**FAST))["target"]["target_flops"] == 0.5


@pytest.mark.filterwarnings("ignore:No validation batch")
def test_without_validation_data_flops_are_those_of_training_and_the_page_says_so(tmp_path: Path) -> None:
    report = CompressionReport(str(tmp_path), lengths=[6], every_n_steps=2)
    trainer = toy_trainer(callbacks=[report, ContributionTokenDropping(**FAST)], max_steps=20)
    with pytest.warns(UserWarning, match="No validation batch"):
        trainer.fit(ToyModule(), toy_loader(80))
    data = json.loads((tmp_path / "report.json").read_text())
    assert "dropping" not in data and "No validation batch" in data["warnings"][0]
    flops = data["final"]["flops"]
    assert flops["compressed"] == pytest.approx(data["steps"][-1]["flops_ratio"] * flops["dense"])
    assert "<h2>Tokens</h2>" not in (tmp_path / "report.html").read_text()


def test_where_validation_never_ran_its_data_are_looked_up(tmp_path: Path) -> None:
    method = ContributionTokenDropping(**FAST)
    settings = {"num_sanity_val_steps": 0, "val_check_interval": 1000, "check_val_every_n_epoch": None}
    data = run(tmp_path, ToyData(), method, **settings)
    assert data["metrics"]["compressed"] == {}
    assert data["dropping"]["num_texts"] == 24


def test_looking_up_draws_no_random_numbers_and_keeps_to_the_limit() -> None:
    loader = DataLoader(ToyTexts(), batch_size=4, shuffle=True)
    trainer: Any = SimpleNamespace(val_dataloaders=loader, num_val_batches=[3])
    before, seen = torch.random.get_rng_state(), SeenBatches()
    seen.look_up(trainer)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [len(batch["input_ids"]) for batch in seen.batches] == [4, 4, 4]


@pytest.mark.parametrize(("loaders", "limits"), [(None, []), ([], []), (toy_loader(), [0])])
def test_there_may_be_nothing_to_look_up(loaders: Any, limits: list[int]) -> None:
    seen = SeenBatches()
    seen.look_up(SimpleNamespace(val_dataloaders=loaders, num_val_batches=limits))  # type: ignore[arg-type]
    assert seen.batches == []


def test_a_run_that_drops_nothing_keeps_no_texts(tmp_path: Path) -> None:
    report = CompressionReport(str(tmp_path), lengths=[6], every_n_steps=2)
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4)
    toy_trainer(callbacks=[report, method], max_steps=4).fit(ToyModule(), toy_loader(), toy_loader())
    assert report._seen.batches == []
    assert "dropping" not in json.loads((tmp_path / "report.json").read_text())


def latest_pass(**goal: float) -> tuple[float, dict[str, float]]:
    compressor = Compressor(tiny_bert(), [ContributionTokenDroppingConfig(**goal, **FAST)])
    compressor.prepare()
    handle: Any = dropping_handle(compressor)
    assert dropping_in_step(handle)[0] == 1.0, "nothing is dropped in the warm-up"
    update(handle, 0.5)
    compressor.begin_step()
    batch = ragged_batch([6, 3, 4])
    compressor.model(**batch)
    compressor.take_loss_terms()
    compressor.begin_step()
    assert (
        dropping_in_step(handle, {"x": batch})[0]
        == handle.metrics()["tokens_kept" if "target_tokens" in goal else "ratio"]
    )
    return dropping_in_step(handle, batch)


def test_a_token_target_still_tells_flops() -> None:
    torch.manual_seed(0)
    share, known = latest_pass(target_tokens=0.5)
    torch.manual_seed(0)
    expected, of_flops = latest_pass(target_flops=0.5)
    assert share == pytest.approx(expected) == of_flops["ratio"]
    assert known["ratio"] == known["tokens_kept"] == pytest.approx(of_flops["tokens_kept"]) != share
    assert 0.5 < known["target"] == of_flops["target"] < 1.0


def test_batches_are_kept_once_up_to_a_limit_and_in_order() -> None:
    seen = SeenBatches()
    for index in (1, 0, 1, *range(2, 30)):
        seen.see(
            {"input_ids": torch.full((40, 2), index), "label": torch.zeros(40), "text": ["a"] * 40}, index
        )
    sizes = [len(batch["input_ids"]) for batch in seen.batches]
    assert sum(sizes) == 320 and len(sizes) <= 10
    assert [int(batch["input_ids"][0, 0]) for batch in seen.batches] == list(range(len(sizes)))
    assert set(seen.batches[0]) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    "batch", [[torch.ones(2, 2)], {"x": 1}, {"input_ids": [[1]]}, SimpleNamespace(input_ids=1)], ids=str
)
def test_batches_of_another_kind_are_passed_over(batch: Any) -> None:
    seen = SeenBatches()
    seen.see(batch, 0)
    assert seen.batches == []


def test_batches_that_only_act_like_dicts_are_kept() -> None:
    seen = SeenBatches()
    seen.see(UserDict(input_ids=ToyTexts(2).ids), 0)
    assert torch.equal(seen.batches[0]["input_ids"], ToyTexts(2).ids)

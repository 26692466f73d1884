"""SoftThresholdRank as a callback: what the user sees of its course."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankHandle
from tests.toys import ToyModule, toy_loader, toy_trainer

PREFIX = "compress/soft_threshold_rank"


class Watch(Callback):
    """Keeps what is logged at each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_the_course_of_compression_is_logged() -> None:
    watch = Watch()
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4)
    toy_trainer(callbacks=[method, watch], max_steps=12, log_every_n_steps=1).fit(ToyModule(), toy_loader())
    ratios = [step[f"{PREFIX}/size_ratio"] for step in watch.seen]
    assert ratios[0] == 1.0 and ratios[-1] <= 0.5 and ratios == sorted(ratios, reverse=True)
    thresholds = [step[f"{PREFIX}/threshold"] for step in watch.seen]
    assert thresholds[0] == 0.0 and thresholds[6] > 0.0 and thresholds[6] == thresholds[-1]
    assert any(f"{PREFIX}/size_over_budget" in step for step in watch.seen)
    assert {f"{PREFIX}/rank_ratio", "train/loss"} <= set(watch.seen[0])


def test_sizes_are_counted_as_often_as_loggers_write_and_at_each_new_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = []
    metrics = SoftThresholdRankHandle.metrics
    monkeypatch.setattr(
        SoftThresholdRankHandle, "metrics", lambda self: counted.append(self.phase) or metrics(self)
    )
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4)
    trainer = toy_trainer(callbacks=[method], max_steps=12, log_every_n_steps=12)
    trainer.fit(ToyModule(), toy_loader())
    assert counted == ["warmup", "search", "recovery", "recovery"]
    assert 0.4 < float(trainer.callback_metrics[f"{PREFIX}/size_ratio"]) <= 0.5


@pytest.mark.parametrize(
    "settings", [{"regularizer": "exp"}, {"allocation": "uniform"}, {"init": "svd"}, {"relative": True}]
)
def test_every_way_to_compress_reaches_the_target(settings: dict[str, Any]) -> None:
    watch = Watch()
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4, **settings)
    toy_trainer(callbacks=[method, watch], max_steps=12, log_every_n_steps=1).fit(ToyModule(), toy_loader())
    assert 0.4 < watch.seen[-1][f"{PREFIX}/size_ratio"] <= 0.5


def test_settings_are_checked_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"target_params=2.0 is outside \(0, 1\]"):
        SoftThresholdRank(target_params=2.0)


def test_one_pattern_may_be_given_as_a_plain_string() -> None:
    assert SoftThresholdRank(include="*layer.0*").config.include == ("*layer.0*",)

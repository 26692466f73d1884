"""BottleneckTokenDropping as a callback: what users see of its course, and runs that are killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_compress import load, save_pretrained, set_threshold_scale
from lightning_compress.callbacks import BottleneckTokenDropping, ContributionTokenDropping, SoftThresholdRank
from lightning_compress.runtime import is_packed, packed_encoder
from lightning_compress.runtime.dial import threshold_scale
from tests.toys import ToyModule, toy_loader, toy_trainer
from tests.toys_runs import (
    DROPOUT,
    Scheduled,
    Watch,
    differences,
    every_step,
    interrupted_and_resumed,
    resumptions,
    run_to_the_end,
)

STEM = "bottleneck_token_dropping"
PREFIX = f"compress/{STEM}"
SETTINGS: dict[str, Any] = {"target_tokens": 0.7, "warmup": 0.2, "ramp_end": 0.6}


@pytest.mark.filterwarnings("ignore:training ended in phase")  # sixteen steps may miss the target
def test_the_course_of_dropping_is_logged_and_the_model_runs_packed_in_the_end() -> None:
    watch, module = Watch(), ToyModule()
    method = BottleneckTokenDropping(**SETTINGS)
    toy_trainer(callbacks=[method, watch], max_steps=16, log_every_n_steps=1).fit(module, toy_loader())
    assert f"{PREFIX}/norm" not in watch.seen[3] and f"{PREFIX}/norm" in watch.seen[4]
    assert f"{PREFIX}/entropy" in watch.seen[0]
    assert {f"{PREFIX}/{name}" for name in ("ratio", "tokens_kept", "threshold")} <= set(watch.seen[-1])
    kept = [step[f"{PREFIX}/tokens_kept"] for step in watch.seen]
    assert kept[0] == 1.0 and min(kept) < 1.0
    assert watch.seen[3][f"{PREFIX}/threshold"] == 0.0 < watch.seen[-1][f"{PREFIX}/threshold"]
    assert is_packed(module)


def test_what_was_trained_is_saved_and_opened_with_its_samplers(tmp_path: Path) -> None:
    module = ToyModule()
    method = BottleneckTokenDropping(removal_weight=1.0, warmup=0.0, sampler_width=6)
    toy_trainer(callbacks=[method]).fit(module, toy_loader())
    set_threshold_scale(module, 2.0**17)
    save_pretrained(module, tmp_path)
    again, batch = load(tmp_path).eval(), next(iter(toy_loader()))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, module.model.eval()(**batch).logits)
    kept = [segments.num_rows for segments in packed_encoder(again).latest]
    assert kept == [4, 4]  # the dial is saved too: only first tokens stay


def test_the_dial_is_set_on_validation_data_when_fit_ends() -> None:
    module = ToyModule()
    method = BottleneckTokenDropping(removal_weight=1.0, warmup=0.0, sampler_width=6, max_drop=0.99)
    toy_trainer(callbacks=[method]).fit(module, toy_loader(), toy_loader(8))
    assert method.chosen is not None and method.chosen.tokens_kept_L[1] < 1.0
    assert threshold_scale(module.model) == pytest.approx(method.chosen.scale) and method.chosen.scale > 1.0
    with pytest.raises(ValueError, match="leave convert=False out"):
        BottleneckTokenDropping(max_drop=0.01, convert=False)


def test_the_two_policies_in_one_run_are_refused_before_it_starts() -> None:
    callbacks: list[Callback] = [BottleneckTokenDropping(), ContributionTokenDropping()]
    for order in (callbacks, callbacks[::-1]):
        with pytest.raises(ValueError, match="keep one of the two callbacks"):
            toy_trainer(callbacks=order, max_steps=1).fit(ToyModule(), toy_loader())


@pytest.mark.filterwarnings("ignore:training ended in phase")  # twelve steps may miss the target
def test_low_rank_and_dropped_tokens_are_two_callbacks_in_any_order() -> None:
    rank = SoftThresholdRank(target_params=0.5, rank_multiple=4)
    drop = BottleneckTokenDropping(removal_weight=9.0, sampler_lr=0.05)
    methods = []
    for order in ([rank, drop], [drop, rank]):
        module = ToyModule()
        toy_trainer(callbacks=order, max_steps=12).fit(module, toy_loader())
        assert is_packed(module)
        methods.append(sorted(module.state_dict()))
    assert methods[0] == methods[1]


def run(
    callbacks: list[Callback], ckpt_path: Path | None = None, seed: int = 0, **settings: Any
) -> dict[str, Any]:
    """Fit with dropout; return what must be equal at the end."""
    method = BottleneckTokenDropping(**{**SETTINGS, "convert": False, **settings})
    return run_to_the_end(Scheduled(**DROPOUT), [method, *callbacks], ckpt_path=ckpt_path, seed=seed)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "variant",
    [{}, {"target_flops": 0.7, "target_tokens": None, "penalize": "samples"}],
    ids=["tokens", "FLOPs"],
)
def test_a_run_killed_in_any_phase_ends_as_the_uninterrupted_one(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    whole = run([every_step(tmp_path)], **variant)
    assert whole["phases"][STEM] == "recovery"
    phases = []
    for step, saved, resumed in resumptions(run, (1, 3, 5, 7, 10), tmp_path, STEM, **variant):
        phases.append(saved["phase"])
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) == {"warmup", "search", "recovery"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_an_exception_in_mid_batch_leaves_no_trace_after_resuming(hook: str, tmp_path: Path) -> None:
    whole = run([])
    for step in (3, 5, 9):
        resumed = interrupted_and_resumed(run, step, hook, tmp_path)
        assert differences(whole, resumed) == [], f"stopped in step {step}"

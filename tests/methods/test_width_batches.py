"""The sample of batches that importance is read off: which, by which seed, fixed from when on, over a resumed run."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_compress.methods.width_batches import BatchRecorder, PassClock, lot
from tests.toys import tiny_bert
from tests.toys_slimming import batch, slimmed


class Plain(nn.Module):
    """Takes labels and returns them."""

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return labels


def passes(recorder: BatchRecorder, model: nn.Module, numbers: range) -> None:
    for number in numbers:
        model.train()(torch.tensor([number]))
        recorder.settle()


def numbers_of(recorder: BatchRecorder) -> list[int]:
    return [int(one["labels"]) for one in recorder.batches]


def sampled(size: int, seed: int, total: int) -> list[int]:
    model = Plain()
    recorder = BatchRecorder(size, seed).attach(model)
    passes(recorder, model, range(total))
    return numbers_of(recorder)


def test_training_passes_are_kept_with_all_their_tensors_once_they_are_settled() -> None:
    model = tiny_bert()
    recorder = BatchRecorder(2).attach(model)
    for size in (1, 2):
        model.train()(batch(size)["input_ids"], labels=batch(size)["labels"])
    model.eval()(batch(5)["input_ids"])
    assert recorder.batches == [] and recorder.count == 0  # not part of the state yet
    recorder.settle()
    assert [len(one["labels"]) for one in recorder.batches] == [1, 2] and recorder.count == 2
    assert set(recorder.batches[0]) == {"input_ids", "labels"}
    recorder.detach()
    assert not model._forward_pre_hooks and recorder.batches == []


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("total", [3, 4, 50])
def test_the_passes_of_the_lowest_lots_are_kept_in_the_order_of_training(seed: int, total: int) -> None:
    lowest = sorted(range(total), key=lambda index: lot(seed, index))[:4]
    assert sampled(4, seed, total) == sorted(lowest)


def test_another_seed_is_another_sample_and_the_same_seed_the_same() -> None:
    assert sampled(4, 0, 50) == sampled(4, 0, 50)
    assert len({tuple(sampled(4, seed, 50)) for seed in range(10)}) == 10


def test_every_pass_is_as_likely_as_any_other() -> None:
    found = Counter(number for seed in range(600) for number in sampled(3, seed, 12))
    assert sum(found.values()) == 600 * 3
    assert all(abs(found[number] - 150) < 50 for number in range(12))  # 5 standard deviations are 53


def test_passes_that_were_not_settled_do_not_count_when_they_are_done_again() -> None:
    model, recorder = Plain(), BatchRecorder(4)
    recorder.attach(model)
    passes(recorder, model, range(6))
    state = recorder.state_dict()
    model.train()(torch.tensor([99]))  # stopped in this one
    again = Plain()
    second = BatchRecorder(4).attach(again)
    second.load_state_dict(state)
    passes(second, again, range(6, 30))
    assert numbers_of(second) == sampled(4, 0, 30)


@pytest.mark.parametrize("at", [0, 2, 5, 20])
def test_a_sample_that_was_saved_goes_on_as_if_nothing_had_happened(at: int) -> None:
    model, again = Plain(), Plain()
    first, second = BatchRecorder(4, 3).attach(model), BatchRecorder(4, 3).attach(again)
    passes(first, model, range(at))
    second.load_state_dict(first.state_dict())
    passes(second, again, range(at, 25))
    assert numbers_of(second) == sampled(4, 3, 25) and second.count == 25


def test_a_full_sample_stays_what_it_is_once_it_is_fixed() -> None:
    model, recorder = Plain(), BatchRecorder(3)
    recorder.attach(model)
    passes(recorder, model, range(10))
    before = numbers_of(recorder)
    recorder.fix()
    passes(recorder, model, range(10, 60))
    assert numbers_of(recorder) == before == sampled(3, 0, 10)


def test_a_sample_that_is_fixed_too_early_is_filled_first() -> None:
    model, recorder = Plain(), BatchRecorder(3)
    recorder.attach(model)
    passes(recorder, model, range(1))
    recorder.fix()
    passes(recorder, model, range(1, 60))
    assert numbers_of(recorder) == [0, 1, 2]


def test_a_sample_that_is_fixed_before_it_is_full_loses_nothing() -> None:
    recorder, model = BatchRecorder(2, 1), Plain()
    recorder.attach(model)
    assert lot(1, 2) < lot(1, 1) < lot(1, 0)  # by lots alone pass 0 would leave
    passes(recorder, model, range(1))
    recorder.fix()
    for number in (1, 2):
        model.train()(torch.tensor([number]))
    recorder.settle()
    assert numbers_of(recorder) == [0, 1]
    passes(recorder, model, range(3, 20))
    assert numbers_of(recorder) == [0, 1]


def test_nothing_is_heard_in_a_pause_or_without_gradients() -> None:
    model, recorder = Plain(), BatchRecorder(3)
    recorder.attach(model)
    with recorder.paused():
        passes(recorder, model, range(3))
    with torch.no_grad():
        passes(recorder, model, range(3))
    assert recorder.count == 0 and recorder.batches == []


def test_the_first_batch_without_labels_is_refused_not_the_first_step_of_the_schedule() -> None:
    model = tiny_bert().train()
    BatchRecorder(2).attach(model)
    with pytest.raises(ValueError, match=r"called with \['input_ids'\]: pass labels"):
        model(batch()["input_ids"])


def test_a_recorder_of_nothing_does_not_listen() -> None:
    model = tiny_bert()
    recorder = BatchRecorder(0).attach(model)
    assert not model._forward_pre_hooks
    recorder.settle()
    assert recorder.batches == []


def test_the_clock_counts_what_runs_within_and_its_share_since_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.chain([100.0, 103.0, 105.0, 106.0, 107.0], itertools.repeat(110.0))
    monkeypatch.setattr("lightning_compress.methods.width_batches.time.perf_counter", lambda: next(ticks))
    clock = PassClock()
    clock.start()  # 100
    with clock.running(torch.device("cpu")):  # 103 to 105
        clock.start()  # has begun long ago
    with pytest.raises(RuntimeError), clock.running(torch.device("cpu")):  # 106 to 107
        raise RuntimeError
    assert clock.seconds == 3.0
    assert clock.share == pytest.approx(0.3)


def test_the_cost_of_separate_passes_is_logged_where_there_are_some() -> None:
    handle = slimmed(10, heads=2, calibration_batches=2)
    assert 0.0 < handle.metrics()["calibration_share"] < 1.0
    assert handle.metrics()["calibration_seconds"] == handle.clock.seconds > 0.0
    assert not any(name.startswith("calibration") for name in slimmed(10, heads=2).metrics())


@pytest.mark.parametrize(("until", "done"), [(9, 0), (10, 1), (13, 1), (17, 2)])
def test_the_sample_is_that_of_the_passes_before_the_first_step_of_the_schedule(
    until: int, done: int
) -> None:
    # three heads of four leave at 0.43, 0.67 and 0.9 of twenty passes
    settings = {"calibration_batches": 2, "calibration_seed": 5, "start": 0.2, "end": 0.9}
    handle = slimmed(20, until=until, heads=1, **settings)
    saved = handle.state_dict()["batches"]
    assert handle.done == done and saved["count"] == 9 and saved["is_fixed"] == (done > 0)
    assert [index for index, _ in saved["kept"]] == sorted(range(9), key=lambda index: lot(5, index))[:2]

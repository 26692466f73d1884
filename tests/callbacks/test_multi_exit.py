"""MultiExit as a callback: what it adds to a loss, the threshold it chooses, and runs that are killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_compress import MultiExitLossMixin, choose_exit_threshold, load, save_pretrained
from lightning_compress.callbacks import (
    BottleneckTokenDropping,
    CompressionMixin,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    convert,
)
from lightning_compress.runtime import is_packed, packed_encoder
from tests.toys import ToyModule, toy_loader, toy_trainer
from tests.toys_exits import EVERYBODY_OF_TWO
from tests.toys_runs import (
    DROPOUT,
    Scheduled,
    Watch,
    differences,
    every_step,
    interrupted_and_resumed,
    resumptions,
    run_to_the_end,
    two_processes,
)

STEM = "multi_exit"
PREFIX = f"compress/{STEM}"
DEEP: dict[str, Any] = {"num_hidden_layers": 4}


def fitted(*callbacks: Any, module: ToyModule | None = None, **settings: Any) -> ToyModule:
    module = module or ToyModule(**DEEP)
    trainer = toy_trainer(callbacks=list(callbacks), **{"max_steps": 6, **settings})
    trainer.fit(module, toy_loader(), toy_loader(16))
    return module


def depths(model: Any) -> list[int]:
    with torch.no_grad():
        return torch.cat([model.eval()(**batch).exit_depth for batch in toy_loader(16)]).tolist()


def test_losses_of_the_exits_are_logged_and_the_model_runs_packed_in_the_end() -> None:
    watch = Watch()
    module = fitted(MultiExit(warmup=0.5, threshold=0.6), watch, log_every_n_steps=1)
    assert all({f"{PREFIX}/labels", f"{PREFIX}/final"} <= set(step) for step in watch.seen)
    weights = [step[f"{PREFIX}/exit_weight"] for step in watch.seen]
    assert weights == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0])
    assert watch.seen[0][f"{PREFIX}/labels"] == 0.0 < watch.seen[-1][f"{PREFIX}/labels"]
    assert is_packed(module) and list(module.model.exits) == ["0", "1", "2"]  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("goal", [{"target_flops": 0.7}, {"max_drop": 0.2}])
def test_the_threshold_is_chosen_on_validation_data_and_saved(goal: dict[str, float], tmp_path: Path) -> None:
    method = MultiExit(**goal)
    module = fitted(method)
    chosen = method.chosen
    assert chosen is not None and chosen.flops_ratio <= goal.get("target_flops", 0.99)
    assert float(module.model.exit_rule.threshold) == pytest.approx(chosen.threshold)  # type: ignore[union-attr]
    assert sum(depths(module.model)) / 16 == pytest.approx(chosen.mean_depth) and chosen.mean_depth < 4.0
    save_pretrained(module, tmp_path)
    assert depths(load(tmp_path)) == depths(module.model)


def test_a_goal_out_of_reach_is_told_and_the_training_is_not_lost() -> None:
    method = MultiExit(target_flops=0.05)
    with pytest.warns(UserWarning, match="target_flops=0.05 cannot be reached"):
        module = fitted(method)
    assert is_packed(module) and method.chosen is None
    assert set(depths(module.model)) == {4}


def test_a_threshold_counts_in_validation_while_training_too() -> None:
    seen: list[list[int]] = []

    class Validated(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.model(**batch).exit_depth.tolist())  # type: ignore[misc]

    fitted(
        MultiExit(threshold=EVERYBODY_OF_TWO),
        module=Validated(**DEEP),
        num_sanity_val_steps=0,
        max_epochs=1,
        max_steps=-1,
    )
    assert seen == [[1] * 4] * 4


def test_without_a_goal_nobody_leaves_and_the_log_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        module = fitted(MultiExit())
    assert "choose_exit_threshold" in caplog.text and set(depths(module.model)) == {4}
    choose_exit_threshold(module, toy_loader(16), target_flops=0.6)
    assert min(depths(module.model)) < 4


@pytest.mark.parametrize("goal", [{"target_flops": 0.5}, {"max_drop": 0.01}])
def test_goals_that_cannot_be_measured_are_refused_before_training(goal: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="leave convert=False out"):
        MultiExit(convert=False, **goal)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{next(iter(goal))}=.* is measured on validation data"):
        toy_trainer(callbacks=[MultiExit(**goal)]).fit(ToyModule(**DEEP), toy_loader())  # type: ignore[arg-type]

    class Pairs(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    pairs = DataLoader([(torch.ones(3), 1)] * 4, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dicts of the model's keyword arguments"):
        toy_trainer(callbacks=[MultiExit(**goal)]).fit(Pairs(**DEEP), toy_loader(), pairs)  # type: ignore[arg-type]


def test_all_methods_run_together_in_any_order(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            Distillation(hidden_weight=0.1),
            MultiExit(target_flops=0.8, pooling="mean"),
            BottleneckTokenDropping(removal_weight=9.0, warmup=0.0, ramp_end=0.5, sampler_lr=0.05),
            SoftThresholdRank(target_params=0.5, rank_multiple=4, warmup=0.1, search_end=0.5),
        ]

    ends = []
    for order in (callbacks(), callbacks()[::-1]):
        torch.manual_seed(0)
        module = fitted(*order, max_steps=6)
        ends.append(module.model.state_dict())  # type: ignore[union-attr]
        encoder = packed_encoder(module)
        assert encoder is not None and encoder.policy is not None and encoder.exits is not None
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    save_pretrained(module, tmp_path)
    assert depths(load(tmp_path)) == depths(module.model)


class Own(MultiExitLossMixin, ToyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss + self.exit_loss()  # type: ignore[misc]


class ByHand(ToyModule):
    def __init__(self, **overrides: Any) -> None:
        super().__init__(**overrides)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss)  # type: ignore[misc]
        optimizer.step()


def test_own_objectives_and_manual_optimization_end_as_the_automatic_run() -> None:
    ends = []
    for kind in (ToyModule, Own, ByHand):
        torch.manual_seed(3)
        module = fitted(MultiExit(dropout=0.0), module=kind(**DEEP))
        ends.append(module.model.state_dict())  # type: ignore[union-attr]
    for other in ends[1:]:
        assert all(torch.allclose(ends[0][name], other[name], atol=1e-5) for name in ends[0])


def test_gradient_checkpointing_ends_as_the_run_without() -> None:
    ends = []
    for is_checkpointed in (False, True):
        torch.manual_seed(3)
        module = ToyModule(**DEEP)
        if is_checkpointed:
            module.model.activation_checkpointing_enable()  # type: ignore[union-attr, operator]
        fitted(MultiExit(), module=module)
        ends.append(module.model.state_dict())  # type: ignore[union-attr]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[0])


class Parallel(CompressionMixin, ToyModule):
    """For processes that are forked."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(**batch)  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_train_all_exits_and_agree_on_the_threshold() -> None:
    module, method = Parallel(**DEEP), MultiExit(target_flops=0.7, rule="learned")
    trainer = two_processes(callbacks=[method], max_steps=4)
    trainer.fit(module, toy_loader(32, batch_size=2), toy_loader(16))
    assert trainer.state.finished and is_packed(module)
    assert 0.0 < float(module.model.exit_rule.threshold) < 1.0  # type: ignore[union-attr]


def run(callbacks: list[Callback], ckpt_path: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Fit with dropout; return what must be equal at the end."""
    method = MultiExit(warmup=0.4, rule="learned", threshold=0.5, convert=False)
    return run_to_the_end(Scheduled(**DROPOUT, **DEEP), [method, *callbacks], ckpt_path=ckpt_path, seed=seed)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_killed_after_any_step_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = run([every_step(tmp_path)])
    phases = []
    for step, saved, resumed in resumptions(run, (1, 4, 5, 9), tmp_path, STEM):
        phases.append(saved["phase"])
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) == {"warmup", "joint"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_optimizer_step"])
def test_an_exception_in_mid_batch_leaves_no_trace_after_resuming(hook: str, tmp_path: Path) -> None:
    whole = run([])
    assert differences(whole, interrupted_and_resumed(run, 5, hook, tmp_path)) == []


def test_a_checkpoint_of_a_converted_model_opens_in_a_plain_module(tmp_path: Path) -> None:
    module = Parallel(**DEEP)
    method, saves = MultiExit(target_flops=0.7), ModelCheckpoint(tmp_path, filename="last")
    trainer = toy_trainer(callbacks=[method, saves], enable_checkpointing=True)
    trainer.fit(module, toy_loader(), toy_loader(16))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = Parallel.load_from_checkpoint(tmp_path / "end.ckpt")
    assert depths(again.model) == depths(module.model) and min(depths(again.model)) < 4


def test_convert_can_wait() -> None:
    module = fitted(MultiExit(threshold=EVERYBODY_OF_TWO, convert=False))
    assert not is_packed(module) and set(depths(module.model)) == {1}
    convert(module)
    assert is_packed(module) and set(depths(module.model)) == {1}


class BoundEarly(ToyModule):
    """Makes its optimizer with the model, in groups with names, as a command line does."""

    def __init__(self, leaves_out: str = "") -> None:
        super().__init__(**DEEP)
        given = [(name, p) for name, p in self.named_parameters() if not leaves_out or leaves_out not in name]
        matrices = [pair for pair in given if pair[1].dim() > 1]
        vectors = [pair for pair in given if pair[1].dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def configure_optimizers(self) -> Any:
        return self.optimizer


def test_exits_join_an_optimizer_that_was_made_before_them() -> None:
    module = BoundEarly()
    fitted(MultiExit(rule="learned", convert=False), module=module)
    model: Any = module.model
    for group, dims in zip(module.optimizer.param_groups, (2, 1), strict=True):
        held = {id(p): name for p, name in zip(group["params"], group["param_names"], strict=True)}
        new = [p for p in [*model.exits.parameters(), *model.exit_rule.parameters()] if p.dim() == dims]
        assert len(new) == 4 and {id(p) for p in new} <= set(held)
        assert held[id(new[0])] == f"model.exits.0.classifier.{'weight' if dims == 2 else 'bias'}"
    weight = model.exits["0"].classifier.weight
    assert module.optimizer.state[weight]["step"] == 6


def test_exits_whose_like_is_in_no_optimizer_are_missed_before_training() -> None:
    with pytest.raises(RuntimeError, match=r"in no optimizer and would never change: .*classifier"):
        fitted(MultiExit(), module=BoundEarly(leaves_out="classifier"))

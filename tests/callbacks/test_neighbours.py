"""Beside us in the trainer: tuners, averaging, failures, and trainers that do not compress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from tests.toys import ToyModule, toy_loader, toy_trainer


class Tunable(ToyModule):
    def __init__(self, **overrides: Any) -> None:
        super().__init__(**overrides)
        self.lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Texts(LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return toy_loader(32, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return toy_loader(8)


def ranks(**settings: Any) -> SoftThresholdRank:
    return SoftThresholdRank(**{"target_params": 0.5, "rank_multiple": 4, **settings})


def fit(
    *callbacks: Callback, batch_size: int = 4, method: dict[str, Any] | None = None, **settings: Any
) -> tuple[Tunable, Texts]:
    torch.manual_seed(0)
    module, data = Tunable(hidden_dropout_prob=0.1), Texts(batch_size)
    checkpoints = any(isinstance(c, LearningRateFinder | BatchSizeFinder) for c in callbacks)
    method = ranks(**method or {})
    trainer = toy_trainer(
        callbacks=[*callbacks, method], max_epochs=2, enable_checkpointing=checkpoints, **settings
    )
    trainer.fit(module, datamodule=data)
    return module, data


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_search_for_the_learning_rate_leaves_no_trace(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    searched, _ = fit(finder, default_root_dir=tmp_path)
    assert finder.optimal_lr is not None and len(finder.optimal_lr.results["lr"]) > 0
    plain, _ = fit()
    assert any(isinstance(m, LowRankLinear) for m in plain.modules())
    assert equal(searched, plain)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_search_for_the_batch_size_leaves_no_trace(tmp_path: Path) -> None:
    finder = BatchSizeFinder(init_val=2, max_trials=2, steps_per_trial=2)
    searched, data = fit(finder, default_root_dir=tmp_path)
    plain, _ = fit(batch_size=data.batch_size)
    assert equal(searched, plain)


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)])
def test_averaging_is_refused_while_compressing_and_works_afterwards(averaging: Callback) -> None:
    with pytest.raises(ValueError, match="Compress first"):
        fit(averaging)
    module, data = fit()
    before = [p.detach().clone() for p in module.parameters()]
    toy_trainer(callbacks=[averaging, ranks()], max_epochs=2).fit(module, datamodule=data)
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_early_stopping_ends_in_a_converted_model() -> None:
    module, _ = fit(EarlyStopping("train/loss", patience=0, min_delta=1e9, check_on_train_epoch_end=True))
    assert any(isinstance(m, LowRankLinear) for m in module.modules())


class Stops(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize(("step", "said"), [(1, "phase warmup, after 6%"), (4, "phase search, after 25%")])
def test_a_run_stopped_before_recovery_says_that_the_model_had_none(step: int, said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        fit(Stops(step), method={"search_end": 0.9, "target_params": 0.3})
    module, _ = fit(Stops(step), method={"convert": False})
    assert any(isinstance(m, SoftThresholdLinear) for m in module.modules())


class FailsOnceError(RuntimeError): ...


class FailsOnce(Callback):
    failed = False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 3 and not self.failed:
            self.failed = True
            raise FailsOnceError


def traces(module: Tunable) -> tuple[Any, ...]:
    attributes = set(vars(module)) - {"_compression", "_trainer"}
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules() if not list(m.children())
    ]
    return type(module), attributes, sum(hooks), module.model.config._attn_implementation


def test_a_fit_after_a_failed_one_compresses_and_leaves_no_trace() -> None:
    module, failing = Tunable(), FailsOnce()
    before = traces(module)
    with pytest.raises(FailsOnceError):
        toy_trainer(callbacks=[ranks(), failing]).fit(module, toy_loader())
    toy_trainer(callbacks=[ranks(), failing]).fit(module, toy_loader())
    assert any(isinstance(m, LowRankLinear) for m in module.modules())
    assert traces(module) == before


def test_a_plain_fit_after_a_failed_one_has_nothing_of_ours() -> None:
    module = Tunable()
    before = traces(module)
    with pytest.raises(FailsOnceError):
        toy_trainer(callbacks=[ranks(), FailsOnce()]).fit(module, toy_loader())

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert traces(pl_module) == before

    trainer = toy_trainer(callbacks=[Looks()])
    trainer.fit(module, toy_loader())
    assert trainer.global_step == 6
    assert any(isinstance(m, SoftThresholdLinear) for m in module.modules())


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_other_verbs_leave_no_trace(verb: str) -> None:
    module = Tunable()
    before = traces(module)
    silent = {} if verb == "predict" else {"verbose": False}
    module.predict_step = lambda batch, batch_idx: module.model(**batch).logits  # type: ignore[method-assign]
    getattr(toy_trainer(callbacks=[ranks()]), verb)(module, toy_loader(8), **silent)
    del module.predict_step
    assert traces(module) == before
    assert not any(isinstance(m, SoftThresholdLinear | LowRankLinear) for m in module.modules())


class Manual(Tunable):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()


@pytest.mark.parametrize("kind", [Tunable, Manual])
def test_fp16_with_a_gradient_scaler_moves_thresholds_as_fp32_does(kind: type[Tunable]) -> None:
    thresholds = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        module = kind()
        toy_trainer(callbacks=[ranks(convert=False)], plugins=plugins).fit(module, toy_loader())
        layers = [m for m in module.modules() if isinstance(m, SoftThresholdLinear)]
        thresholds.append(torch.stack([layer.alpha.detach() for layer in layers]))
    assert float(thresholds[0].min()) > 0
    assert torch.allclose(thresholds[0], thresholds[1], rtol=0.02)


def test_a_trainer_at_the_address_of_a_former_one_is_a_new_one() -> None:
    module = Tunable()
    for target in (0.5, 0.6):
        trainer = toy_trainer(callbacks=[ranks(target_params=target, convert=False)])
        trainer.test(module, toy_loader(8), verbose=False)
        del trainer
    assert [config.target_params for config in module.__dict__["_compression"].configs] == [0.6]


def test_a_run_that_diverges_says_so() -> None:
    class Diverges(Tunable):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * float("inf")

    with pytest.raises(ValueError, match="not finite"):
        toy_trainer(callbacks=[ranks(warmup=0.2)]).fit(Diverges(), toy_loader())

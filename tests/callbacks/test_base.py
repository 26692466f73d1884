"""The seam to Lightning, seen from the user's module."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from transformers import get_linear_schedule_with_warmup

from lightning_compress.callbacks import CompressionMixin, SoftThresholdRank, convert
from lightning_compress.losses import SoftThresholdRankLossMixin
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.plan import CompressionPlan
from tests.toys import LateToyModule, ToyModule, tiny_bert, toy_loader, toy_trainer


def ranks_callback(**settings: Any) -> SoftThresholdRank:
    return SoftThresholdRank(**{"target_params": 0.5, "rank_multiple": 4, **settings})


def linear_parameters(module: ToyModule) -> int:
    assert module.model is not None
    return count_parameters(module.model).linear


DENSE_LINEAR = count_parameters(tiny_bert()).linear


@pytest.mark.parametrize(
    "module",
    [ToyModule(), ToyModule(build_in="setup"), LateToyModule(), ToyModule(output="dict")],
    ids=["init", "setup", "configure_model", "dict output"],
)
def test_any_plain_module_is_half_its_size_after_fit(module: ToyModule) -> None:
    toy_trainer(callbacks=[ranks_callback()]).fit(module, toy_loader())
    assert 0.4 * DENSE_LINEAR < linear_parameters(module) <= 0.5 * DENSE_LINEAR
    assert not any(isinstance(m, SoftThresholdLinear) for m in module.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-true"},
        {"max_epochs": 2},
    ],
    ids=str,
)
def test_trainer_settings_keep_working(settings: dict[str, Any]) -> None:
    module = ToyModule()
    trainer = toy_trainer(callbacks=[ranks_callback()], **settings)
    trainer.fit(module, toy_loader())
    assert linear_parameters(module) <= 0.5 * DENSE_LINEAR
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Scheduled(ToyModule):
    def configure_optimizers(self) -> Any:
        decayed = [p for n, p in self.named_parameters() if n.endswith("weight")]
        rest = [p for n, p in self.named_parameters() if not n.endswith("weight")]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return get_linear_schedule_with_warmup(optimizer, 2, 6)


class OneCycle(Scheduled):
    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=6)


@pytest.mark.parametrize("kind", [Scheduled, OneCycle])
def test_step_schedulers_survive_the_surgery(kind: type[Scheduled]) -> None:
    module = kind()
    trainer = toy_trainer(callbacks=[ranks_callback(convert=False)])
    trainer.fit(module, toy_loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-3
    assert trainer.global_step == 6


class BoundEarly(ToyModule):
    """Like LightningCLI: the optimizer exists before any hook runs."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.optimizer


def test_an_optimizer_bound_before_surgery_trains_the_new_parameters() -> None:
    module = BoundEarly()
    first = SoftThresholdLinear(module.model.bert.encoder.layer[0].intermediate.dense).u_OM.detach().clone()
    toy_trainer(callbacks=[ranks_callback(convert=False)], max_steps=2).fit(module, toy_loader())
    held = {id(p) for group in module.optimizer.param_groups for p in group["params"]}
    layer = module.model.bert.encoder.layer[0].intermediate.dense
    assert {id(layer.u_OM), id(layer.sigma_M), id(layer.v_MI), id(layer.bias)} <= held
    assert id(layer.alpha) not in held
    assert not torch.equal(layer.u_OM.abs(), first.abs())


@pytest.mark.parametrize("of", ["module", "model"])
def test_names_in_an_optimizer_follow_its_parameters(of: str) -> None:
    class Named(ToyModule):
        def configure_optimizers(self) -> Any:
            owner = self if of == "module" else self.model
            return torch.optim.AdamW(owner.named_parameters(), lr=1e-3)

    class Compares(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            owner = pl_module if of == "module" else pl_module.model
            group = trainer.optimizers[0].param_groups[0]
            named = dict(owner.named_parameters())
            assert len(group["param_names"]) == len(group["params"])
            pairs = zip(group["param_names"], group["params"], strict=True)
            assert all(named[name] is parameter for name, parameter in pairs)

        on_fit_end = on_train_start

    module = Named()
    toy_trainer(callbacks=[ranks_callback(), Compares()]).fit(module, toy_loader())
    assert any(isinstance(m, LowRankLinear) for m in module.modules())


def test_an_optimizer_that_keeps_a_list_of_its_own_trains_the_new_parameters() -> None:
    class Newton(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    module = Newton()
    toy_trainer(callbacks=[ranks_callback(convert=False)]).fit(module, toy_loader())
    assert {id(p) for p in module.optimizer._params} == {
        id(p) for name, p in module.named_parameters() if not name.endswith("alpha")
    }
    (state,) = module.optimizer.state.values()
    assert 0 < state["n_iter"] < 2 * 6  # began anew when factors changed their meaning


class ForgetsTheHead(ToyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.bert.parameters(), lr=0.1)


class Doubles(ToyModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        dict.__setitem__(
            optimizer.param_groups[0], "params", [*self.parameters(), self.model.classifier.bias]
        )
        return optimizer


@pytest.mark.parametrize(
    ("kind", "said"),
    [(ForgetsTheHead, "in no optimizer.*model.classifier"), (Doubles, "more than one.*classifier.bias")],
)
def test_a_parameter_outside_exactly_one_optimizer_is_named_before_training(kind: type, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        toy_trainer(callbacks=[ranks_callback()]).fit(kind(), toy_loader())


def test_thresholds_move_by_the_private_optimizer_only() -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ranks_callback(convert=False)]).fit(module, toy_loader())
    layers = [m for m in module.modules() if isinstance(m, SoftThresholdLinear)]
    assert any(float(layer.alpha.detach()) > 0 for layer in layers)


class Manual(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()


@pytest.mark.parametrize(
    "length", [{"max_epochs": 1}, {"max_steps": 6, "max_epochs": -1}], ids=["epochs", "steps"]
)
def test_manual_optimization_learns_ranks_too(length: dict[str, int]) -> None:
    module = Manual()
    callback = ranks_callback(convert=False)
    toy_trainer(callbacks=[callback], **length).fit(module, toy_loader())
    assert module.__dict__["_compression"].compressor.is_on_target
    layers = [m for m in module.modules() if isinstance(m, SoftThresholdLinear)]
    assert any(float(layer.alpha.detach()) > 0 for layer in layers)


def test_class_hooks_and_attention_come_back_after_teardown() -> None:
    module = ToyModule()
    before = (type(module), module.model.config._attn_implementation, _hooks(module), set(vars(module)))
    toy_trainer(callbacks=[ranks_callback(convert=False)]).fit(module, toy_loader())
    after = (
        type(module),
        module.model.config._attn_implementation,
        _hooks(module),
        set(vars(module)) - {"_compression"},
    )
    assert after == (*before[:3], before[3] | (after[3] & {"_trainer"}))


def _hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


def test_a_module_that_places_the_term_itself_gets_it_once() -> None:
    class Own(SoftThresholdRankLossMixin, ToyModule):
        seen: ClassVar[list[tuple[float, float]]] = []

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            task = super().training_step(batch, batch_idx)
            total = self.total_loss(task)
            self.seen.append((float(task.detach()), float(total.detach())))
            return total

        def on_before_backward(self, loss: torch.Tensor) -> None:
            assert float(loss.detach()) == self.seen[-1][1]

    module = Own()
    toy_trainer(callbacks=[ranks_callback()]).fit(module, toy_loader())
    assert any(total > task for task, total in module.seen)


def test_a_loss_mixin_without_a_callback_says_which_callback_to_add() -> None:
    class Own(SoftThresholdRankLossMixin, ToyModule):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + self.rank_loss()

    with pytest.raises(RuntimeError, match="SoftThresholdRank"):
        toy_trainer().fit(Own(), toy_loader())


def test_an_attribute_of_the_users_named_compressor_stays_his() -> None:
    class Own(SoftThresholdRankLossMixin, ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.compressor = nn.Linear(2, 1)

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            task = super().training_step(batch, batch_idx)
            return self.total_loss(task) + self.compressor(torch.ones(1, 2)).square().sum()

    module = Own()
    toy_trainer(callbacks=[ranks_callback()]).fit(module, toy_loader())
    assert linear_parameters(module) <= 0.5 * DENSE_LINEAR


def test_sharding_strategies_are_refused_with_the_remedy() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="strategy='ddp'"):
        ranks_callback().setup(trainer, ToyModule(), "fit")  # type: ignore[arg-type]


class NoTransformer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoTransformers(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.other = tiny_bert()


def test_a_module_without_a_transformer_is_told_what_was_looked_for() -> None:
    with pytest.raises(ValueError, match="module="):
        toy_trainer(callbacks=[ranks_callback()]).fit(NoTransformer(), toy_loader())


def test_two_transformers_need_a_choice_and_accept_it() -> None:
    with pytest.raises(ValueError, match="module="):
        toy_trainer(callbacks=[ranks_callback()]).fit(TwoTransformers(), toy_loader())
    module = TwoTransformers()
    module.other.requires_grad_(False)
    toy_trainer(callbacks=[ranks_callback(module="model")]).fit(module, toy_loader())
    assert any(isinstance(m, LowRankLinear) for m in module.model.modules())
    assert not any(isinstance(m, LowRankLinear) for m in module.other.modules())


def test_the_same_method_twice_is_refused() -> None:
    first, second = ranks_callback(), ranks_callback(target_params=0.25)
    with pytest.raises(ValueError, match="soft_threshold_rank is asked for twice"):
        toy_trainer(callbacks=[first, second]).fit(ToyModule(), toy_loader())


def test_an_endless_run_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        toy_trainer(callbacks=[ranks_callback()], max_epochs=-1, max_steps=-1, limit_train_batches=2).fit(
            ToyModule(), toy_loader()
        )


def test_fast_dev_run_converts_to_the_target() -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ranks_callback()], fast_dev_run=True).fit(module, toy_loader(), toy_loader())
    assert linear_parameters(module) <= 0.5 * DENSE_LINEAR


def test_convert_can_be_asked_for_later() -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ranks_callback(convert=False)]).fit(module, toy_loader())
    batch = next(iter(toy_loader()))
    module.eval()
    before = module.model(batch["input_ids"]).logits
    plan = convert(module)
    assert isinstance(plan, CompressionPlan) and plan.is_converted
    assert torch.allclose(module.model(batch["input_ids"]).logits, before, atol=1e-5)
    with pytest.raises(ValueError, match="converted already"):
        convert(module)


def test_convert_without_a_compressing_run_says_so() -> None:
    with pytest.raises(ValueError, match="not prepared by a compression callback"):
        convert(ToyModule())


def test_a_second_fit_fine_tunes_the_converted_model() -> None:
    module, callback = ToyModule(), ranks_callback()
    toy_trainer(callbacks=[callback]).fit(module, toy_loader())
    before = copy.deepcopy(module.model.state_dict())
    toy_trainer(callbacks=[callback]).fit(module, toy_loader())
    after = module.model.state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_compressing_a_compressed_model_otherwise_is_refused() -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ranks_callback()]).fit(module, toy_loader())
    with pytest.raises(ValueError, match="compressed before"):
        toy_trainer(callbacks=[ranks_callback(target_params=0.25)]).fit(module, toy_loader())


def test_a_deepcopied_module_keeps_a_compressor_of_its_own() -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ranks_callback(convert=False)]).fit(module, toy_loader())
    twin = copy.deepcopy(module)
    convert(twin)
    assert any(isinstance(m, LowRankLinear) for m in twin.modules())
    assert not any(isinstance(m, LowRankLinear) for m in module.modules())


def test_the_mixin_adds_nothing_to_a_module_without_callbacks() -> None:
    class Mixed(CompressionMixin, ToyModule): ...

    module = Mixed()
    toy_trainer().fit(module, toy_loader())
    assert module.compressor is None

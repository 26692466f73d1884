"""Checkpoints rebuild the structure their weights belong to: training form, converted, or dense."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress.callbacks import CompressionMixin, Distillation, SoftThresholdRank, convert
from lightning_compress.callbacks.session import CHECKPOINT_KEY
from lightning_compress.deploy import plan_of
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.plan import PlanError
from tests.toys import LateToyModule, ToyModule, toy_loader, toy_trainer


class Mixed(CompressionMixin, ToyModule): ...


class LateMixed(CompressionMixin, ToyModule):
    def __init__(self, build_in: str = "configure_model", output: str = "tensor") -> None:
        super().__init__(build_in, output)

    def configure_model(self) -> None:
        self._build()


pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


def ranks(**settings: Any) -> SoftThresholdRank:
    return SoftThresholdRank(**{"target_params": 0.5, "rank_multiple": 4, **settings})


def structure(module: LightningModule) -> str:
    kinds = {type(m) for m in module.modules()} & {LowRankLinear, SoftThresholdLinear}
    return {0: "dense", 1: "converted" if LowRankLinear in kinds else "training"}[len(kinds)]


def fitted(folder: Path, module: LightningModule, **settings: Any) -> Any:
    """Fit with a checkpoint in mid-search, and one of the converted model."""
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, **settings)
    trainer = toy_trainer(callbacks=[ranks(), saves], enable_checkpointing=True)
    trainer.fit(module, toy_loader())
    trainer.save_checkpoint(folder / "converted.ckpt")
    return trainer


def dense_checkpoint(folder: Path) -> Path:
    trainer = toy_trainer(max_steps=1)
    trainer.fit(ToyModule(), toy_loader())
    trainer.save_checkpoint(folder / "dense.ckpt")
    return folder / "dense.ckpt"


def holds_weights_of(module: LightningModule, path: Path) -> bool:
    saved, held = torch.load(path, weights_only=True)["state_dict"], module.state_dict()
    return saved.keys() == held.keys() and all(torch.equal(saved[name], held[name]) for name in saved)


@pytest.mark.parametrize("kind", [ToyModule, LateToyModule, Mixed])
def test_any_checkpoint_can_be_tested_after_any_other(kind: type[ToyModule], tmp_path: Path) -> None:
    module = kind()
    trainer = fitted(tmp_path, module)
    files = {"training": tmp_path / "step=3.ckpt", "converted": tmp_path / "converted.ckpt"}
    files["dense"] = dense_checkpoint(tmp_path)
    assert structure(module) == "converted"
    for wanted in ("training", "converted", "dense", "converted", "training", "dense", "training"):
        trainer.test(module, toy_loader(8), ckpt_path=files[wanted], verbose=False)
        assert structure(module) == wanted
        assert holds_weights_of(module, files[wanted])
        assert (plan_of(module) is not None) == (wanted == "converted")
    assert type(module) is kind


def test_best_is_tested_in_the_form_it_was_saved_in(tmp_path: Path) -> None:
    module = ToyModule()
    trainer = fitted(tmp_path, module, monitor="train/loss")
    trainer.test(module, toy_loader(8), ckpt_path="best", verbose=False)
    assert structure(module) == "training"
    plan = convert(module)
    assert plan.is_converted and structure(module) == "converted"


@pytest.mark.parametrize("kind", [Mixed, LateMixed])
@pytest.mark.parametrize("form", ["training", "converted"])
def test_load_from_checkpoint_rebuilds_a_module_that_inherits_the_mixin(
    kind: type[ToyModule], form: str, tmp_path: Path
) -> None:
    fitted(tmp_path, kind())
    path = tmp_path / {"training": "step=3.ckpt", "converted": "converted.ckpt"}[form]
    module = kind.load_from_checkpoint(path, weights_only=True)
    assert structure(module) == form
    assert holds_weights_of(module, path)
    assert module.compressor is not None and module.compressor.is_converted == (form == "converted")


def test_a_mixed_module_is_tested_without_the_callback(tmp_path: Path) -> None:
    fitted(tmp_path, Mixed())
    module = Mixed()
    toy_trainer().test(module, toy_loader(8), ckpt_path=tmp_path / "converted.ckpt", verbose=False)
    assert structure(module) == "converted" and holds_weights_of(module, tmp_path / "converted.ckpt")


class Silent(CompressionMixin, ToyModule):
    """Its hooks know nothing of ``super()``."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


class SilentToo(Silent):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.form_after_super = structure(self)


class Helper(LightningModule):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


class MixedLast(Helper, ToyModule, CompressionMixin):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


@pytest.mark.parametrize("kind", [Silent, SilentToo, MixedLast])
def test_checkpoint_hooks_need_not_call_super(kind: type[ToyModule], tmp_path: Path) -> None:
    fitted(tmp_path, kind())
    for name, form in (("step=3", "training"), ("converted", "converted")):
        module = kind.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        assert structure(module) == form and holds_weights_of(module, tmp_path / f"{name}.ckpt")
        assert module.mine == 1  # type: ignore[attr-defined]
        assert getattr(module, "form_after_super", form) == form


class AtTheFirstStep(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        compressor = pl_module.__dict__["_compression"].compressor
        self.phase = getattr(self, "phase", compressor.handles["soft_threshold_rank"].phase)


class HooksOfTheInstance(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.on_save_checkpoint = self.on_load_checkpoint = lambda checkpoint: None  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [Silent, HooksOfTheInstance])
def test_a_run_of_a_module_with_hooks_of_its_own_resumes_in_its_phase(
    kind: type[ToyModule], tmp_path: Path
) -> None:
    settings = {"warmup": 0.1, "search_end": 0.9, "target_params": 0.3, "convert": False}
    saves = ModelCheckpoint(tmp_path, filename="search", every_n_train_steps=4)
    toy_trainer(callbacks=[ranks(**settings), saves], enable_checkpointing=True).fit(kind(), toy_loader())
    start = AtTheFirstStep()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        toy_trainer(callbacks=[ranks(**settings), start]).fit(
            kind(), toy_loader(), ckpt_path=tmp_path / "search.ckpt"
        )
    assert start.phase == "search"


def test_a_checkpoint_of_weights_only_is_tested_and_loaded(tmp_path: Path) -> None:
    fitted(tmp_path, Mixed(), save_weights_only=True)
    path = tmp_path / "step=3.ckpt"
    assert "callbacks" not in torch.load(path, weights_only=True)
    fresh = ToyModule()
    toy_trainer(callbacks=[ranks()]).test(fresh, toy_loader(8), ckpt_path=path, verbose=False)
    assert structure(fresh) == "training" and holds_weights_of(fresh, path)
    assert structure(Mixed.load_from_checkpoint(path, weights_only=True)) == "training"


def test_fine_tuning_goes_on_from_a_converted_checkpoint(tmp_path: Path) -> None:
    fitted(tmp_path, Mixed())
    module = Mixed.load_from_checkpoint(tmp_path / "converted.ckpt", weights_only=True)
    before = copy.deepcopy(module.state_dict())
    toy_trainer(max_steps=2).fit(module, toy_loader())
    assert structure(module) == "converted"
    assert not torch.equal(before["model.classifier.weight"], module.state_dict()["model.classifier.weight"])


def test_a_finished_run_resumed_from_its_last_checkpoint_converts(tmp_path: Path) -> None:
    module = ToyModule()
    fitted(tmp_path, module)
    again = ToyModule()
    trainer = toy_trainer(callbacks=[ranks()])
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(again, toy_loader(), ckpt_path=tmp_path / "step=6.ckpt")
    assert structure(again) == "converted"
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_resuming_from_a_dense_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = dense_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="without ckpt_path"):
        toy_trainer(callbacks=[ranks()]).fit(ToyModule(), toy_loader(), ckpt_path=path)


def test_a_method_that_a_run_did_not_begin_with_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    module = ToyModule()
    fitted(tmp_path, module)
    with pytest.raises(ValueError, match=r"the checkpoint began .*without \['distillation'\]"):
        toy_trainer(callbacks=[ranks(), Distillation()]).fit(
            ToyModule(), toy_loader(), ckpt_path=tmp_path / "step=3.ckpt"
        )
    module = ToyModule()
    toy_trainer(callbacks=[ranks(convert=False)]).fit(module, toy_loader())
    with pytest.raises(ValueError, match=r"in training form, began .*without \['distillation'\]"):
        toy_trainer(callbacks=[ranks(convert=False), Distillation()]).fit(module, toy_loader())
    convert(module)
    toy_trainer(callbacks=[ranks(), Distillation()]).fit(module, toy_loader())
    assert structure(module) == "converted"


def test_a_checkpoint_written_after_conversion_goes_on_as_fine_tuning(tmp_path: Path) -> None:
    fitted(tmp_path, ToyModule())
    again = ToyModule()
    trainer = toy_trainer(callbacks=[ranks()], max_steps=-1, max_epochs=2)
    trainer.fit(again, toy_loader(), ckpt_path=tmp_path / "converted.ckpt")
    assert structure(again) == "converted"
    assert trainer.global_step > 6
    assert not holds_weights_of(again, tmp_path / "converted.ckpt")


@pytest.mark.parametrize("schema", [0, 2, None, "1"])
def test_an_unknown_schema_is_refused(schema: Any, tmp_path: Path) -> None:
    fitted(tmp_path, ToyModule())
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    checkpoint[CHECKPOINT_KEY]["schema"] = schema
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(PlanError, match="schema"):
        toy_trainer(callbacks=[ranks()]).test(ToyModule(), toy_loader(8), ckpt_path=tmp_path / "odd.ckpt")


def test_settings_changed_since_the_checkpoint_are_named(tmp_path: Path) -> None:
    fitted(tmp_path, ToyModule())
    trainer = toy_trainer(callbacks=[ranks(search_end=0.75)])
    with pytest.warns(UserWarning, match="search_end"):
        trainer.fit(ToyModule(), toy_loader(), ckpt_path=tmp_path / "step=3.ckpt")


def test_replaced_weights_are_released_while_and_after_training() -> None:
    class Looks(ToyModule):
        replaced: weakref.ref[Any]
        held: list[bool]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.held.append(self.replaced() is not None)

    module, odd = Looks(intermediate_size=76), {(76, 32), (32, 76)}
    module.replaced, module.held = (
        weakref.ref(module.model.bert.encoder.layer[0].intermediate.dense.weight),
        [],
    )
    trainer = toy_trainer(callbacks=[ranks(init="svd")])
    trainer.fit(module, toy_loader())
    assert structure(module) == "converted"
    assert module.held == [False] * 6
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and not o.is_meta]
    assert not any(tuple(parameter.shape) in odd for parameter in alive)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_an_optimizer_bound_before_everything_goes_on_with_the_converted_parameters() -> None:
    class BoundEarly(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    module = BoundEarly()
    toy_trainer(callbacks=[ranks()]).fit(module, toy_loader())
    before = copy.deepcopy(module.model.state_dict())
    toy_trainer(max_steps=2).fit(module, toy_loader())
    after = module.model.state_dict()
    assert structure(module) == "converted"
    changed = {name.rpartition(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert any(name.endswith((".down", ".up")) for name in changed)

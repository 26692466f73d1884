"""Distillation as a callback: what it adds to a loss and takes from it, and runs that are killed and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_compress import DistillationLossMixin, load, plan_of, save_pretrained
from lightning_compress.callbacks import (
    CompressionReport,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
)
from lightning_compress.callbacks.base import CompressionMixin
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_parameters
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer
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

STEM = "distillation"
PREFIX = f"compress/{STEM}"
SETTINGS: dict[str, Any] = {"start": 0.3, "stages": (0.3, 0.7), "hidden_first": 0.5, "task_weight": 0.5}


def weights_after(module: LightningModule, **settings: Any) -> dict[str, torch.Tensor]:
    toy_trainer(callbacks=[Distillation(**settings)], max_steps=3).fit(module, toy_loader())
    return module.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> bool:
    return all(torch.allclose(one[name], other[name], **tolerance) for name in one.keys() | other.keys())


def test_the_course_of_distillation_is_logged_and_nothing_is_left() -> None:
    watch, module = Watch(), ToyModule()
    names = list(module.state_dict())
    method = Distillation(**SETTINGS)
    toy_trainer(callbacks=[method, watch], max_steps=10, log_every_n_steps=1).fit(module, toy_loader(40))
    starts = [f"{PREFIX}/hidden" in step for step in watch.seen]
    assert starts == [False] * 3 + [True] * 7
    task = [step[f"{PREFIX}/task_weight"] for step in watch.seen]
    assert task == [1.0] * 3 + [0.0] * 2 + [0.5] * 2 + [0.0] * 2 + [0.5]
    assert all(
        (step[f"{PREFIX}/logit"] > 0) == (weight > 0)
        for step, weight in zip(watch.seen[3:], task[3:], strict=True)
    )
    assert list(module.state_dict()) == names and type(module) is ToyModule


def test_the_teacher_is_nobodys_part() -> None:
    module, given = ToyModule(), tiny_bert(seed=5)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    watched: list[Any] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            teacher = pl_module._compression.compressor.handles[STEM].teacher.model
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            watched.append(
                not held & {id(p) for p in teacher.parameters()} and teacher not in pl_module.modules()
            )

    method = Distillation(teacher_model=given)
    toy_trainer(callbacks=[method, Looks()], max_steps=2).fit(module, toy_loader())
    assert watched == [True, True]
    assert same(given.state_dict(), before, rtol=0.0, atol=0.0)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in ToyModule().parameters())


class Plain(ToyModule):
    """Steps by the gradients themselves: Adam would make much of rounding where gradients are nothing but that."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class WithLossOf(Plain):
    """Does by hand what the callback does: the task's loss by a factor, and the distance to another model's logits."""

    teacher: tuple[nn.Module]
    factor: float

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        output = self.model(**batch)
        with torch.no_grad():
            target = self.teacher[0](batch["input_ids"]).logits.softmax(-1)
        return self.factor * output.loss - (target * output.logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0])
def test_a_run_equals_one_that_was_written_by_hand(factor: float) -> None:
    teacher, by_hand = tiny_bert(seed=5, initializer_range=0.3).eval(), WithLossOf()
    by_hand.teacher, by_hand.factor = (teacher,), factor
    toy_trainer(max_steps=3).fit(by_hand, toy_loader())
    settings: Any = {"teacher_model": teacher, "hidden_weight": 0.0, "task_weight": factor}
    for module in (Plain(), Plain(output="dict")):
        assert same(weights_after(module, **settings), by_hand.state_dict(), atol=1e-6)


class ByHand(Plain):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_manual_optimization_ends_as_the_automatic_one(weight: float) -> None:
    settings: Any = {"teacher_model": tiny_bert(seed=5), "task_weight": weight}
    assert same(weights_after(ByHand(), **settings), weights_after(Plain(), **settings), atol=1e-6)


class Own(DistillationLossMixin, Plain):
    """Places the terms itself, the task's weight too."""

    total: ClassVar[bool] = True

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        task = super().training_step(batch, batch_idx)
        return self.total_loss(task) if self.total else 0.25 * task + self.distillation_loss()


class OwnByName(Own):
    total: ClassVar[bool] = False


def test_a_module_that_places_the_terms_itself_is_weighed_once() -> None:
    settings: Any = {"teacher_model": tiny_bert(seed=5), "task_weight": 0.25}
    expected = weights_after(Plain(), **settings)
    for module in (Own(), OwnByName()):
        assert same(weights_after(module, **settings), expected, atol=1e-6)


def test_a_teacher_from_a_folder_is_missed_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        toy_trainer(callbacks=[Distillation(teacher=str(tmp_path / "nowhere"))]).fit(
            ToyModule(), toy_loader()
        )
    with pytest.raises(ValueError, match="two teachers"):
        Distillation(teacher=str(tmp_path), teacher_model=tiny_bert())


def test_a_second_fit_distils_again_only_by_other_settings() -> None:
    module = ToyModule()
    watches = [Watch(), Watch(), Watch()]
    for watch, settings in zip(watches, ({}, {}, {"hidden_weight": 2.0}), strict=True):
        trainer = toy_trainer(callbacks=[Distillation(**settings), watch], max_steps=2, log_every_n_steps=1)
        said = pytest.warns(UserWarning, match=r"\['distillation'\] ran on this module before with the same")
        with said if watch is watches[1] else nullcontext():
            trainer.fit(module, toy_loader())
    assert [f"{PREFIX}/hidden" in watch.seen[-1] for watch in watches] == [True, False, True]


def test_ranks_are_learned_beside_a_teacher_and_saved(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path / "report"), lengths=[6])
    callbacks = [Distillation(start=0.2), SoftThresholdRank(target_params=0.5, rank_multiple=4), report]
    toy_trainer(callbacks=callbacks, max_steps=10).fit(module, toy_loader())
    assert count_parameters(module.model).linear <= 0.5 * count_parameters(tiny_bert()).linear
    save_pretrained(module, tmp_path / "model")
    again, batch = load(tmp_path / "model"), next(iter(toy_loader()))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, module.model.eval()(**batch).logits)
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_model_that_was_only_distilled_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    module, report = ToyModule(), CompressionReport(str(tmp_path / "report"), lengths=[6])
    toy_trainer(callbacks=[Distillation(), report]).fit(module, toy_loader())
    save_pretrained(module, tmp_path / "model")
    assert (tmp_path / "report" / "report.html").is_file()
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "import lightning_compress" not in card
    module.model.save_pretrained(tmp_path / "own")
    assert "lightning_compress" not in (tmp_path / "own" / "config.json").read_text(encoding="utf-8")


class Compiled(ToyModule):
    def _build(self) -> None:
        self.model = torch.compile(tiny_bert(**self.overrides), backend="eager")  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_a_compiled_model_is_taught_as_any_other() -> None:
    torch.compiler.reset()
    after = []
    for module in (ToyModule(num_hidden_layers=1), Compiled(num_hidden_layers=1)):
        parts = [Distillation(teacher_model=tiny_bert(seed=5))]  # deeper than the student
        toy_trainer(callbacks=parts, max_steps=3).fit(module, toy_loader())
        after.append({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
    torch.compiler.reset()
    assert same(*after, rtol=0.0, atol=1e-6)


class Parallel(CompressionMixin, ToyModule):
    """For processes that are forked."""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_that_wait_for_every_gradient_get_them_in_every_phase() -> None:
    trainer = two_processes(callbacks=[Distillation(**SETTINGS)], max_steps=10)
    trainer.fit(Parallel(), toy_loader(40, batch_size=2))
    assert trainer.state.finished


def run(
    callbacks: list[Callback],
    ckpt_path: Path | None = None,
    seed: int = 0,
    beside: Sequence[Callback] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Fit with dropout; return what must be equal at the end."""
    parts = [Distillation(**{**SETTINGS, "convert": False, **settings}), *beside, *callbacks]
    return run_to_the_end(Scheduled(**DROPOUT), parts, ckpt_path=ckpt_path, seed=seed)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("teacher", ["self", "module"])
def test_a_run_killed_in_any_phase_ends_as_the_uninterrupted_one(teacher: str, tmp_path: Path) -> None:
    variant = {} if teacher == "self" else {"teacher_model": tiny_bert(seed=5)}
    whole = run([every_step(tmp_path)], **variant)
    phases = []
    for step, saved, resumed in resumptions(run, (1, 3, 4, 6, 8, 11), tmp_path, STEM, **variant):
        phases.append(saved["phase"])
        has_weights = saved["teacher"]["weights"] is not None
        assert has_weights == (teacher == "self" and saved["phase"] != "waiting")
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) == {"waiting", "hidden", "joint"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_an_exception_in_mid_batch_leaves_no_trace_after_resuming(hook: str, tmp_path: Path) -> None:
    whole = run([])
    for step in (3, 5):
        resumed = interrupted_and_resumed(run, step, hook, tmp_path)
        assert differences(whole, resumed) == [], f"stopped in step {step}"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("start", [0.3, 0.6], ids=["taught from the whole width", "taught from half way"])
def test_slimming_exits_and_teacher_resume_together(start: float, tmp_path: Path) -> None:
    settings: Any = {"start": start, "stages": (start, 0.7), "task_weight": 0.0}

    def parts() -> list[Callback]:
        widths = WidthSlimming(heads=0.5, ffn=0.5, start=0.3, end=0.7, steps=2, convert=False)
        return [MultiExit(convert=False), widths]

    whole = run([every_step(tmp_path)], beside=parts(), **settings)
    assert whole["compression"]["handles"]["width_slimming"]["done"] == 2
    for step in (3, 5, 8, 10):
        resumed = run([], ckpt_path=tmp_path / f"step={step}.ckpt", seed=step, beside=parts(), **settings)
        assert differences(whole, resumed) == [], f"resumed after step {step}"


def test_slimming_exits_and_teacher_end_in_a_narrow_model_with_exits(tmp_path: Path) -> None:
    module = ToyModule()
    widths = WidthSlimming(heads=0.5, ffn=0.5, start=0.3, end=0.7, steps=2)
    parts = [Distillation(**SETTINGS), MultiExit(threshold=0.69), widths]
    toy_trainer(callbacks=parts, max_steps=12).fit(module, toy_loader(48))
    plan = plan_of(module)
    assert plan is not None and [record.method for record in plan.methods] == ["width_slimming", "multi_exit"]
    save_pretrained(module, tmp_path)
    again, batch = load(tmp_path).eval(), next(iter(toy_loader()))
    assert [layer.num_heads for layer in describe(again).layers] == [2, 2]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, module.model.eval()(**batch).logits)

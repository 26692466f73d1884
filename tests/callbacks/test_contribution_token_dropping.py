"""ContributionTokenDropping as a callback: one fit with shuffled data, resumed anywhere, and what users see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_compress import load, save_pretrained
from lightning_compress.callbacks import (
    CompressionMixin,
    ContributionTokenDropping,
    SoftThresholdRank,
    convert,
)
from lightning_compress.compressor import Compressor
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.runtime import is_packed, packed_encoder
from tests.toys import ToyModule, ToyTexts, tiny_bert, toy_loader, toy_trainer
from tests.toys_runs import (
    DROPOUT,
    Mixed,
    SameOnAllRanks,
    Scheduled,
    Watch,
    differences,
    every_step,
    ignore_warnings_of_processes,
    interrupted_and_resumed,
    resumptions,
    run_to_the_end,
    two_processes,
)

PREFIX = "compress/contribution_token_dropping"
STEM = "contribution_token_dropping"
SETTINGS: dict[str, Any] = {"target_tokens": 0.6, "warmup": 0.25, "ramp_end": 0.6, "threshold_init": 0.9}


def handle_of(module: LightningModule) -> Any:
    return module.__dict__["_compression"].compressor.handles[STEM]


def test_the_course_of_dropping_is_logged_and_the_model_runs_packed_in_the_end() -> None:
    watch, module = Watch(), ToyModule()
    method = ContributionTokenDropping(**SETTINGS)
    toy_trainer(callbacks=[method, watch], max_steps=16, log_every_n_steps=1).fit(module, toy_loader())
    assert f"{PREFIX}/saliency" not in watch.seen[3] and f"{PREFIX}/saliency" in watch.seen[4]
    assert {f"{PREFIX}/{name}" for name in ("ratio", "tokens_kept", "threshold", "slope", "length")} <= set(
        watch.seen[-1]
    )
    slopes = [step[f"{PREFIX}/slope"] for step in watch.seen]
    assert slopes[0] == slopes[3] == 10.0 and slopes[-1] == pytest.approx(1e5)
    kept = [step[f"{PREFIX}/tokens_kept"] for step in watch.seen]
    assert kept[0] == 1.0 and kept[-1] < 1.0
    assert is_packed(module)


def test_each_text_is_explained_once_however_often_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.methods import saliency_teacher

    explained, explain = [], saliency_teacher.gradient_saliency

    def counting(teacher: Any, inputs: Any, labels: Any) -> Any:
        explained.append(len(inputs["input_ids"]))
        return explain(teacher, inputs, labels)

    monkeypatch.setattr(saliency_teacher, "gradient_saliency", counting)
    loader = DataLoader(ToyTexts(16), batch_size=4, shuffle=True)
    toy_trainer(callbacks=[ContributionTokenDropping(**SETTINGS)], max_epochs=8).fit(ToyModule(), loader)
    assert sum(explained) == 16


def run(
    callbacks: list[Callback], ckpt_path: Path | None = None, seed: int = 0, **settings: Any
) -> dict[str, Any]:
    """Fit with dropout; return what must be equal at the end."""
    method = ContributionTokenDropping(**{**SETTINGS, "convert": False, **settings})
    return run_to_the_end(Scheduled(**DROPOUT), [method, *callbacks], ckpt_path=ckpt_path, seed=seed)


VARIANTS = {
    "its own teacher, FLOPs": {"target_flops": 0.7, "target_tokens": None},
    "all gradients, no warm-up": {"saliency_to_encoder": True, "warmup": 0.0, "saliency_weight": 0.1},
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_run_killed_in_any_phase_ends_as_the_uninterrupted_one(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    whole = run([every_step(tmp_path)], **variant)
    assert whole["phases"][STEM] == "recovery"
    phases = []
    for step, saved, resumed in resumptions(run, (1, 4, 5, 7, 10), tmp_path, STEM, **variant):
        phases.append(saved["phase"])
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) >= {"ramp", "recovery"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_an_exception_in_mid_batch_leaves_no_trace_after_resuming(hook: str, tmp_path: Path) -> None:
    whole = run([])
    for step in (3, 5, 9):
        resumed = interrupted_and_resumed(run, step, hook, tmp_path)
        assert differences(whole, resumed) == [], f"stopped in step {step}"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_given_teacher_has_to_be_given_again_when_a_run_is_resumed(tmp_path: Path) -> None:
    teacher = tiny_bert(seed=7)
    whole = run([every_step(tmp_path)], teacher_model=teacher, warmup=0.0)
    path = tmp_path / "step=6.ckpt"
    assert differences(whole, run([], ckpt_path=path, seed=5, teacher_model=teacher, warmup=0.0)) == []
    with pytest.raises(ValueError, match=r"give it again.*teacher_model="):
        run([], ckpt_path=path, teacher="module", warmup=0.0)


class Loadable(CompressionMixin, ToyModule):
    """A module that can be loaded without callbacks."""


def test_a_checkpoint_opens_without_the_teacher_and_can_be_converted(tmp_path: Path) -> None:
    method = ContributionTokenDropping(**SETTINGS, teacher_model=tiny_bert(seed=7), convert=False)
    trainer = toy_trainer(callbacks=[method], max_steps=8)
    module = Loadable()
    trainer.fit(module, toy_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Loadable.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    batch = next(iter(toy_loader()))
    with torch.no_grad():
        expected = module.model.eval()(**batch).logits
        assert torch.equal(again.model.eval()(**batch).logits, expected)
        convert(again)
        assert torch.allclose(again.model(**batch).logits, expected, atol=1e-5)


def test_a_given_teacher_also_serves_a_bare_loop() -> None:
    teacher = tiny_bert(seed=7)
    config = ContributionTokenDroppingConfig(target_tokens=0.6, teacher="module")
    with pytest.raises(ValueError, match="in the resources of a Compressor"):
        Compressor(tiny_bert(), [config]).prepare()
    compressor = Compressor(tiny_bert(), [config], resources={STEM: {"teacher_model": teacher}})
    compressor.prepare()
    handle: Any = compressor.handles[STEM]
    assert torch.equal(handle.teacher.model.classifier.weight, teacher.classifier.weight)
    assert {id(p) for p in compressor.model.parameters()}.isdisjoint(
        map(id, handle.teacher.model.parameters())
    )


def test_two_teachers_are_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"teacher='a/b' and a teacher_model are two teachers"):
        ContributionTokenDropping(teacher="a/b", teacher_model=tiny_bert())


def test_a_teacher_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    trained: list[int] = []
    module = ToyModule()
    module.training_step = lambda *_: trained.append(1)
    for settings in ({"teacher": str(tmp_path / "nowhere")}, {"teacher_model": tiny_bert(num_labels=5)}):
        with pytest.raises(ValueError, match=r"cannot be loaded|has 5 labels"):
            toy_trainer(callbacks=[ContributionTokenDropping(**settings)]).fit(module, toy_loader())
    assert trained == []


@pytest.mark.parametrize("problem", [{"num_labels": 1}, {"num_labels": 2}], ids=["regression", "classes"])
def test_saved_loaded_and_saved_again_it_is_the_same_model(problem: dict[str, Any], tmp_path: Path) -> None:
    module = ToyModule(**problem)
    if problem["num_labels"] == 1:
        step = module.training_step
        module.training_step = lambda batch, i: step({**batch, "labels": batch["labels"].float()}, i)
    method = ContributionTokenDropping(**SETTINGS, protect_tokens=(3,))
    toy_trainer(callbacks=[method], max_steps=12).fit(module, toy_loader())
    save_pretrained(module, tmp_path / "one")
    again = load(tmp_path / "one")
    save_pretrained(again, tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    ids = next(iter(toy_loader()))["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, module.model.eval()(ids).logits)
    ours, theirs = packed_encoder(again), packed_encoder(module.model)
    assert [s.origin_N.tolist() for s in ours.latest] == [s.origin_N.tolist() for s in theirs.latest]


def test_ranks_and_tokens_compose_in_one_fit_and_are_saved(tmp_path: Path) -> None:
    module = ToyModule()
    methods = [ContributionTokenDropping(**SETTINGS), SoftThresholdRank(target_params=0.6, rank_multiple=1)]
    toy_trainer(callbacks=methods, max_steps=16).fit(module, toy_loader())
    save_pretrained(module, tmp_path)
    again, ids = load(tmp_path), next(iter(toy_loader()))["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, module.model.eval()(ids).logits)
    assert sum(p.numel() for p in again.bert.encoder.layer.parameters()) < sum(
        p.numel() for p in tiny_bert().bert.encoder.layer.parameters()
    )
    assert packed_encoder(again).policy is not None


class Command(ToyModule):
    """A module for the command line, whose optimizer LightningCLI binds before anything is prepared."""

    def __init__(self) -> None:
        super().__init__()

    configure_optimizers = LightningModule.configure_optimizers

    def train_dataloader(self) -> Any:
        return toy_loader()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_an_optimizer_from_the_command_line_leaves_predictors_and_thresholds_to_the_private_one() -> None:
    trainer = {"max_steps": 8, "accelerator": "cpu", "devices": 1, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {**SETTINGS, "convert": False}
    callback = {"class_path": "lightning_compress.ContributionTokenDropping", "init_args": settings}
    cli = LightningCLI(
        Command,
        args={
            "fit": {
                "seed_everything": 0,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                "trainer": {**trainer, **quiet, "callbacks": [callback]},
            },
            "subcommand": "fit",
        },
        save_config_callback=None,
    )
    users = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    handle = handle_of(cli.model)
    own = [*handle.policy.parameters()]
    private = {id(p) for p in cli.model.__dict__["_compression"].compressor.auxiliary_parameters()}
    assert len(own) > 4 and users.isdisjoint(map(id, own)) and private == {id(p) for p in own}
    others = [p for name, p in cli.model.named_parameters() if ".policy." not in name]
    assert users == {id(p) for p in others}
    fresh = tiny_bert()
    assert not torch.equal(cli.model.model.classifier.weight, fresh.classifier.weight)
    assert (handle.policy.eta_K != 0.9).any()
    assert all(
        bool(p.any()) for name, p in handle.policy.predictors.named_parameters() if name.endswith("2.bias")
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"length_weight": 0.1},
        {"target_flops": 0.7},
        {"target_tokens": 0.9, "layers": [1]},
        {"target_tokens": 0.9, "layers": [0]},
    ],
    ids=str,
)
def test_every_way_to_ask_trains_and_converts(settings: dict[str, Any]) -> None:
    module = ToyModule()
    others = {k: v for k, v in SETTINGS.items() if k != "target_tokens"}
    toy_trainer(callbacks=[ContributionTokenDropping(**others, **settings)], max_steps=12).fit(
        module, toy_loader()
    )
    assert is_packed(module)


def test_a_deployed_model_is_fine_tuned_further_without_callbacks(tmp_path: Path) -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ContributionTokenDropping(**SETTINGS)], max_steps=12).fit(module, toy_loader())
    save_pretrained(module, tmp_path)
    tuned = ToyModule()
    tuned.model = load(tmp_path).train()
    before = {name: value.clone() for name, value in tuned.model.state_dict().items()}
    toy_trainer(max_steps=4).fit(tuned, toy_loader())
    moved = {name for name, value in tuned.model.state_dict().items() if not torch.equal(value, before[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved
    assert not any(".policy." in name for name in moved)


class Alike(SameOnAllRanks):
    """Compares the steering too."""

    def state_of(self, handle: Any) -> tuple[Any, ...]:
        return *super().state_of(handle), handle.goal.totals, handle.multiplier


@ignore_warnings_of_processes
@pytest.mark.parametrize("settings", [{}, {"layers": (0,), "saliency_to_encoder": True}], ids=str)
def test_ranks_stay_equal_and_no_parameter_is_waited_for(settings: dict[str, Any]) -> None:
    module = Mixed()
    method = ContributionTokenDropping(**SETTINGS, **settings)
    two_processes(callbacks=[method, Alike()], max_steps=12).fit(module, toy_loader(64))
    assert is_packed(module)


@ignore_warnings_of_processes
def test_a_deployed_model_is_fine_tuned_further_by_two_processes(tmp_path: Path) -> None:
    module = ToyModule()
    toy_trainer(callbacks=[ContributionTokenDropping(**SETTINGS)], max_steps=12).fit(module, toy_loader())
    save_pretrained(module, tmp_path)
    tuned = ToyModule()
    tuned.model = load(tmp_path).train()
    two_processes(max_steps=3).fit(tuned, toy_loader(64))
    assert is_packed(tuned)

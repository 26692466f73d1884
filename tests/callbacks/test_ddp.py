"""Two processes on one machine: the ranks stay equal, and the caller gets the compressed model back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from lightning_compress import load, plan_of, save_pretrained
from lightning_compress.callbacks import SoftThresholdRank, convert
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from tests.toys import ToyModule, tiny_bert, toy_loader
from tests.toys_runs import Mixed, SameOnAllRanks, every_step, ignore_warnings_of_processes, two_processes

pytestmark = ignore_warnings_of_processes


class Alike(SameOnAllRanks):
    """Compares the private learning rate too."""

    def state_of(self, handle: Any) -> tuple[Any, ...]:
        return *super().state_of(handle), handle.auxiliary_lr


def ranks(**settings: Any) -> SoftThresholdRank:
    return SoftThresholdRank(**{"target_params": 0.5, "rank_multiple": 4, **settings})


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_ranks_stay_equal_and_the_caller_holds_the_converted_model(
    find_unused_parameters: bool, tmp_path: Path
) -> None:
    module = Mixed(hidden_dropout_prob=0.1)
    trainer = two_processes(find_unused_parameters, callbacks=[ranks(), Alike()])
    trainer.fit(module, toy_loader(64))
    assert any(isinstance(m, LowRankLinear) for m in module.modules())
    assert count_parameters(module.model).linear <= 0.5 * count_parameters(tiny_bert()).linear
    plan = plan_of(module)
    assert plan is not None and plan.is_converted
    save_pretrained(module, tmp_path / "model")
    again = load(tmp_path / "model")
    batch = next(iter(toy_loader()))
    with torch.no_grad():
        assert torch.equal(again(batch["input_ids"]).logits, module.model.eval()(batch["input_ids"]).logits)


class ManualMixed(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_ranks_stay_equal_under_manual_optimization() -> None:
    module = ManualMixed()
    two_processes(callbacks=[ranks(convert=False), Alike()]).fit(module, toy_loader(64))
    layers = [m for m in module.modules() if isinstance(m, SoftThresholdLinear)]
    assert layers and all(float(layer.alpha.detach()) > 0 for layer in layers)


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_caller_gets_the_training_form_back_too(start_method: str) -> None:
    module = Mixed()
    two_processes(start_method=start_method, callbacks=[ranks(convert=False)]).fit(module, toy_loader(64))
    layers = [m for m in module.modules() if isinstance(m, SoftThresholdLinear)]
    assert layers and all(layer.mode == "pinned" for layer in layers)
    assert convert(module).is_converted


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_ranks_stay_equal_after_resuming(tmp_path: Path) -> None:
    two_processes(callbacks=[ranks(), every_step(tmp_path)], enable_checkpointing=True).fit(
        Mixed(), toy_loader(64)
    )
    module = Mixed(hidden_dropout_prob=0.1)
    trainer = two_processes(callbacks=[ranks(), Alike()])
    trainer.fit(module, toy_loader(64), ckpt_path=tmp_path / "step=2.ckpt")
    assert any(isinstance(m, LowRankLinear) for m in module.modules())


def test_a_module_that_the_caller_would_not_get_back_is_refused_with_the_remedy() -> None:
    with pytest.raises(ProcessRaisedException, match=r"inherit lightning_compress\.CompressionMixin"):
        two_processes(callbacks=[ranks()]).fit(ToyModule(), toy_loader(64))

"""Manual optimization: accumulation, several optimizers, and losses that must not be touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.callbacks.manual import add_gradients, trains_compressed_layers
from lightning_compress.compressor import Compressor
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer

Batch = dict[str, torch.Tensor]


class Manual(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.extra = nn.Linear(2, 1)
        self.extra.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()


class Exponential(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss.exp())
        optimizer.step()


class Accumulates(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.model(**batch).loss / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(Manual):
    """The optimizer that steps first has nothing to do with the compressed model."""

    def __init__(self) -> None:
        super().__init__()
        self.extra.requires_grad_(True)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.extra(torch.ones(1, 2)).sum())
        first.step()
        second.zero_grad()
        self.manual_backward(self.model(**batch).loss)
        second.step()

    def configure_optimizers(self) -> Any:
        mine = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return [torch.optim.SGD(self.extra.parameters(), lr=0.1), mine]


def ranks() -> SoftThresholdRank:
    return SoftThresholdRank(target_params=0.5, rank_multiple=4, convert=False)


def thresholds(module: ToyModule, size: int = 32, **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    toy_trainer(callbacks=[ranks()], **{"max_epochs": 1, **settings}).fit(module, toy_loader(size))
    assert module.__dict__["_compression"].compressor.is_on_target
    layers = [m for m in module.modules() if isinstance(m, SoftThresholdLinear)]
    found = torch.stack([layer.alpha.detach() for layer in layers])
    assert float(found.min()) > 0
    return found


def test_the_value_of_the_users_loss_may_be_needed_for_its_gradient() -> None:
    assert thresholds(Exponential()).isfinite().all()


def test_accumulation_by_hand_moves_thresholds_as_the_trainers_does() -> None:
    by_hand = thresholds(Accumulates(), size=128)
    by_trainer = thresholds(ToyModule(), size=128, accumulate_grad_batches=4)
    assert torch.allclose(by_hand, by_trainer, rtol=1e-4)


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "fp16"])
def test_thresholds_step_with_the_optimizer_of_the_compressed_model(scaled: bool) -> None:
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if scaled else []
    among_two = thresholds(Adversarial(), plugins=plugins)
    assert torch.allclose(among_two, thresholds(Manual()), rtol=0.02 if scaled else 1e-6)


@pytest.mark.parametrize("length", [{"max_steps": 6, "max_epochs": 100}, {"max_steps": 100, "max_epochs": 1}])
def test_the_schedule_ends_with_whichever_of_steps_and_epochs_comes_first(length: dict[str, int]) -> None:
    assert bool((thresholds(Manual(), **length) > 0).all())


def test_gradients_are_added_to_those_that_are_there() -> None:
    one, other = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    other.grad = torch.tensor(5.0)
    add_gradients([one * other, other], [one, other, nn.Parameter(torch.ones(2))], scale=2.0)
    assert float(one.grad) == 6.0 and float(other.grad) == 5.0 + 2.0 * (2.0 + 1.0)


def test_constant_terms_add_nothing() -> None:
    parameter = nn.Parameter(torch.ones(()))
    add_gradients([], [parameter])
    add_gradients([torch.tensor(1.0)], [parameter])
    assert parameter.grad is None


def test_the_optimizer_of_adapters_stands_in_where_the_layers_are_frozen() -> None:
    model = tiny_bert()
    model.bert.encoder.requires_grad_(False)
    compressor = Compressor(model, [SoftThresholdRankConfig(rank_multiple=4)])
    compressor.prepare()
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    head = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    assert trains_compressed_layers(head, [head, other], compressor)
    assert not trains_compressed_layers(other, [head, other], compressor)
    encoder = torch.optim.SGD(model.bert.encoder.parameters(), lr=0.1)
    assert not trains_compressed_layers(head, [head, other, encoder], compressor)
    assert trains_compressed_layers(encoder, [head, other, encoder], compressor)
    assert trains_compressed_layers(other, [other], compressor)

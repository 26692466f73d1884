from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_compress import ContributionTokenDropping, choose_threshold_scale
from lightning_compress.runtime.dial import threshold_scale
from tests.toys import ToyModule, ToyTexts, toy_loader, toy_trainer


class TupleTexts(ToyTexts):
    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        return item["input_ids"], item["labels"]


class TupleModule(ToyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(batch[0], labels=batch[1]).loss)


class Blind(ToyModule):
    validation_step = LightningModule.validation_step


def dropping(**settings: Any) -> ContributionTokenDropping:
    return ContributionTokenDropping(target_flops=0.6, warmup=0.2, predictor_width=4, **settings)


def test_the_scale_is_chosen_on_validation_data_when_fit_ends():
    module, callback = ToyModule(), dropping(max_drop=0.2)
    toy_trainer(callbacks=[callback]).fit(module, toy_loader(), toy_loader(12))
    assert callback.chosen is not None
    assert threshold_scale(module.model) == pytest.approx(callback.chosen.scale)
    again = choose_threshold_scale(module.model, toy_loader(12), max_drop=0.2)
    assert again == callback.chosen


def test_only_as_many_batches_are_used_as_the_trainer_validates_on():
    module, callback, seen = ToyModule(), dropping(max_drop=0.0), []

    class Counting(ToyTexts):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(index)
            return super().__getitem__(index)

    trainer = toy_trainer(callbacks=[callback], limit_val_batches=2, num_sanity_val_steps=0)
    trainer.fit(module, toy_loader(), DataLoader(Counting(12), batch_size=4))
    assert set(seen) == set(range(8))


def test_without_the_option_the_scale_stays_as_trained():
    module, callback = ToyModule(), dropping(target_tokens=None, max_drop=None)
    toy_trainer(callbacks=[callback]).fit(module, toy_loader())
    assert callback.chosen is None
    assert 0.25 <= threshold_scale(module.model) <= 4.0


@pytest.mark.filterwarnings(
    "ignore:You passed in a `val_dataloader` but have no `validation_step`:UserWarning"
)
@pytest.mark.parametrize(
    ("module", "loader", "settings"),
    [
        (ToyModule, None, {}),
        (ToyModule, toy_loader(4), {"limit_val_batches": 0}),
        (Blind, toy_loader(4), {}),
    ],
    ids=["no loader", "no batches", "no validation step"],
)
def test_a_run_without_validation_data_is_refused_before_it_starts(module, loader, settings):
    trainer = toy_trainer(callbacks=[dropping(max_drop=0.1)], **settings)
    with pytest.raises(ValueError, match=r"max_drop=0\.1 is measured on validation data"):
        trainer.fit(module(), toy_loader(), loader)
    assert trainer.global_step == 0


def test_batches_that_cannot_be_scored_are_refused_before_training():
    trainer = toy_trainer(callbacks=[dropping(max_drop=0.1)])
    with pytest.raises(ValueError, match="a batch is a list: give dicts"):
        trainer.fit(TupleModule(), toy_loader(), DataLoader(TupleTexts(8), batch_size=4))
    assert trainer.global_step == 0


def test_the_option_needs_a_converted_model():
    with pytest.raises(ValueError, match="leave convert=False out"):
        dropping(max_drop=0.1, convert=False)


@pytest.mark.parametrize("max_drop", [-0.01, 1.0])
def test_a_loss_out_of_range_is_refused(max_drop):
    with pytest.raises(ValueError, match=r"is outside \[0, 1\)"):
        dropping(max_drop=max_drop)

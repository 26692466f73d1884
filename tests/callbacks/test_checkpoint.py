"""Checkpoints that wait for the target."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress.callbacks import CompressedModelCheckpoint, SoftThresholdRank
from tests.toys import ToyModule, toy_loader, toy_trainer


def test_best_is_chosen_only_among_models_on_target(tmp_path: Path) -> None:
    settings = {"monitor": "val/loss", "mode": "max", "save_top_k": -1, "every_n_epochs": 1}
    gated = CompressedModelCheckpoint(dirpath=tmp_path / "gated", filename="{step}", **settings)
    plain = ModelCheckpoint(dirpath=tmp_path / "plain", filename="{step}", **settings)
    method = SoftThresholdRank(target_params=0.5, rank_multiple=4, search_end=0.5, sharpness=1.0)
    trainer = toy_trainer(callbacks=[gated, plain, method], max_epochs=4, enable_checkpointing=True)
    trainer.fit(ToyModule(), toy_loader(8), toy_loader(8))
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == [f"step={s}.ckpt" for s in (2, 4, 6, 8)]
    assert sorted(p.name for p in (tmp_path / "gated").iterdir()) == ["step=6.ckpt", "step=8.ckpt"]


def test_a_run_that_never_meets_the_target_says_that_nothing_was_saved(tmp_path: Path) -> None:
    gated = CompressedModelCheckpoint(dirpath=tmp_path / "gated", monitor="val/loss")
    method = SoftThresholdRank(
        target_params=0.5, rank_multiple=4, search_end=1.0, threshold_lr=1e-9, convert=False
    )
    trainer = toy_trainer(callbacks=[gated, method], max_epochs=1, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="saved nothing"):
        trainer.fit(ToyModule(), toy_loader(8), toy_loader(8))
    assert not (tmp_path / "gated").exists()

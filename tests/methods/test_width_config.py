"""Settings of WidthSlimming: what is refused, and the goal where none is given."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_compress.methods.width_config import WidthSlimmingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_params": 0.5, "target_flops": 0.5}, "are two goals"),
        ({"target_params": 0.0}, r"target_params=0.0 is outside \(0, 1\]"),
        ({"target_flops": 1.5}, r"target_flops=1.5 is outside \(0, 1\]"),
        ({"heads": 0}, "heads=0 is neither a count"),
        ({"ffn": 1.5}, "ffn=1.5 is neither a count"),
        ({"criterion": "magic"}, "criterion='magic' is not one of"),
        ({"ranking": "local"}, "ranking='local' is not one of"),
        ({"scope": "all"}, "scope='all' is not one of"),
        ({"start": 0.5, "end": 0.5}, "end=0.5 is outside"),
        ({"start": 1.0}, "start=1.0 is outside"),
        ({"steps": 0}, "steps=0 is below 1"),
        ({"calibration_seed": -1}, "calibration_seed=-1 is below 0"),
        ({"calibration_batches": -1}, "calibration_batches=-1 is below 0"),
        ({"gate_lr": 0.0}, "gate_lr=0.0 is not positive"),
        ({"criterion": "per_exit"}, "give calibration_batches"),
        ({"heads": 1, "ffn": 2, "target_params": 0.9}, "but heads and ffn are: leave out one of them"),
        ({"heads": 1, "ffn": 2, "target_flops": 0.9}, "but heads and ffn are: leave out one of them"),
        ({"criterion": "l0", "hidden": 16}, "takes neither hidden nor"),
        ({"importance_loss": "own"}, "importance_loss='own' is not one of"),
        ({"importance_loss": "official"}, "a separate pass: give calibration_batches"),
        ({"importance_loss": "official", "criterion": "l0"}, r"reads gradients \(it is 'l0'\)"),
        ({"importance_from": "teacher"}, "importance_from='teacher' is not one of"),
        ({"importance_from": "final_exit"}, "sum of all losses: give calibration_batches"),
        ({"importance_from": "final_exit", "criterion": "l0"}, "leaves criterion='l0' nothing to read"),
        (
            {"importance_from": "final_exit", "criterion": "per_exit", "calibration_batches": 2},
            "leaves criterion='per_exit' nothing to read",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WidthSlimmingConfig(**settings)


@pytest.mark.parametrize("settings", [{"hidden": True}, {"heads": "half"}, {"start": None}])
def test_what_is_no_number_is_refused_by_name(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(
        TypeError, match=rf"^{name}={re.escape(repr(value))} is of type .*, but stands for a number"
    ):
        WidthSlimmingConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": [4]},
        {"steps": 4.0},
        {"steps": 1.5},
        {"calibration_batches": 2.0},
        {"ffn_multiple": 8.0},
        {"calibration_seed": 0.0},
        {"text_length": 64.0},
    ],
)
def test_what_is_no_whole_number_is_refused_before_anything_is_trained(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(
        TypeError, match=rf"^{name}={re.escape(repr(value))} is of type .*, but stands for a whole number"
    ):
        WidthSlimmingConfig(**settings)


def test_half_of_the_layers_is_the_goal_where_none_is_given() -> None:
    assert WidthSlimmingConfig().target == 0.5
    assert WidthSlimmingConfig(heads=6).target is None
    assert WidthSlimmingConfig(heads=6, target_flops=0.3).target == 0.3

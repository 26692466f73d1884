"""Settings of learned ranks that are none are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_compress.methods.rank_config import SoftThresholdRankConfig


@pytest.mark.parametrize(
    "bad",
    [
        {"target_params": 0.0},
        {"target_params": 1.5},
        {"scope": "all"},
        {"regularizer": "l1"},
        {"regularizer_weight": -1.0},
        {"init": "random"},
        {"warmup": 1.0},
        {"warmup": 0.6, "search_end": 0.5},
        {"search_end": 1.1},
        {"sharpness": 0.0},
        {"threshold_lr": 0.0},
        {"rank_multiple": 0},
        {"dense_above": 0.0},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(bad)))):
        SoftThresholdRankConfig(**bad)

"""Settings of the wrong kind: words for numbers, and one number where several are listed."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.methods.base import HandleDefaults, MethodConfig, check_kinds
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.distillation import DistillationConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.width_config import Width, WidthSlimmingConfig

CONFIGS: list[Any] = [
    BottleneckTokenDroppingConfig,
    ContributionTokenDroppingConfig,
    DistillationConfig,
    MultiExitConfig,
    SoftThresholdRankConfig,
    WidthSlimmingConfig,
]


@dataclass(frozen=True, kw_only=True)
class _Config(MethodConfig):
    stem: ClassVar[str] = "toy"

    share: float = 0.5
    width: Width = None
    count: int | None = 3
    layers: tuple[int, ...] | None = None
    marks: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    is_on: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 1, "width": 3, "layers": (0, 1), "marks": (0.5, 1)},
        {
            "share": np.float32(0.5),
            "width": np.int64(3),
            "count": np.int64(3),
            "layers": range(2),
            "marks": [0.5],
        },
        {"width": None, "count": None, "layers": None, "names": "ab", "kind": "b", "is_on": False},
    ],
)
def test_numbers_of_any_make_are_taken_and_other_fields_left_alone(settings: dict[str, Any]) -> None:
    config = _Config(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": "0.5"}, "share='0.5' is of type str, but stands for a number"),
        ({"share": None}, "share=None is of type NoneType, but stands for a number"),
        ({"share": True}, "share=True is of type bool, but stands for a number"),
        ({"width": [3]}, "width=[3] is of type list, but stands for a number"),
        ({"count": 4.0}, "count=4.0 is of type float, but stands for a whole number, e.g. 1"),
        ({"count": True}, "count=True is of type bool, but stands for a whole number"),
        (
            {"layers": 1},
            "layers=1 is of type int, but lists whole numbers: give a list of them, of one too, e.g. [1]",
        ),
        ({"layers": (0.5,)}, "layers=(0.5,) is of type tuple, but lists whole numbers"),
        ({"layers": "01"}, "layers='01' is of type str, but lists whole numbers"),
        (
            {"marks": 0.5},
            "marks=0.5 is of type float, but lists numbers: give a list of them, of one too, e.g. [1.0]",
        ),
        ({"marks": None}, "marks=None is of type NoneType, but lists numbers"),
    ],
)
def test_what_a_field_cannot_hold_is_refused_by_name_with_the_remedy(settings: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        _Config(**settings)


def test_an_iterator_is_refused_for_looking_would_empty_it() -> None:
    with pytest.raises(TypeError, match=r"^exits=<.*> is of type list_iterator, .*: give a list of them"):
        MultiExitConfig(exits=iter([0]))  # type: ignore[arg-type]
    assert MultiExitConfig(exits=[0]).exits == (0,)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_of_every_method_is_looked_at(config: Any) -> None:
    hints = {name: str(hint) for name, hint in get_type_hints(config).items()}
    numeric = [f.name for f in fields(config) if re.search(r"\b(int|float)\b", hints[f.name])]
    assert len(numeric) > 4
    for name in numeric:
        for value in ("low", True, 1 if "tuple" in hints[name] else [1]):
            with pytest.raises(TypeError, match=f"^{re.escape(f'{name}={value!r} is of type')}"):
                config(**{name: value})


def test_a_handle_that_says_nothing_of_it_owns_no_parameters_and_spoils_no_moments() -> None:
    handle = HandleDefaults()
    handle.open_resources()
    handle.end_pass()
    assert (handle.auxiliary_groups(), handle.pop_stale_moments()) == ([], [])


def test_what_a_handle_returns_by_default_is_a_list_of_its_own() -> None:
    handle = HandleDefaults()
    handle.pop_stale_moments().append(nn.Parameter(torch.zeros(1)))
    assert handle.pop_stale_moments() == []

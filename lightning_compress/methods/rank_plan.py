"""From the user's wish to numbers: which linears are factorised, and how many weights they may keep together.

The next chapter is :mod:`lightning_compress.methods.soft_threshold_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_compress.methods.rank_config import SoftThresholdRankConfig
from lightning_compress.nn.adapters import adapter_around, check_foldable
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.rank_budget import LayerSize, smallest_size
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.nn.surgery import get_module, is_linear, linear_shape, unwrap_adapter
from lightning_compress.plan import PlanError

__all__ = ["check_structure", "chosen_paths", "weight_budget"]


def chosen_paths(model: nn.Module, config: SoftThresholdRankConfig) -> list[str]:
    """Return the paths of the linears to factorise, inside their adapters.

    Raises:
        ValueError: If there is none, or one cannot be factorised.
    """
    slots = [slot.path for layer in describe(model).layers for slot in layer.linears]
    chosen = [p for p in slots if _matches(p, config.include) and not _matches(p, config.exclude)]
    if not chosen:
        raise ValueError(
            f"include={list(config.include)} and exclude={list(config.exclude)} leave no linear to factorise; "
            f"the model's linears are {slots[:6]}{' and more' if len(slots) > 6 else ''}"
        )
    paths = [unwrap_adapter(model, path) for path in chosen]
    _check_untied(model, paths)
    for path in paths:
        module = get_module(model, path)
        if isinstance(module, SoftThresholdLinear | LowRankLinear):
            raise ValueError(f"{path} is factorised already: use a model in which it is dense, or exclude it")
        if not is_linear(module):
            raise ValueError(
                f"{path} is a {type(module).__name__}, which cannot be factorised: exclude it, or load the model "
                "without quantisation"
            )
        adapter = adapter_around(model, path)
        if adapter is not None:
            check_foldable(path, adapter)
    return paths


def weight_budget(model: nn.Module, config: SoftThresholdRankConfig, sizes: Mapping[str, LayerSize]) -> int:
    """Return how many weights the chosen linears may hold so that the scope meets its target.

    Raises:
        ValueError: If the target cannot be reached.
    """
    dense = sum(size.dense for size in sizes.values())
    counted = count_parameters(model)
    adapters = sum(size.extra_rank * (size.in_features + size.out_features) for size in sizes.values())
    whole = dense if config.scope == "linear" else getattr(counted, config.scope) - adapters
    budget = math.floor(config.target_params * whole) - (whole - dense)
    smallest = smallest_size(sizes, config.rank_multiple, config.dense_above)
    if budget < smallest:
        reachable = math.ceil(1000 * (whole - dense + smallest) / whole) / 1000
        raise ValueError(
            f"target_params={config.target_params} of scope {config.scope!r} cannot be reached: the factorised linears "
            f"hold {dense:,} of its {whole:,} parameters and shrink to {smallest:,} at least. Ask for {reachable} or "
            "more, widen include, lower rank_multiple, or count another scope"
        )
    return min(budget, dense)


def check_structure(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Refuse a structure that is none, or does not fit the model.

    Raises:
        PlanError: If so.
    """
    ranks, merged = structure.get("ranks"), structure.get("merged", [])
    if (
        set(structure) - {"merged"} != {"ranks"}
        or not isinstance(ranks, Mapping)
        or not isinstance(merged, list)
    ):
        raise PlanError(
            f"soft_threshold_rank needs the structure {{'ranks': {{...}}}}, got fields {sorted(structure)}"
        )
    for path in merged:
        _check_linear(model, path)
    for path, rank in ranks.items():
        _check_rank(model, path, rank)


def _check_untied(model: nn.Module, paths: list[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path in paths:
        weight = getattr(get_module(model, path), "weight", None)
        shared = names.get(id(weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"the weight of {path} is shared by {shared}: factorising would untie it. Exclude these layers"
            )


def _check_linear(model: nn.Module, path: Any) -> None:
    if not isinstance(path, str) or not is_linear(_module_or_plan_error(model, path)):
        raise PlanError(f"plan lists {path!r}, which is not a dense linear layer of {type(model).__name__}")


def _check_rank(model: nn.Module, path: Any, rank: Any) -> None:
    _check_linear(model, path)
    full = min(linear_shape(_module_or_plan_error(model, path)))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full:
        raise PlanError(f"plan gives {path} the rank {rank!r}; allowed are whole numbers from 1 to {full}")


def _module_or_plan_error(model: nn.Module, path: str) -> nn.Module:
    try:
        return get_module(model, unwrap_adapter(model, path))
    except ValueError as error:
        raise PlanError(f"plan does not fit the model: {error}") from error


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)

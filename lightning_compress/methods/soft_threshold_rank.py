"""SoftThresholdRank: every linear becomes U f(sigma - alpha) V, and the model learns each layer's rank.

The plot in the order of time: the config (written down in :mod:`lightning_compress.methods.rank_config`), what it means
for a model (:mod:`lightning_compress.methods.rank_plan`), :func:`prepare`, :func:`update` (warm-up, search, recovery),
:func:`convert`, :func:`restore`. How ranks are chosen under a budget stands in
:mod:`lightning_compress.nn.rank_budget`; the cast is in :mod:`lightning_compress.nn.soft_threshold_rank`.

Paper: SoftLMs (arXiv 2411.10543); schedule after the code of its successor STAR-KV (arXiv 2606.08382).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lightning_compress.methods.base import AuxiliaryGroup, HandleDefaults
from lightning_compress.methods.rank_config import SoftThresholdRankConfig
from lightning_compress.methods.rank_plan import check_structure, chosen_paths, weight_budget
from lightning_compress.nn.adapters import (
    adapter_around,
    adapter_factors,
    adapter_rank,
    without_adapter,
)
from lightning_compress.nn.rank_budget import LayerSize, choose_ranks, layer_cost
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, Mode, SoftThresholdLinear
from lightning_compress.nn.surgery import (
    Ledger,
    get_module,
    linear_shape,
    new_linear,
    replace_module,
    unwrap_adapter,
)

__all__ = [
    "Config",
    "SoftThresholdRankConfig",
    "SoftThresholdRankHandle",
    "convert",
    "prepare",
    "restore",
    "update",
]

_RAMP_SHARE = 0.8
_TRAVEL_SLACK = 2.0
_MODES: dict[str, Mode] = {"warmup": "open", "search": "gated", "recovery": "pinned"}


Config = SoftThresholdRankConfig


@dataclass
class SoftThresholdRankHandle(HandleDefaults):
    """A model whose linears are in training form."""

    model: nn.Module
    config: SoftThresholdRankConfig
    ledger: Ledger
    layers: dict[str, SoftThresholdLinear]
    budget: int
    """Weights that the factorised linears may hold together, adapters folded in."""
    adapter_ranks: dict[str, int] = field(default_factory=dict)
    """Rank of the adapters around linears that have some."""
    phase: Literal["warmup", "search", "recovery"] = "warmup"
    progress: float = 0.0
    auxiliary_lr: float = 0.0
    distance: float = 0.0
    """How far thresholds have to go from the start of the search to the cut at uniform ranks, on average."""
    _stale: list[nn.Parameter] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, LayerSize]:
        """Shapes of the factorised linears by path."""
        return {
            path: LayerSize(layer.in_features, layer.out_features, self.adapter_ranks.get(path, 0))
            for path, layer in self.layers.items()
        }

    @property
    def adapter_size(self) -> int:
        """Weights that adapters add to low-rank layers."""
        sizes = self.sizes
        return sum(
            rank * (sizes[p].in_features + sizes[p].out_features) for p, rank in self.adapter_ranks.items()
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Living directions by path, read from the device at once."""
        counts = torch.stack([layer.count_live() for layer in self.layers.values()]).tolist()
        return dict(zip(self.layers, counts, strict=True))

    @property
    def size(self) -> int:
        """Weights the factorised linears would hold if converted now."""
        c, ranks = self.config, self.ranks
        return sum(layer_cost(s, ranks[p], c.rank_multiple, c.dense_above) for p, s in self.sizes.items())

    @property
    def dense_size(self) -> int:
        """Weights of the same linears in dense form."""
        return sum(size.dense for size in self.sizes.values())

    @property
    def scheduled_budget(self) -> float:
        """The budget of this moment: from the dense size down to the target, geometric, done at 80 % of the search."""
        c = self.config
        end = c.warmup + _RAMP_SHARE * (c.search_end - c.warmup)
        share = min(max((self.progress - c.warmup) / (end - c.warmup), 0.0), 1.0)
        return self.dense_size * (self.budget / self.dense_size) ** share

    @property
    def is_on_target(self) -> bool:
        """Whether the ranks are pinned within the budget."""
        return self.phase == "recovery" and self.size <= self.budget

    @property
    def is_as_deployed(self) -> bool:
        """Whether the ranks are pinned."""
        return self.phase == "recovery"

    def auxiliary_groups(self) -> list[AuxiliaryGroup]:
        """The thresholds."""
        return [AuxiliaryGroup([layer.alpha for layer in self.layers.values()], self.auxiliary_lr)]

    def end_pass(self) -> None:
        """Count the inputs gathered during the warm-up."""
        for layer in self.layers.values():
            layer.settle()

    def pop_stale_moments(self) -> list[nn.Parameter]:
        """The factors and thresholds, after each change of phase."""
        stale, self._stale = self._stale, []
        return stale

    def metrics(self) -> dict[str, float]:
        """Size ratio over the factorised linears, mean rank ratio and mean threshold."""
        ratios = [rank / self.layers[path].full_rank for path, rank in self.ranks.items()]
        return {
            "size_ratio": self.size / self.dense_size,
            "rank_ratio": sum(ratios) / len(ratios),
            "threshold": float(torch.stack([layer.alpha.detach() for layer in self.layers.values()]).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Phase, progress and gathered moments; thresholds, factors and masks are in the model's own state."""
        settled = {path: layer.settled_moment_II for path, layer in self.layers.items()}
        moments = {path: moment_II.clone() for path, moment_II in settled.items() if moment_II is not None}
        names = ("phase", "progress", "auxiliary_lr", "distance")
        return {**{name: getattr(self, name) for name in names}, "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase, in the layers too."""
        self.progress, self.distance = state["progress"], state["distance"]
        _enter(self, state["phase"])
        self._stale, self.auxiliary_lr = [], state["auxiliary_lr"]
        for path, layer in self.layers.items():
            moment_II = state["moments"].get(path)
            layer.settled_moment_II = None if moment_II is None else moment_II.to(layer.u_OM.device)


def prepare(model: nn.Module, config: SoftThresholdRankConfig) -> SoftThresholdRankHandle:
    """Replace the chosen linears by :class:`SoftThresholdLinear`; outputs stay the same up to rounding.

    Raises:
        ValueError: If the patterns match nothing, a layer is factorised already, or the target cannot be reached.
    """
    paths = chosen_paths(model, config)
    adapter_ranks = {path: rank for path in paths if (rank := adapter_rank(adapter_around(model, path)))}
    sizes = {p: LayerSize(*linear_shape(get_module(model, p)), adapter_ranks.get(p, 0)) for p in paths}
    budget = weight_budget(model, config, sizes)
    ledger, layers = Ledger(model), {}
    for path in paths:
        linear = get_module(model, path)
        layers[path] = SoftThresholdLinear(linear, sharpness=config.sharpness, relative=config.relative)
        ledger.replace(path, layers[path])
    handle = SoftThresholdRankHandle(model, config, ledger, layers, budget, adapter_ranks)
    _enter(handle, "warmup")
    return handle


def update(handle: SoftThresholdRankHandle, progress: float) -> None:
    """Move through warm-up, search and recovery, and set the thresholds' learning rate for the coming step."""
    config, step = handle.config, progress - handle.progress
    handle.progress = progress
    if handle.phase == "warmup" and progress >= config.warmup:
        refactorise(handle)
        _enter(handle, "search")
        handle.distance = _distance(handle)
    if handle.phase == "search" and _search_is_over(handle):
        pin(handle)
    if handle.phase == "search" and step > 0:
        handle.auxiliary_lr = config.threshold_lr or _crossing_rate(handle, step)


def refactorise(handle: SoftThresholdRankHandle) -> None:
    """Decompose the current weights anew, whitened by gathered inputs; processes pool inputs, rank 0 decides."""
    is_distributed = dist.is_available() and dist.is_initialized()
    for layer in handle.layers.values():
        if is_distributed and layer.moment_II is not None:
            dist.all_reduce(layer.moment_II)
        layer.factorise()
        if is_distributed:
            for tensor in (layer.u_OM, layer.sigma_M, layer.v_MI, layer.scale):
                dist.broadcast(tensor.detach(), src=0)


def pin(handle: SoftThresholdRankHandle) -> None:
    """Choose the ranks that fill the budget by the learned margins, and enter recovery.

    The ranking is sigma - alpha over all layers: an overshoot is repaired by re-admitting the largest margins, an
    undershoot by giving up the smallest. A layer that stays dense keeps all its directions.
    """
    config = handle.config
    margins = {path: _margin(layer, config.allocation) for path, layer in handle.layers.items()}
    sizes = handle.sizes
    ranks = choose_ranks(margins, sizes, handle.budget, config.rank_multiple, config.dense_above)
    for path, layer in handle.layers.items():
        order_M = margins[path].argsort(descending=True, stable=True)
        keep_mask_M = torch.zeros_like(layer.keep_mask_M)
        is_dense = ranks[path] == sizes[path].full_rank  # a narrowed layer may have more directions than that
        keep_mask_M[order_M[: None if is_dense else ranks[path]]] = True
        layer.pin(keep_mask_M)
    _enter(handle, "recovery")


def convert(handle: SoftThresholdRankHandle) -> dict[str, Any]:
    """Turn each layer into two plain linears, or back into one dense layer where that is smaller.

    Active LoRA adapters are folded in: ``[U, s B] [diag(f) V; A]``, or ``W + s B A``; their wrappers go.

    Returns:
        ``{"ranks": {path: rank}}`` over the layers that are low-rank, and under ``"merged"`` the paths of dense layers
        that lost an adapter, if there are any; other dense layers are not listed.
    """
    if handle.phase == "warmup":
        refactorise(handle)
    if handle.phase != "recovery":
        pin(handle)
    handle.ledger.revert()
    for path, layer in handle.layers.items():
        _fit_dense(handle.model, path, layer)
    ranks: dict[str, int] = {}
    merged: list[str] = []
    for path, layer in handle.layers.items():
        adapter, slot, size = adapter_around(handle.model, path), without_adapter(path), handle.sizes[path]
        replaced = [*layer.parameters(), *(adapter.parameters() if adapter is not None else ())]
        if layer_cost(size, layer.rank, 1, 1.0) < size.dense and layer.rank < layer.full_rank:
            low_rank = _low_rank(layer, adapter)
            handle.ledger.replace(slot, low_rank)
            ranks[slot] = low_rank.rank
        else:
            linear = get_module(handle.model, path)
            _load_dense(linear, layer, adapter)
            if adapter is not None:
                handle.ledger.replace(slot, linear)
                merged.append(slot)
        handle.ledger.inherit(slot, replaced)
    return {"ranks": ranks, "merged": merged} if merged else {"ranks": ranks}


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild the low-rank layers on a fresh model, without weights; adapters around listed layers go.

    Raises:
        PlanError: If the structure names a module that is not a dense linear of the model or a rank out of bounds;
            nothing has been changed or allocated then.
    """
    check_structure(model, structure)
    ledger = Ledger(model)
    for path, rank in structure["ranks"].items():
        linear = get_module(model, unwrap_adapter(model, path))
        inputs, outputs = linear_shape(linear)
        down = new_linear(linear, inputs, rank, bias=False)
        ledger.replace(
            path, LowRankLinear(down, new_linear(linear, rank, outputs, bias=linear.bias is not None))
        )
    for path in structure.get("merged", ()):
        inner = unwrap_adapter(model, path)
        if inner != path:
            ledger.replace(path, get_module(model, inner))
    return ledger


def _search_is_over(handle: SoftThresholdRankHandle) -> bool:
    is_uniform = handle.config.allocation == "uniform"
    return is_uniform or handle.progress >= handle.config.search_end or handle.size <= handle.budget


def _margin(layer: SoftThresholdLinear, allocation: str) -> torch.Tensor:
    """Worth of each direction, shape ``[M]``: what was learned, or minus its place as a share of the full rank."""
    if allocation == "learned":
        return layer.margin_M
    order_M = layer.sigma_M.detach().argsort(descending=True, stable=True)
    place_M = torch.empty_like(layer.sigma_M, requires_grad=False)
    place_M[order_M] = torch.arange(1, layer.full_rank + 1, dtype=place_M.dtype, device=place_M.device)
    size = LayerSize(layer.in_features, layer.out_features)
    return -place_M / size.break_even


def _enter(handle: SoftThresholdRankHandle, phase: str) -> None:
    handle.phase = phase  # type: ignore[assignment]
    for layer in handle.layers.values():
        layer.enter(_MODES[phase], calibrate=handle.config.init == "whitened")
        handle._stale += [layer.u_OM, layer.sigma_M, layer.v_MI, layer.alpha]
    if phase != "search":
        handle.auxiliary_lr = 0.0


def _crossing_rate(handle: SoftThresholdRankHandle, progress_step: float) -> float:
    """Step size with which thresholds can go twice the distance they have to within the search."""
    steps = (handle.config.search_end - handle.config.warmup) / max(progress_step, 1e-6)
    return _TRAVEL_SLACK * handle.distance / steps


def _distance(handle: SoftThresholdRankHandle) -> float:
    """Mean threshold that cuts every layer to the same share of its weights, the one that meets the budget."""
    share = handle.budget / handle.dense_size
    cuts = []
    for path, layer in handle.layers.items():
        rank = min(int(share * handle.sizes[path].break_even), layer.full_rank - 1)
        cuts.append(float((layer.sigma_M.detach() / layer.scale).sort(descending=True).values[rank]))
    return sum(cuts) / len(cuts)


def _fit_dense(model: nn.Module, path: str, layer: SoftThresholdLinear) -> None:
    """Give the dense layer at ``path`` the shape of ``layer``, whose inputs or outputs may have left."""
    if linear_shape(get_module(model, path)) != (layer.in_features, layer.out_features):
        replace_module(model, path, layer.dense_blank().to_empty(device=layer.u_OM.device))


@torch.no_grad()
def _low_rank(layer: SoftThresholdLinear, adapter: nn.Module | None) -> LowRankLinear:
    extra_OR, extra_RI = adapter_factors(adapter, layer.weight)
    u_OR, scaled_RI = layer._factors()
    u_OR, scaled_RI = torch.cat([u_OR, extra_OR], dim=1), torch.cat([scaled_RI, extra_RI], dim=0)
    down = nn.Linear(layer.in_features, len(scaled_RI), bias=False, device="meta")
    up = nn.Linear(len(scaled_RI), layer.out_features, bias=False, device="meta")
    down.weight, up.weight = nn.Parameter(scaled_RI.contiguous()), nn.Parameter(u_OR.contiguous())
    for linear in (down, up):
        linear.weight.requires_grad_(layer.u_OM.requires_grad)
    up.bias = layer.bias  # type: ignore[assignment]
    return LowRankLinear(down, up)


@torch.no_grad()
def _load_dense(linear: nn.Module, layer: SoftThresholdLinear, adapter: nn.Module | None) -> None:
    extra_OR, extra_RI = adapter_factors(adapter, layer.weight)
    weight_OI = layer.weight + extra_OR @ extra_RI
    transposed = linear.weight.shape != weight_OI.shape or not isinstance(linear, nn.Linear)
    linear.weight.copy_(weight_OI.T if transposed else weight_OI)  # type: ignore[operator]
    if layer.bias is not None:
        linear.bias = layer.bias  # type: ignore[assignment]

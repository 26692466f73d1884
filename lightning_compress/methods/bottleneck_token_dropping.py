"""BottleneckTokenDropping: samplers decide, token by token, what an information bottleneck lets through.

The plot in the order of time: the config, :func:`prepare`, :func:`update` (warm-up, search, recovery), :func:`convert`,
:func:`restore`. The cast is in :mod:`lightning_compress.nn.bottleneck_token_dropping`, the steering towards a target in
:mod:`lightning_compress.methods.cost_target`.

Paper: Infor-Coef (arXiv 2305.12458), equations after its official code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_compress.methods.base import AuxiliaryGroup, HandleDefaults, MethodConfig, check, check_choice
from lightning_compress.methods.cost_target import CostTarget
from lightning_compress.methods.token_dropping import (
    check_can_drop,
    check_shared_settings,
    chosen_layers,
    deploy_policy,
    install_policy,
    restore_policy,
)
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.bottleneck_token_dropping import BottleneckPolicy, SoftBottleneckPolicy
from lightning_compress.nn.surgery import Ledger
from lightning_compress.nn.tape import Tape

__all__ = [
    "BottleneckTokenDroppingConfig",
    "BottleneckTokenDroppingHandle",
    "Config",
    "convert",
    "prepare",
    "restore",
    "update",
]

_MAX_NORM = 1.0
_NOISY_UNTIL = 0.8
"""Share of the search after which the noise of decisions fades."""
_TRAVEL, _STEPS = 100.0, (0.2, 4.0)
"""Log odds that the threshold may cross in the search, and at most in a step; tokens begin to leave at about ten."""
_THRESHOLD_LIMIT = 50.0
_DUAL_RATE, _MULTIPLIERS = 2.0, (1.0, 1000.0)
"""E-folds of the multiplier for each log odd that the threshold has to rise, and its range."""
_LIVE = 0.03
"""Share of tokens that one more log odd would cost, from which on a rising threshold asks for a higher price."""


@dataclass(frozen=True, kw_only=True)
class BottleneckTokenDroppingConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields."""

    stem: ClassVar[str] = "bottleneck_token_dropping"

    target_flops: float | None = None
    """Share of the dense encoder's FLOPs to spend, in (0, 1]; 0.5 if neither of the next two is given."""
    target_tokens: float | None = None
    """Instead: share of tokens that enter the layers, on average over layers, in (0, 1]."""
    removal_weight: float | None = None
    """Weight of the term that drops tokens (the paper's gamma of the norm), at least 0; by default the published one.
    Without a target it alone decides how many leave, as in the paper."""
    objective: Literal["bottleneck", "skim"] = "bottleneck"
    """``"bottleneck"``: norm and entropy; ``"skim"``: the plain share of tokens that stay, as in Transkimmer."""
    form: Literal["rms", "kl", "batch_fro"] = "rms"
    """How the norm is taken: per text, as the Gaussian prior has it, or of the whole batch as in the official code."""
    entropy_weight: float = 4e-4
    """Weight of the negative entropy, which keeps decisions soft, at least 0."""
    entropy_from_start: bool = True
    """Whether the entropy counts in the warm-up too, as in the paper."""
    penalize: Literal["probabilities", "samples"] = "probabilities"
    """What the terms see of a decision: its probability, or its noisy sample multiplied up, as in the official code."""
    detach_hidden: bool = False
    """Whether the norm falls by dropping alone; otherwise smaller states lower it too, as in the paper."""
    layers: tuple[int, ...] | None = None
    """Indices of layers before which tokens may leave, from 0; all by default."""
    sampler_width: int | None = None
    """Neurons of each sampler, at least 1; by default as wide as the model, as in the paper."""
    sampler_lr: float = 1e-3
    """Learning rate of the samplers, positive; falls linearly to 0."""
    protect_first: int = 1
    """How many tokens at the start of a text never leave, at least 1 (the classification token)."""
    protect_tokens: tuple[int, ...] = ()
    """Token ids that never leave, e.g. the separator's."""
    warmup: float = 0.1
    """Share of training before the norm counts, in [0, 1)."""
    ramp_end: float = 0.7
    """Share of training after which decisions are those of deployment, in (warmup, 1]."""
    max_drop: float | None = None
    """By how much the validation score may be below that with nothing dropped, in [0, 1): at the end of fit the dial is
    set to the fastest that stays within. By default it stays as trained."""

    def __post_init__(self) -> None:
        check_shared_settings(self)
        check(
            self.target_flops is None or self.target_tokens is None,
            f"target_flops={self.target_flops} and target_tokens={self.target_tokens} are two goals: give one",
        )
        for name in ("removal_weight", "entropy_weight"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"{name}={value} is negative")
            check(value is None or value < math.inf, f"{name}={value} is not finite")
        check_choice(self, "objective", ("bottleneck", "skim"))
        check_choice(self, "form", ("rms", "kl", "batch_fro"))
        check_choice(self, "penalize", ("probabilities", "samples"))
        width = self.sampler_width
        check(width is None or width >= 1, f"sampler_width={width} is below 1")
        check(0.0 < self.sampler_lr < math.inf, f"sampler_lr={self.sampler_lr} is not positive and finite")
        check(0.0 <= self.warmup < 1.0, f"warmup={self.warmup} is outside [0, 1)")
        check(
            self.warmup < self.ramp_end <= 1.0,
            f"ramp_end={self.ramp_end} is outside (warmup={self.warmup}, 1]: dropping is learned between the two",
        )

    @property
    def target(self) -> float | None:
        """The ratio asked for, of FLOPs or tokens; None where the weight alone decides."""
        given = self.target_tokens or self.target_flops
        return 0.5 if given is None and self.removal_weight is None else given


Config = BottleneckTokenDroppingConfig


@dataclass
class BottleneckTokenDroppingHandle(HandleDefaults):
    """A model whose encoder learns to drop tokens."""

    model: nn.Module
    config: BottleneckTokenDroppingConfig
    ledger: Ledger
    policy: SoftBottleneckPolicy
    tape: Tape
    goal: CostTarget
    phase: Literal["warmup", "search", "recovery"] = "warmup"
    progress: float = 0.0
    multiplier: float = 1.0
    """Factor of the published weight of the term that drops tokens."""

    @property
    def is_on_target(self) -> bool:
        """Whether recent passes cost no more than a tenth above the target, after the search if it is to end."""
        return self.goal.is_met and (self.phase == "recovery" or self.config.ramp_end == 1.0)

    @property
    def is_as_deployed(self) -> bool:
        """Whether samplers decide, and no dial is to be set when training ends."""
        return self.phase != "warmup" and self.config.max_drop is None

    def auxiliary_groups(self) -> list[AuxiliaryGroup]:
        """The samplers."""
        lr = self.config.sampler_lr * (1.0 - self.progress)
        return [AuxiliaryGroup(list(self.policy.samplers.parameters()), lr, _MAX_NORM)]

    def end_pass(self) -> None:
        """Read what the latest pass cost."""
        self.goal.end_pass()

    def metrics(self) -> dict[str, float]:
        """What recent training passes kept, the log odds asked for, and the factor of the weight."""
        return {
            "multiplier": self.multiplier,
            "ratio": self.goal.ratio,
            "tokens_kept": self.goal.tokens_kept,
            "threshold": float(self.policy.threshold),
        }

    def state_dict(self) -> dict[str, Any]:
        """Phase, and what passes cost."""
        names = ("phase", "progress", "multiplier")
        return {**{name: getattr(self, name) for name in names}, "goal": self.goal.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase."""
        self.phase, self.progress, self.multiplier = state["phase"], state["progress"], state["multiplier"]
        self.goal.load_state_dict(state["goal"])
        self.policy.noise = _noise(self)


def prepare(model: nn.Module, config: BottleneckTokenDroppingConfig) -> BottleneckTokenDroppingHandle:
    """Give the encoder samplers that keep everything: in evaluation outputs stay the same until some drop.

    Raises:
        ValueError: If the model is not a sequence classifier of a family whose encoder can drop tokens, a layer does
            not exist, or another policy is there already.
    """
    anatomy = check_can_drop(model)
    tape = Tape()
    policy = SoftBottleneckPolicy(
        anatomy.hidden_size,
        chosen_layers(anatomy, config.layers),
        config.sampler_width or anatomy.hidden_size,
        config.protect_first,
        tape=tape,
        penalize=config.penalize,
    )
    ledger = install_policy(model, policy, config.protect_tokens)
    unit: Literal["flops", "tokens"] = "flops" if config.target_tokens is None else "tokens"
    goal = CostTarget(config.target, unit, config.warmup, config.ramp_end)
    handle = BottleneckTokenDroppingHandle(model, config, ledger, policy, tape.attach(model), goal)
    update(handle, 0.0)
    return handle


def update(handle: BottleneckTokenDroppingHandle, progress: float) -> None:
    """Move through warm-up, search and recovery; let the threshold follow the target, and the price the threshold."""
    config, step = handle.config, progress - handle.progress
    handle.progress = progress
    if handle.phase == "warmup" and progress >= config.warmup:
        handle.phase = "search"
    if handle.phase == "search" and progress >= config.ramp_end:
        handle.phase = "recovery"
    handle.policy.noise = _noise(handle)
    if (
        handle.phase != "warmup" and step > 0
    ):  # not if a step is done again, after a run that stopped within it
        _steer(handle, step)


def convert(handle: BottleneckTokenDroppingHandle) -> dict[str, Any]:
    """Put the packed engine in the encoder's place, with the samplers and the threshold as they are.

    Returns:
        ``{"layers": [...], "sampler_width": w, "protect_first": k, "protect_tokens": [...]}``; weights and the
        threshold are in the model's state.
    """
    soft, structure = handle.policy, _structure(handle)
    policy = _new_policy(handle.model, structure)
    policy.samplers, policy.threshold = soft.samplers, soft.deployed_threshold.clone()
    policy.scale = policy.scale.to(policy.threshold.dtype)
    handle.tape.detach()
    deploy_policy(handle.model, policy, handle.config.protect_tokens, handle.ledger)
    return structure


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild samplers and the packed engine on a fresh, possibly meta-device model.

    Raises:
        PlanError: If the structure does not fit the model.
    """
    return restore_policy(model, structure, _new_policy)


def _new_policy(model: nn.Module, structure: Mapping[str, Any]) -> BottleneckPolicy:
    hidden_size = check_can_drop(model).hidden_size
    width, first = structure["sampler_width"], structure["protect_first"]
    BottleneckTokenDroppingConfig(sampler_width=width, protect_first=first)  # refuses what is out of range
    return BottleneckPolicy(hidden_size, structure["layers"], width, first)


def _steer(handle: BottleneckTokenDroppingHandle, step: float) -> None:
    """Move the threshold towards the target at once, and the price until the threshold need not move."""
    config, goal, policy = handle.config, handle.goal, handle.policy
    low, high = _STEPS
    largest = min(max(_TRAVEL * step / (config.ramp_end - config.warmup), low), high)
    moved = goal.correction(1.0 if handle.phase == "recovery" else handle.progress, largest)
    policy.threshold += moved
    policy.threshold.clamp_(-_THRESHOLD_LIMIT, _THRESHOLD_LIMIT)
    if handle.phase == "search" and goal.elasticity > _LIVE:
        low, high = _MULTIPLIERS
        handle.multiplier = min(max(handle.multiplier * math.exp(_DUAL_RATE * moved), low), high)


def _noise(handle: BottleneckTokenDroppingHandle) -> float:
    """Return the factor of the noise: 1, and over the last fifth of the search down to 0, where it stays.

    Recovery has none and the user's own target also where a longer run resumes, or a second one begins at 0.
    """
    config = handle.config
    if handle.phase == "recovery":
        return 0.0
    share = (handle.progress - config.warmup) / (config.ramp_end - config.warmup)
    return min(max((1.0 - share) / (1.0 - _NOISY_UNTIL), 0.0), 1.0)


def _structure(handle: BottleneckTokenDroppingHandle) -> dict[str, Any]:
    config = handle.config
    return {
        "layers": list(handle.policy.layers),
        "sampler_width": config.sampler_width or describe(handle.model).hidden_size,
        "protect_first": config.protect_first,
        "protect_tokens": list(config.protect_tokens),
    }

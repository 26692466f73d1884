"""ContributionTokenDropping: small predictors learn which tokens carry the prediction; the others leave.

The plot in the order of time: the config, :func:`prepare`, :func:`update` (warm-up, ramp, recovery), :func:`convert`,
:func:`restore`. The cast is in :mod:`lightning_compress.nn.contribution_token_dropping`, the teacher in
:mod:`lightning_compress.methods.saliency_teacher`, the target and what passes cost in
:mod:`lightning_compress.methods.cost_target`.

Shape legend: B batch, T padded length.

Paper: AdapLeR (arXiv 2203.08991), equations after its official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compress.methods.base import AuxiliaryGroup, HandleDefaults, MethodConfig, check
from lightning_compress.methods.cost_target import CostTarget
from lightning_compress.methods.saliency_teacher import SaliencyTeacher
from lightning_compress.methods.teacher import source_of
from lightning_compress.methods.token_dropping import (
    check_can_drop,
    check_shared_settings,
    chosen_layers,
    deploy_policy,
    install_policy,
    restore_policy,
)
from lightning_compress.nn.contribution_token_dropping import ContributionPolicy, SoftContributionPolicy
from lightning_compress.nn.dropping import InputRecorder
from lightning_compress.nn.surgery import Ledger
from lightning_compress.nn.tape import Tape

__all__ = [
    "Config",
    "ContributionTokenDroppingConfig",
    "ContributionTokenDroppingHandle",
    "convert",
    "prepare",
    "restore",
    "update",
]

_ETA_RANGE = (0.01, 1.0)
_THETA_FLOOR = 1e-3
_TRAVEL = 2.0
"""Thresholds may cross this distance in the ramp, by default."""
_MAX_NORM = 1.0
_OWN_STATE = ("phase", "progress", "threshold_lr", "multiplier")
_MAX_WIDTH = 4096
_STRUCTURE = ("layers", "predictor_width", "protect_first", "protect_tokens")
_DUAL_RATE = 0.3
_MULTIPLIER_LIMIT = 10.0
_CORRECTION_RATE = 0.03
_CORRECTION_TRAVEL = 6.0
"""How fast the common scale of all thresholds follows the target once they rest: so much a step at least, and so much
over the whole recovery."""
_SCALE_RANGE = (0.25, 4.0)


@dataclass(frozen=True, kw_only=True)
class ContributionTokenDroppingConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields."""

    stem: ClassVar[str] = "contribution_token_dropping"

    target_flops: float | None = None
    """Share of the dense encoder's FLOPs to spend, in (0, 1]; 0.5 if no other goal is given."""
    target_tokens: float | None = None
    """Instead: share of tokens that enter the layers, on average over layers, in (0, 1]."""
    length_weight: float | None = None
    """Instead: fixed weight of the summed token counts (the paper's phi), at least 0."""
    saliency_weight: float = 0.1
    """Weight of the distance between predictors and saliency (the paper's gamma), at least 0."""
    saliency_to_encoder: bool = False
    """Whether that distance also trains the encoder, as in the paper; costs nearly half a step more."""
    teacher: str = "self"
    """``"self"``: the model itself as it is at the end of the warm-up; ``"module"``: a ``teacher_model`` that is given
    beside these settings; else folder or name of a fine-tuned model."""
    teacher_bits: Literal[4, 8] | None = None
    """Hold the teacher's linears in so many bits (bitsandbytes); by default as they are."""
    layers: tuple[int, ...] | None = None
    """Indices of layers before which tokens may leave, from 0; all by default."""
    predictor_width: int = 32
    """Neurons of each predictor, in [1, 4096]."""
    predictor_lr: float = 5e-3
    """Learning rate of the predictors when dropping begins, positive; falls linearly to 0."""
    protect_first: int = 1
    """How many tokens at the start of a text never leave, at least 1 (the classification token)."""
    protect_tokens: tuple[int, ...] = ()
    """Token ids that never leave, e.g. the separator's."""
    warmup: float | None = None
    """Share of training before dropping begins, in [0, 1); by default 0.3 with the teacher ``"self"``, else 0."""
    ramp_end: float | None = None
    """Share of training after which thresholds rest and removal is all but hard, in (warmup, 1]; by default
    halfway from the end of the warm-up to the end of training."""
    slope_start: float = 10.0
    """Slope lambda of the soft removal when dropping begins, positive."""
    slope_end: float = 1e5
    """Slope at the end of the ramp, at least ``slope_start``; geometric between."""
    threshold_init: float = 0.25
    """Where the thresholds eta start, in units of the mean share, in [0.01, 1]."""
    threshold_lr: float | None = None
    """Learning rate of the thresholds; by default such that they can cross their range twice in the ramp."""
    max_drop: float | None = None
    """By how much the validation score may be below that with nothing dropped, in [0, 1): at the end of fit the common
    scale of the thresholds is set to the fastest that stays within. By default the scale stays as trained."""

    def __post_init__(self) -> None:
        check_shared_settings(self)
        object.__setattr__(self, "teacher", source_of(self.teacher))
        goals = {n: getattr(self, n) for n in ("target_flops", "target_tokens", "length_weight")}
        given = {name: value for name, value in goals.items() if value is not None}
        check(
            len(given) <= 1,
            f"{given} are several goals: give one of target_flops, target_tokens, length_weight",
        )
        check(
            self.length_weight is None or self.length_weight >= 0,
            f"length_weight={self.length_weight} is negative",
        )
        check(self.saliency_weight >= 0, f"saliency_weight={self.saliency_weight} is negative")
        check(self.teacher_bits in (None, 4, 8), f"teacher_bits={self.teacher_bits} is not 4, 8 or None")
        check(
            1 <= self.predictor_width <= _MAX_WIDTH,
            f"predictor_width={self.predictor_width} is outside [1, {_MAX_WIDTH}]",
        )
        check(self.predictor_lr > 0, f"predictor_lr={self.predictor_lr} is not positive")
        check(self.warmup is None or 0.0 <= self.warmup < 1.0, f"warmup={self.warmup} is outside [0, 1)")
        check(
            self.dense_share < self.hard_from <= 1.0,
            f"ramp_end={self.ramp_end} is outside (warmup={self.dense_share}, 1]: dropping is learned between the two",
        )
        check(
            0.0 < self.slope_start <= self.slope_end,
            f"slope_start={self.slope_start} is outside (0, slope_end={self.slope_end}]",
        )
        low, high = _ETA_RANGE
        check(
            low <= self.threshold_init <= high,
            f"threshold_init={self.threshold_init} is outside [{low}, {high}]",
        )
        check(
            self.threshold_lr is None or self.threshold_lr > 0,
            f"threshold_lr={self.threshold_lr} is not positive",
        )

    @property
    def dense_share(self) -> float:
        """Share of training before dropping begins."""
        if self.warmup is not None:
            return self.warmup
        return 0.3 if self.teacher == "self" else 0.0

    @property
    def hard_from(self) -> float:
        """Share of training after which thresholds rest."""
        return self.ramp_end if self.ramp_end is not None else 0.5 * (1.0 + self.dense_share)

    @property
    def target(self) -> float | None:
        """The ratio asked for, of FLOPs or tokens; None with a fixed weight."""
        if self.length_weight is not None:
            return None
        return self.target_tokens or self.target_flops or 0.5


Config = ContributionTokenDroppingConfig


@dataclass
class ContributionTokenDroppingHandle(HandleDefaults):
    """A model whose encoder learns to drop tokens."""

    model: nn.Module
    config: ContributionTokenDroppingConfig
    ledger: Ledger
    policy: SoftContributionPolicy
    tape: Tape
    recorder: InputRecorder
    teacher: SaliencyTeacher
    goal: CostTarget
    num_layers: int
    phase: Literal["warmup", "ramp", "recovery"] = "warmup"
    progress: float = 0.0
    threshold_lr: float = 0.0
    """Learning rate of the thresholds for the coming step."""
    multiplier: float = 1.0
    """Lagrange multiplier of the target."""

    @property
    def is_on_target(self) -> bool:
        """Whether thresholds rest and recent passes cost no more than a tenth above the target."""
        return self.phase == "recovery" and self.goal.is_met

    @property
    def is_as_deployed(self) -> bool:
        """Whether thresholds rest, and no dial is to be set when training ends."""
        return self.phase == "recovery" and self.config.max_drop is None

    def look_up_saliency(self) -> Tensor:
        """Return the teacher's saliencies of the latest inputs, ``[B, T]``."""
        return self.teacher.saliency(self.recorder.inputs)

    def open_resources(self) -> None:
        """Load the teacher, unless it is the model itself.

        Raises:
            ValueError: If it cannot be loaded or does not fit.
        """
        self.teacher.open(self.model)

    def auxiliary_groups(self) -> list[AuxiliaryGroup]:
        """The thresholds with the factors of the first token, and the predictors."""
        left = (1.0 - self.progress) / (1.0 - self.config.dense_share)
        predictor_lr = 0.0 if self.phase == "warmup" else self.config.predictor_lr * left
        thresholds: list[nn.Parameter] = [self.policy.eta_K, self.policy.theta_K]
        return [
            AuxiliaryGroup(thresholds, self.threshold_lr, _MAX_NORM),
            AuxiliaryGroup(list(self.policy.predictors.parameters()), predictor_lr, _MAX_NORM),
        ]

    def end_pass(self) -> None:
        """Read what the latest pass cost."""
        self.goal.end_pass()

    def metrics(self) -> dict[str, float]:
        """What recent training passes kept, the mean threshold, and the slope."""
        return {
            "ratio": self.goal.ratio,
            "tokens_kept": self.goal.tokens_kept,
            "threshold": float(self.policy.eta_K.detach().mean()),
            "slope": self.policy.slope,
        }

    def state_dict(self) -> dict[str, Any]:
        """Phase, multiplier, what passes cost, and the teacher with the saliencies it gave."""
        own = {name: getattr(self, name) for name in _OWN_STATE}
        return {**own, "goal": self.goal.state_dict(), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase, and the teacher."""
        for name in _OWN_STATE:
            setattr(self, name, state[name])
        self.goal.load_state_dict(state["goal"])
        self.policy.is_active = self.phase != "warmup"
        self.policy.slope = _slope(self)
        self.teacher.load_state_dict(state["teacher"], self.model)


def prepare(
    model: nn.Module, config: ContributionTokenDroppingConfig, teacher_model: nn.Module | None = None
) -> ContributionTokenDroppingHandle:
    """Give the encoder predictors and thresholds; outputs stay the same until the warm-up is over.

    Args:
        model: A sequence classifier.
        config: The settings.
        teacher_model: The teacher, where ``config.teacher`` is ``"module"``; a copy of it is kept.

    Raises:
        ValueError: If the model is not a sequence classifier of a family whose encoder can drop tokens, a layer does
            not exist, or two teachers are named.
    """
    anatomy = check_can_drop(model)
    tape = Tape()
    policy = SoftContributionPolicy(
        anatomy.hidden_size,
        chosen_layers(anatomy, config.layers),
        config.predictor_width,
        config.protect_first,
        threshold=config.threshold_init,
        tape=tape,
        shares_reach_encoder=config.saliency_to_encoder,
    )
    teacher = SaliencyTeacher(config.teacher, config.teacher_bits, teacher_model)
    ledger = install_policy(model, policy, config.protect_tokens)
    unit: Literal["flops", "tokens"] = "flops" if config.target_tokens is None else "tokens"
    return ContributionTokenDroppingHandle(
        model,
        config,
        ledger,
        policy,
        tape.attach(model),
        InputRecorder().attach(model),
        teacher,
        CostTarget(config.target, unit, config.dense_share, config.hard_from),
        len(anatomy.layers),
    )


def update(handle: ContributionTokenDroppingHandle, progress: float) -> None:
    """Move through warm-up, ramp and recovery; set the slope, the multiplier and the thresholds' learning rate.

    Raises:
        ValueError: If there is no teacher yet, and it cannot be loaded or does not fit.
    """
    config, step = handle.config, progress - handle.progress
    handle.progress = progress
    handle.goal.advance(progress)
    handle.teacher.open(handle.model)
    if handle.phase == "warmup" and progress >= config.dense_share:
        handle.teacher.settle(handle.model)
        handle.phase, handle.policy.is_active = "ramp", True
    if handle.phase == "ramp" and progress >= config.hard_from:
        handle.phase, handle.threshold_lr = "recovery", 0.0
    handle.policy.slope = _slope(handle)
    _clamp(handle.policy)
    if step > 0:  # not if a step is done again, after a run that stopped within it
        _steer(handle, step)
    if handle.phase == "ramp" and step > 0:
        steps = (config.hard_from - config.dense_share) / step
        handle.threshold_lr = config.threshold_lr or _TRAVEL / max(steps, 1.0)


def convert(handle: ContributionTokenDroppingHandle) -> dict[str, Any]:
    """Put the packed engine in the encoder's place, with the predictors and thresholds as they are.

    Returns:
        ``{"layers": [...], "predictor_width": w, "protect_first": k, "protect_tokens": [...]}``; thresholds and weights
        are in the model's state.
    """
    soft, config = handle.policy, handle.config
    _clamp(soft)
    policy = _new_policy(handle.model, _structure(soft.layers, config))
    policy.predictors, policy.eta_K = soft.predictors, soft.deployed_eta_K  # the dial starts at 1
    policy.scale = policy.scale.to(policy.eta_K.dtype)
    handle.tape.detach()
    handle.recorder.detach()
    deploy_policy(handle.model, policy, config.protect_tokens, handle.ledger)
    return _structure(soft.layers, config)


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild predictors, thresholds and the packed engine on a fresh, possibly meta-device model.

    Raises:
        PlanError: If the structure does not fit the model.
    """
    return restore_policy(model, structure, _new_policy)


def _new_policy(model: nn.Module, structure: Mapping[str, Any]) -> ContributionPolicy:
    if set(structure) != set(_STRUCTURE):
        raise ValueError(f"it needs the fields {list(_STRUCTURE)} and has {sorted(structure)}")
    for name, most in (("predictor_width", _MAX_WIDTH), ("protect_first", None)):
        number = structure[name]
        if type(number) is not int or number < 1 or (most is not None and number > most):
            raise ValueError(
                f"{name} must be a whole number from 1{f' to {most}' if most else ''}, got {number!r}"
            )
    hidden_size = check_can_drop(model).hidden_size
    return ContributionPolicy(
        hidden_size, structure["layers"], structure["predictor_width"], structure["protect_first"]
    )


def _structure(layers: tuple[int, ...], config: ContributionTokenDroppingConfig) -> dict[str, Any]:
    values = (list(layers), config.predictor_width, config.protect_first, list(config.protect_tokens))
    return dict(zip(_STRUCTURE, values, strict=True))


def _slope(handle: ContributionTokenDroppingHandle) -> float:
    """Return lambda: geometric over the ramp; in recovery removal stays hard, also where a second fit begins at 0.

    Departs from the paper: the official code sets it once an epoch, after the step that should have used it
    (specification §1.7, 2).
    """
    config = handle.config
    if handle.phase == "recovery":
        return config.slope_end
    share = (handle.progress - config.dense_share) / (config.hard_from - config.dense_share)
    return config.slope_start * (config.slope_end / config.slope_start) ** min(max(share, 0.0), 1.0)


@torch.no_grad()
def _steer(handle: ContributionTokenDroppingHandle, step: float) -> None:
    """Follow the target: by the multiplier while thresholds learn, by their common scale once they rest."""
    if handle.config.target is None or handle.phase == "warmup":
        return
    excess = handle.goal.excess(1.0 if handle.phase == "recovery" else handle.progress)
    if handle.phase == "ramp":
        handle.multiplier = min(max(handle.multiplier + _DUAL_RATE * excess, 0.0), _MULTIPLIER_LIMIT)
    else:
        rate = max(
            _CORRECTION_RATE, min(_CORRECTION_TRAVEL * step / max(1.0 - handle.config.hard_from, step), 0.3)
        )
        handle.policy.scale.mul_(1.0 + rate * min(max(excess, -1.0), 1.0)).clamp_(*_SCALE_RANGE)


@torch.no_grad()
def _clamp(policy: SoftContributionPolicy) -> None:
    policy.eta_K.clamp_(*_ETA_RANGE)
    policy.theta_K.clamp_(min=_THETA_FLOOR)

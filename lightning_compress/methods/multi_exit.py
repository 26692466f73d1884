"""MultiExit: an exit after every layer, trained together with the model's own head; easy texts leave early.

The plot in the order of time: the config, :func:`prepare`, :func:`update` (the exits' losses grow to full weight),
:func:`convert`, :func:`restore`. The cast is in :mod:`lightning_compress.nn.multi_exit`,
:mod:`lightning_compress.nn.exit_rules` and :mod:`lightning_compress.nn.exit_router`.

Paper: COST-EFF (arXiv 2210.15523), specification §1.2, §2.1, §3.1 and §4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_compress.methods.base import HandleDefaults, MethodConfig, check, check_choice, check_kinds
from lightning_compress.methods.token_dropping import whole_numbers
from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.distillation import LogitsRecorder, stop_recording
from lightning_compress.nn.exit_policy import ExitPolicy, ExitRuleName
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.exit_rules import make_exit_rule
from lightning_compress.nn.layer_taps import LayerTaps, exits_above
from lightning_compress.nn.multi_exit import (
    Pooling,
    chosen_exits,
    install_exits,
    remove_exits,
    share_head,
)
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.plan import PlanError
from lightning_compress.runtime import PackedEncoder, packed_encoder

__all__ = ["Config", "MultiExitConfig", "MultiExitHandle", "convert", "prepare", "restore", "update"]

_MANY = 1000
"""More layers than models have."""


@dataclass(frozen=True, kw_only=True)
class MultiExitConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields."""

    stem: ClassVar[str] = "multi_exit"

    exits: tuple[int, ...] | None = None
    """Layers after which there is an exit, from 0; after all but the last by default."""
    rule: ExitRuleName = "entropy"
    """When a text leaves: ``"entropy"``, ``"max_prob"``, ``"margin"``, ``"patience"`` or ``"learned"``."""
    threshold: float | None = None
    """What the rule's measure is compared with; None lets nobody leave until it is chosen."""
    target_flops: float | None = None
    """Choose the threshold when training ends: share of the FLOPs of all layers to spend, in (0, 1]."""
    max_drop: float | None = None
    """Choose the threshold when training ends: by how much the validation score may be below that of all layers, in
    [0, 1)."""
    normalized: bool = False
    """Whether entropies are a share of that of equal probabilities, in [0, 1], instead of nats."""
    tolerance: float = 0.1
    """Of ``rule="patience"`` in regression: by how much two exits may differ that say the same, positive."""
    pooling: Pooling = "mean"
    """What an exit reads: ``"mean"``, the mean over tokens without padding, or ``"cls"``, the first token."""
    pooler: bool = False
    """Whether each exit has a dense layer before its ``tanh``, like BERT's pooler."""
    dropout: float = 0.1
    """Probability of the dropout in exits, in [0, 1)."""
    label_weight: float = 0.5
    """Weight of the exits' losses against the labels, at least 0."""
    final_weight: float = 0.5
    """Weight of the exits' distances to what the model's own head says, at least 0."""
    equilibrium: bool = True
    """Whether each layer gets the mean of the gradients of the exits above it; otherwise their sum."""
    warmup: float = 0.0
    """Share of training over which the weights of the exits' losses grow from 0, in [0, 1)."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_choice(self, "rule", get_args(ExitRuleName))
        check_choice(self, "pooling", get_args(Pooling))
        goals = [
            name for name in ("threshold", "target_flops", "max_drop") if getattr(self, name) is not None
        ]
        check(len(goals) < 2, f"{' and '.join(goals)} are different ways to choose one threshold: give one")
        check(
            self.target_flops is None or 0.0 < self.target_flops <= 1.0,
            f"target_flops={self.target_flops} is outside (0, 1]",
        )
        check(
            self.max_drop is None or 0.0 <= self.max_drop < 1.0,
            f"max_drop={self.max_drop} is outside [0, 1): 0.01 is one point of accuracy",
        )
        check(0.0 <= self.dropout < 1.0, f"dropout={self.dropout} is outside [0, 1)")
        for name in ("label_weight", "final_weight"):
            value = getattr(self, name)
            check(0.0 <= value < math.inf, f"{name}={value} is not a number from 0")
        check(0.0 <= self.warmup < 1.0, f"warmup={self.warmup} is outside [0, 1)")
        object.__setattr__(self, "exits", None if self.exits is None else tuple(self.exits))
        # refuses a threshold or tolerance that is out of range for any model
        layers = range(_MANY) if self.exits is None else self.exits
        make_exit_rule(**_rule_settings(self), layers=layers, num_labels=None, hidden_size=1)


Config = MultiExitConfig


@dataclass
class MultiExitHandle(HandleDefaults):
    """A model whose layers learn to answer early."""

    model: nn.Module
    config: MultiExitConfig
    ledger: Ledger
    exits: tuple[int, ...]
    """Layers with an exit before the last."""
    taps: LayerTaps
    recorder: LogitsRecorder
    router: ExitRouter | None
    """None in decoders, from which nobody leaves."""
    phase: Literal["warmup", "joint"] = "warmup"
    exit_weight: float = 0.0
    """Factor of the exits' losses of this moment, in [0, 1]."""

    @property
    def is_on_target(self) -> bool:
        """Whether the exits' losses have their full weight."""
        return self.phase == "joint"

    @property
    def is_as_deployed(self) -> bool:
        """Whether no threshold is to be chosen when training ends."""
        return self.config.target_flops is None and self.config.max_drop is None

    @property
    def labels(self) -> Tensor | None:
        """The labels that the model was called with in the latest pass."""
        return self.taps.inputs.get("labels")

    @property
    def final_logits(self) -> Tensor:
        """What the model's own head said in the latest pass."""
        logits = self.recorder.logits
        assert logits is not None, "exits ask for it after a pass"
        return logits

    @property
    def real_tokens(self) -> Tensor | None:
        """Which tokens of the latest pass are not padding, ``[B, T]``; None if all are."""
        return self.taps.inputs.get("attention_mask")

    @property
    def newcomers(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weights and biases of the exits, each with one of the model's own head, to be optimised like it."""
        path = describe(self.model).head
        assert path is not None, "checked in prepare"
        head = [p for p in get_module(self.model, path).parameters() if p.requires_grad]
        if self.router is None or not head:
            return []
        last = {p.dim() > 1: p for p in head}
        new = [*self.router.heads.parameters(), *self.router.rule.parameters()]
        return [(p, last.get(p.dim() > 1, head[-1])) for p in new]

    def metrics(self) -> dict[str, float]:
        """The factor of the exits' losses."""
        return {"exit_weight": self.exit_weight}

    def state_dict(self) -> dict[str, Any]:
        """Phase and weight; exits, rule and threshold are in the model's own state."""
        return {"phase": self.phase, "exit_weight": self.exit_weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the phase."""
        self.phase, self.exit_weight = state["phase"], state["exit_weight"]


def prepare(model: nn.Module, config: MultiExitConfig) -> MultiExitHandle:
    """Give a classifier exit heads, or let a decoder's own head read earlier layers; outputs stay the same.

    Only with a ``threshold`` do texts leave in evaluation, as they will once the model is converted.

    Raises:
        ValueError: If the model does not answer once per text and is no decoder of text, is packed, has exits already,
            or a layer does not exist; or if the rule is not for its kind of answer.
    """
    anatomy = _check_can_exit(model, config)
    check(
        packed_encoder(model) is None,
        "the model is packed, which hides the states between its layers: call lightning_compress.unpack(model) before "
        "giving it exits",
    )
    exits, ledger, router = chosen_exits(anatomy, config.exits), Ledger(model), None
    ledger.on_revert(remove_exits)
    ledger.on_revert(stop_recording)
    if anatomy.is_decoder:
        share_head(model, exits)
    else:
        router = _install(model, exits, config, dropout=config.dropout)
    taps = LayerTaps.of(model)
    taps.equilibrium = exits_above(exits, len(anatomy.layers)) if config.equilibrium else None
    recorder = LogitsRecorder().attach(model)
    handle = MultiExitHandle(model, config, ledger, exits, taps, recorder, router)
    update(handle, 0.0)
    return handle


def update(handle: MultiExitHandle, progress: float) -> None:
    """Let the weight of the exits' losses grow."""
    warmup = handle.config.warmup
    handle.exit_weight = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    handle.phase = "warmup" if progress < warmup else "joint"


def convert(handle: MultiExitHandle) -> dict[str, Any]:
    """Let texts leave for real: put the packed engine in the encoder's place, or tell the one there of the exits.

    A decoder gets back what it was: its exits share its head, and its own code can use them.

    Returns:
        ``{"exits": [...], "rule": name, ...}`` with the settings of heads and rule; weights and the threshold are in
        the model's state. ``{"exits": [...], "shared": True}`` for a decoder.
    """
    model, config = handle.model, handle.config
    stop_recording(model)
    if handle.router is None:
        model._modules.pop("exits")
        return {"exits": list(handle.exits), "shared": True}
    _deploy(model, handle.router, handle.ledger)
    settings = {
        name: value for name, value in _rule_settings(config).items() if name not in ("name", "threshold")
    }
    heads = {"pooling": config.pooling, "pooler": config.pooler}
    return {"exits": list(handle.exits), "rule": config.rule, **heads, **settings}


def restore(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild exits, rule and the packed engine on a fresh, possibly meta-device model.

    Raises:
        PlanError: If the structure does not fit the model.
    """
    ledger = Ledger(model)
    if structure.get("shared") is True:
        return ledger
    if not isinstance(model, PreTrainedModel) or not describe(model).base:
        raise PlanError(
            "the exits are of a classifier, and only its base model is being opened: open it with "
            "AutoModelForSequenceClassification or lightning_compress.load"
        )
    try:
        names = ("rule", "normalized", "tolerance", "pooling", "pooler")
        config = MultiExitConfig(
            exits=tuple(whole_numbers(structure, "exits")), **{name: structure[name] for name in names}
        )
        exits = chosen_exits(_check_can_exit(model, config), config.exits)
        router = _install(model, exits, config, dropout=0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the plan of exits does not fit the model: {error}") from error
    ledger.on_revert(remove_exits)
    _deploy(model, router, ledger)
    return ledger


def _install(model: nn.Module, exits: tuple[int, ...], config: MultiExitConfig, dropout: float) -> ExitRouter:
    """Give a classifier heads, a rule, and what makes texts leave in evaluation."""
    weight, sizes = next(model.parameters()), describe(model)
    num_labels = int(model.config.num_labels)  # type: ignore[union-attr]
    with torch.device(weight.device):
        rule = make_exit_rule(
            **_rule_settings(config), layers=exits, num_labels=num_labels, hidden_size=sizes.hidden_size
        )
    install_exits(model, exits, pooling=config.pooling, pooler=config.pooler, dropout=dropout)
    model.add_module("exit_rule", rule.to(weight.dtype).train(model.training))
    return ExitRouter(model)


def _deploy(model: nn.Module, router: ExitRouter, ledger: Ledger) -> None:
    """Let the packed engine ask the exits; nothing of them learns from here on, so nobody waits for gradients."""
    router.heads.requires_grad_(False)
    router.rule.requires_grad_(False)
    anatomy = describe(model)
    assert anatomy.encoder is not None, "checked when the exits were installed"
    if not isinstance(get_module(model, anatomy.encoder), PackedEncoder):
        ledger.replace(anatomy.encoder, PackedEncoder(model, anatomy))  # type: ignore[arg-type]
    encoder = get_module(model, anatomy.encoder)
    assert isinstance(encoder, PackedEncoder)
    encoder.exits = cast(ExitPolicy, router)


def _check_can_exit(model: nn.Module, config: MultiExitConfig) -> Anatomy:
    """Return the anatomy of a model whose layers can get exits.

    Raises:
        ValueError: If it cannot have them, or not with these settings.
    """
    anatomy, name = describe(model), type(model).__name__
    if anatomy.is_decoder:
        _check_can_share(anatomy, name, config)
        return anatomy
    check(
        anatomy.is_post_norm and anatomy.encoder is not None,
        f"{name} is not an encoder like BERT's: exits are for BERT, RoBERTa, DistilBERT and ELECTRA, and for decoders "
        "that predict the next token",
    )
    check(
        anatomy.head is not None and not anatomy.is_head_per_token,
        f"{name} has no head that answers once per text, so there is nothing to answer early: exits are for models "
        "that classify or score a whole text, e.g. AutoModelForSequenceClassification",
    )
    kind = getattr(model.config, "problem_type", None)
    check(
        kind != "multi_label_classification",
        f"problem_type={kind!r}: exits are for one class or one number per text",
    )
    return anatomy


def _check_can_share(anatomy: Anatomy, name: str, config: MultiExitConfig) -> None:
    check(
        anatomy.head is not None and anatomy.head.endswith("lm_head") and anatomy.final_norm is not None,
        f"{name} is a decoder without a language-model head: exits are for decoders that predict the next token, e.g. "
        "AutoModelForCausalLM, and for encoders that classify",
    )
    for goal in ("threshold", "target_flops", "max_drop"):
        check(
            getattr(config, goal) is None,
            f"{goal}={getattr(config, goal)}: no token of a decoder leaves early; its exits serve generation, with "
            f"generate(assistant_early_exit=...). Leave {goal} out",
        )


def _rule_settings(config: MultiExitConfig) -> dict[str, Any]:
    names = ("threshold", "normalized", "tolerance")
    return {"name": config.rule, **{name: getattr(config, name) for name in names}}

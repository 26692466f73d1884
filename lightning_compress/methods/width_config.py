"""What the user of WidthSlimming may choose, and what of it is refused.

The next chapter is :mod:`lightning_compress.methods.width_plan`, which turns it into numbers for one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from lightning_compress.methods.base import MethodConfig, check, check_choice, check_kinds
from lightning_compress.nn.width_costs import Scope

__all__ = ["ImportanceFrom", "Width", "WidthSlimmingConfig"]

Width: TypeAlias = int | float | None
"""How many are kept, or which share; None leaves it open."""
ImportanceFrom: TypeAlias = Literal["all_exits", "final_exit"]
"""Whose losses importance is read off, where a model has exits."""


_WHOLE = {"text_length": 1, "calibration_batches": 0, "calibration_seed": 0, "steps": 1, "ffn_multiple": 1}
"""Settings that are whole numbers, and the least that each may be."""


@dataclass(frozen=True, kw_only=True)
class WidthSlimmingConfig(MethodConfig):
    """What the user may choose; the callback's arguments are these fields.

    Of a width, a whole number is how many are kept and a fraction which share, 1.0 being all; None leaves it as it is,
    or to the target.
    """

    stem: ClassVar[str] = "width_slimming"
    default_goal: ClassVar[str] = "target_params"

    heads: Width = None
    """Attention heads kept in each layer (on average under a global ranking); with grouped queries whole groups."""
    ffn: Width = None
    """Neurons of the FFN kept in each layer; shares are rounded to ``ffn_multiple``."""
    embedding_rank: Width = None
    """Rank of the factorised word embeddings."""
    hidden: Width = None
    """Width of the residual stream, with norms and embeddings; not in COST-EFF."""
    target_params: float | None = None
    """Share of the parameters of ``scope`` to keep, in (0, 1], by widths not given; 0.5 if nothing is given."""
    target_flops: float | None = None
    """Instead: share of the layers' FLOPs to spend, in (0, 1], on texts of ``text_length`` tokens."""
    scope: Scope = "encoder"
    """What ``target_params`` is a share of: weights of the linears, the layers, or the whole model, whose word
    embeddings are then factorised too."""
    text_length: int = 128
    """Tokens of the text that ``target_flops`` is counted for, at least 1."""
    criterion: Literal["taylor", "group_taylor", "per_exit", "l0"] = "taylor"
    """``"taylor"``: sum of |weight times gradient|; ``"group_taylor"``: absolute value of the sum; ``"per_exit"``:
    the first, exit by exit; ``"l0"``: gates learned against a price for being open."""
    ranking: Literal["uniform", "global"] = "uniform"
    """Whether each layer keeps the same share, or all layers compete."""
    start: float = 0.1
    """Share of training before slimming begins, in [0, 1)."""
    end: float = 0.6
    """Share of training after which widths are those of deployment, in (start, 1]."""
    steps: int | None = None
    """Equal steps in which widths fall; by default one for each head that a layer loses, 8 where none does."""
    calibration_batches: int = 0
    """Batches of a separate pass before each step; 0 reads the gradients of the ordinary steps."""
    calibration_seed: int = 0
    """Which batches these are, of those that training sees before the first step; each of them is as likely."""
    importance_from: ImportanceFrom = "all_exits"
    """Whose losses importance is read off where the model has exits: of all of them, or in the separate pass of the
    model's own head alone, ``"final_exit"``."""
    importance_loss: Literal["labels", "official"] = "labels"
    """What the separate pass takes gradients of: losses against labels, or ``"official"``, what the official code
    compares with the teacher of a ``Distillation`` in the same run."""
    ffn_multiple: int | None = None
    """Neurons kept are a multiple of this; by default up to 64, as the FFN's size allows."""
    gate_lr: float | None = None
    """Learning rate of the gates by criterion ``"l0"``, positive; by default from the length of the search."""

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("heads", "ffn", "embedding_rank", "hidden"):
            _check_width(name, getattr(self, name))
        check(
            self.target_params is None or self.target_flops is None,
            f"target_params={self.target_params} and target_flops={self.target_flops} are two goals: give one",
        )
        for name in ("target_params", "target_flops"):
            value = getattr(self, name)
            check(value is None or 0.0 < value <= 1.0, f"{name}={value} is outside (0, 1]")
        check_choice(self, "scope", ("linear", "encoder", "total"))
        wide = ("heads", "ffn", "embedding_rank") if self.scope == "total" else ("heads", "ffn")
        check(
            (self.target_params is None and self.target_flops is None)
            or any(getattr(self, name) is None for name in wide),
            f"target_params={self.target_params}, target_flops={self.target_flops} decides of widths that are not "
            f"given, but {' and '.join(wide)} are: leave out one of them, or the target",
        )
        check_choice(self, "criterion", ("taylor", "group_taylor", "per_exit", "l0"))
        check_choice(self, "ranking", ("uniform", "global"))
        for name, low in _WHOLE.items():
            value = getattr(self, name)
            check(value is None or value >= low, f"{name}={value} is below {low}")
        check(0.0 <= self.start < 1.0, f"start={self.start} is outside [0, 1)")
        check(
            self.start < self.end <= 1.0,
            f"end={self.end} is outside (start={self.start}, 1]: widths fall between the two",
        )
        check(self.gate_lr is None or self.gate_lr > 0, f"gate_lr={self.gate_lr} is not positive")
        check(
            self.criterion != "per_exit" or self.calibration_batches > 0,
            "criterion='per_exit' takes a gradient for each exit, in a pass of its own: give calibration_batches, "
            "e.g. 32",
        )
        check(
            self.criterion != "l0" or (self.hidden is None and self.calibration_batches == 0),
            "criterion='l0' learns gates of heads and neurons while training: it takes neither hidden nor "
            "calibration_batches",
        )
        self._check_sources()

    def _check_sources(self) -> None:
        check_choice(self, "importance_loss", ("labels", "official"))
        check(
            self.importance_loss == "labels" or (self.criterion != "l0" and self.calibration_batches > 0),
            "importance_loss='official' is the loss of a separate pass: give calibration_batches, e.g. 32, and a "
            f"criterion that reads gradients (it is {self.criterion!r}), or leave it at 'labels'",
        )
        check_choice(self, "importance_from", ("all_exits", "final_exit"))
        is_whole = self.importance_from == "all_exits"
        check(
            is_whole or self.criterion in ("taylor", "group_taylor"),
            f"importance_from='final_exit' leaves criterion={self.criterion!r} nothing to read: it goes with 'taylor' "
            "or 'group_taylor'",
        )
        check(
            is_whole or self.calibration_batches > 0,
            "importance_from='final_exit' asks the model's own head alone, but ordinary steps have gradients of the "
            "sum of all losses: give calibration_batches, e.g. 32, for a pass of its own",
        )

    @property
    def target(self) -> float | None:
        """The share asked for, of parameters or FLOPs; None where widths are given instead."""
        given = self.target_flops or self.target_params
        widths = (self.heads, self.ffn, self.embedding_rank, self.hidden)
        return 0.5 if given is None and all(width is None for width in widths) else given


def _check_width(name: str, value: Width) -> None:
    if value is None:
        return
    is_share = isinstance(value, float)
    if isinstance(value, bool) or not (0.0 < value <= 1.0 if is_share else value >= 1):
        raise ValueError(
            f"{name}={value!r} is neither a count, a whole number from 1, nor a share, a fraction in (0, 1]"
        )

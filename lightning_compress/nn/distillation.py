"""The cast of Distillation: which layer learns from which, and what both models say of the same texts.

Nothing is installed in the student but hooks that read. The next chapter is
:mod:`lightning_compress.losses.distillation`.

Shape legend: B batch, T padded length, D hidden size, C classes.

Paper: COST-EFF (arXiv 2210.15523), specification §2.1.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.nn.dropping import DroppingEncoder, real_tokens
from lightning_compress.nn.layer_taps import EMBEDDINGS, LayerTaps
from lightning_compress.nn.multi_exit import exit_logits, has_exits
from lightning_compress.nn.tape import TokensKept

__all__ = ["Lesson", "LogitsRecorder", "compare", "kept_tokens", "layer_map", "stop_recording"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What student and teacher say of the same texts."""

    states: list[tuple[Tensor, Tensor, Tensor]]
    """Hidden states of the student, of the teacher, both ``[B, T, D]``, and how much each token counts, ``[B, T]``: a
    triple for the embeddings, and one for each layer."""
    logits: list[tuple[Tensor, Tensor]]
    """Logits of the student and of the teacher, a pair for each exit, and the model's own head last."""
    weight: Tensor | None
    """How much each prediction counts, ``[B, T]`` where there is one per token; None where all count alike."""


def layer_map(num_student: int, num_teacher: int) -> dict[int, int]:
    """Return for each layer of a student the layer of its teacher that it learns from; embeddings from embeddings.

    Layers of a deeper teacher are spread evenly, the last one always counts.

    Args:
        num_student: Layers of the student.
        num_teacher: Layers of the teacher, at least as many.

    Raises:
        ValueError: If the teacher has fewer.

    Paper: specification §2.1, one to one; a deeper teacher is ours.

    Example:
        >>> layer_map(2, 6)
        {-1: -1, 0: 2, 1: 5}
    """
    if num_teacher < num_student:
        raise ValueError(
            f"the teacher has {num_teacher} layers, the model {num_student}: give a teacher that is at least as deep, "
            "or hidden_weight=0"
        )
    spread = {layer: (layer + 1) * num_teacher // num_student - 1 for layer in range(num_student)}
    return {EMBEDDINGS: EMBEDDINGS, **spread}


class LogitsRecorder:
    """Remembers the logits of a model's latest forward pass; copies of the model remember their own.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> recorder = LogitsRecorder().attach(model)
        >>> _ = model(torch.zeros(1, 2))
        >>> recorder.logits.shape
        torch.Size([1, 3])
        >>> stop_recording(model)
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> LogitsRecorder:
        """Remember the logits whenever ``model`` ends its ``forward``; returns the recorder."""
        self._handle = model.register_forward_hook(self._on_output)
        return self

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.logits = _logits_of(output)

    def __getstate__(self) -> dict[str, Any]:
        return {"logits": None, "_handle": self._handle}

    def __deepcopy__(self, memo: dict[int, Any]) -> LogitsRecorder:
        twin = LogitsRecorder()
        memo[id(self)] = twin
        hooks = self._handle.hooks_dict_ref() if self._handle is not None else None
        if hooks is not None and id(hooks) in memo:
            twin._handle = copy.deepcopy(self._handle, memo)
        return twin


def stop_recording(model: nn.Module) -> None:
    """Take every recorder of logits off a model, and its taps."""
    hooks = model._forward_hooks
    for key in [
        k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), LogitsRecorder)
    ]:
        del hooks[key]
    taps = LayerTaps.on(model)
    if taps is not None:
        taps.detach()


def _logits_of(output: Any) -> Tensor | None:
    """Return the logits in what a forward pass returns, None where there are none; a loss before them is no logits."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    return next((part for part in output if isinstance(part, Tensor) and part.dim() > 1), None)


def compare(
    student: nn.Module,
    teacher: nn.Module,
    guides: Mapping[int, int],
    *,
    logits: Tensor | None = None,
    hidden: bool = True,
) -> Lesson:
    """Let a teacher read the student's latest texts, and put side by side what both say.

    Args:
        student: The student after a forward pass with its :class:`~lightning_compress.nn.layer_taps.LayerTaps`.
        teacher: The teacher, in evaluation mode, on the same device.
        guides: Whom each layer learns from, see :func:`layer_map`; the exit after a layer learns from the exit of its
            guide, and where there is none from the teacher's own head.
        logits: The student's logits of that pass; None leaves predictions out, those of exits too.
        hidden: Whether hidden states are compared.

    Raises:
        ValueError: If the student was called without ``input_ids``, or has no states because it runs packed, or the
            two put out states or logits of different shapes.
    """
    taps = LayerTaps.of(student)
    said = _ask(teacher, taps.inputs, hidden=hidden)  # type: ignore[call-arg]
    ids_BT, mask_BT = (_text_by_text(taps.inputs.get(name)) for name in ("input_ids", "attention_mask"))
    real_BT = real_tokens(mask_BT, ids_BT.unsqueeze(-1))  # type: ignore[union-attr]
    states = []
    for layer, guide in guides.items() if hidden else ():
        own_BTD = _state_of(student, taps, layer)
        _check_shapes("hidden states", own_BTD, said.states[guide])
        states.append((own_BTD, said.states[guide], kept_tokens(student, layer, real_BT)))
    if logits is None:
        return Lesson(states, [], None)
    pairs = [
        (own, said.exits.get(guides.get(layer, layer), said.logits)) for layer, own in _exits(student).items()
    ]
    pairs.append((logits, said.logits))
    for own, theirs in pairs:
        _check_shapes("logits", own, theirs)
    return Lesson(states, pairs, real_BT if logits.dim() == 3 else None)


def _text_by_text(values: Tensor | None) -> Tensor | None:
    """Return choices, ``[B, choices, T]``, one below the other, as a model of multiple choice reads them."""
    return values.flatten(0, 1) if values is not None and values.dim() == 3 else values


@dataclass(frozen=True, eq=False)
class _Answer:
    states: dict[int, Tensor]
    exits: dict[int, Tensor]
    logits: Any


@torch.compiler.disable
@torch.no_grad()
def _ask(teacher: nn.Module, inputs: Mapping[str, Any], *, hidden: bool) -> _Answer:
    """Run a teacher on the inputs of a student, without their labels."""
    if inputs.get("input_ids") is None:
        raise ValueError(
            "the teacher reads what the model reads, but the model was called without input_ids, or only a part of it "
            "was, such as its base model: call the whole model and pass input_ids, not inputs_embeds"
        )
    known = inspect.signature(teacher.forward).parameters
    texts = {n: inputs[n] for n in _INPUTS if n in known and inputs.get(n) is not None}
    taps = LayerTaps.of(teacher) if hidden or has_exits(teacher) else None
    logits = _logits_of(teacher(**texts))
    states = {} if taps is None else dict(taps.latest)
    answer = _Answer(states, _exits(teacher), logits)
    if taps is not None:
        taps.clear()
    return answer


def kept_tokens(student: nn.Module, layer: int, real_BT: Tensor) -> Tensor:
    """Return how much each token counts in what leaves a layer: 0 for padding and for tokens that were dropped before.

    Args:
        student: The student after a forward pass.
        layer: Index of the layer, from 0; -1 for the embeddings, which nothing left yet.
        real_BT: Which tokens are not padding.
    """
    encoder = next((module for module in student.modules() if isinstance(module, DroppingEncoder)), None)
    policy: Any = None if encoder is None else encoder.policy
    if policy is None or not policy.is_active or layer == EMBEDDINGS:
        return real_BT
    records = [record for record in policy.tape.read(TokensKept) if record.layer <= layer]
    return records[-1].keep_BT.detach() * real_BT if records else real_BT


def _exits(model: nn.Module) -> dict[int, Tensor]:
    return exit_logits(model) if has_exits(model) else {}


def _state_of(student: nn.Module, taps: LayerTaps, layer: int) -> Tensor:
    if layer not in taps.latest:
        raise ValueError(
            f"layer {layer} of the {type(student).__name__} put out no states, as when it runs packed: call "
            "lightning_compress.unpack(model) first, or distil predictions only, with hidden_weight=0"
        )
    return taps.latest[layer]


def _check_shapes(what: str, own: Tensor, theirs: Tensor | None) -> None:
    if theirs is None or own.shape != theirs.shape:
        shape = None if theirs is None else list(theirs.shape)
        raise ValueError(
            f"the model puts out {what} of shape {list(own.shape)}, its teacher of {shape}: give a teacher of the same "
            f"size and task, or {'hidden_weight=0' if what == 'hidden states' else 'logit_weight=0'}"
        )

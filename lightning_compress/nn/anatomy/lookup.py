"""What the family files share: paths that are checked, sizes that are read off modules.

The next chapter is :mod:`lightning_compress.nn.anatomy.bert`, the family most models resemble.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import LayerAnatomy, LinearSlot, Role, UnknownFamilyError
from lightning_compress.nn.surgery import linear_shape

__all__ = [
    "base_path",
    "find",
    "head_size",
    "hidden_size",
    "is_per_token",
    "join",
    "layer_paths",
    "linear_slots",
    "needed",
    "present",
    "refuse_cross_attention",
]

_PER_TOKEN_TASKS = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForTokenClassification",
    "LMHeadModel",
)


def join(*parts: str) -> str:
    """Join dotted paths, leaving out empty ones.

    Example:
        >>> join("", "encoder", "layer")
        'encoder.layer'
    """
    return ".".join(part for part in parts if part)


def base_path(model: PreTrainedModel) -> str:
    """Return the path of the base model inside ``model``; empty if ``model`` is the base model."""
    prefix = model.base_model_prefix
    return prefix if isinstance(getattr(model, prefix, None), nn.Module) else ""


def find(model: PreTrainedModel, path: str) -> nn.Module | None:
    """Return the module at ``path``, or None if there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Module) else None


def needed(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the module at ``path``.

    Raises:
        UnknownFamilyError: If it is not there.
    """
    module = find(model, path)
    if module is None:
        raise UnknownFamilyError(
            f"{type(model).__name__} has no module {path!r}, where every model of type "
            f"{model.config.model_type!r} has one; give a rearranged model its own config.model_type and "
            "describe it with lightning_compress.nn.anatomy.register_family"
        )
    return module


def present(model: PreTrainedModel, paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of the paths at which there is a module, in the order given."""
    return tuple(path for path in paths if find(model, path) is not None)


def layer_paths(model: PreTrainedModel, stack: str) -> list[str]:
    """Return the paths of the layers that the ``ModuleList`` at ``stack`` holds now."""
    return [f"{stack}.{name}" for name, _ in needed(model, stack).named_children()]


def linear_slots(
    model: PreTrainedModel, layer_path: str, index: int, roles: dict[str, Role]
) -> tuple[tuple[LinearSlot, ...], dict[Role, tuple[int, int]]]:
    """Return the slots of one layer and the present ``(in_features, out_features)`` of each role.

    Args:
        model: The model described.
        layer_path: Path of the layer.
        index: Position of the layer.
        roles: Role by path inside the layer, in the order in which the linears run.

    Raises:
        UnknownFamilyError: If one of the linears is not there.
        TypeError: If what has taken the place of a linear does not tell its in_features and out_features.
    """
    slots = tuple(LinearSlot(join(layer_path, inner), role, index) for inner, role in roles.items())
    return slots, {slot.role: linear_shape(needed(model, slot.path)) for slot in slots}


def head_size(model: PreTrainedModel, attention_path: str, attribute: str) -> int:
    """Return the width of one head, from the attention module or else from the configuration.

    Pruning heads changes their number, never their width, so the configuration still knows it.
    """
    size = getattr(needed(model, attention_path), attribute, None) or getattr(model.config, "head_dim", None)
    return int(size or model.config.hidden_size // model.config.num_attention_heads)


def hidden_size(model: PreTrainedModel, layers: tuple[LayerAnatomy, ...]) -> int:
    """Return the width of the residual stream: what the first layer's last linear puts out."""
    if not layers:
        return int(model.config.hidden_size)
    return linear_shape(needed(model, layers[0].linears[-1].path))[1]


def is_per_token(model: PreTrainedModel) -> bool:
    """Whether an encoder's head runs on every token, judged by the task in the names of its classes."""
    return any(task in kind.__name__ for kind in type(model).__mro__ for task in _PER_TOKEN_TASKS)


def refuse_cross_attention(model: PreTrainedModel) -> None:
    """Refuse the decoder half of an encoder-decoder.

    Raises:
        UnknownFamilyError: If the layers attend to another model's states.
    """
    if getattr(model.config, "add_cross_attention", False):
        raise UnknownFamilyError(
            f"{type(model).__name__} has cross-attention (config.add_cross_attention=True), which no family "
            "describes; only single-stack models can be compressed"
        )

"""Mamba: pre-norm blocks with a selective state-space mixer in place of attention and FFN.

``in_proj`` and ``out_proj`` are ordinary linears (the fused CUDA training path reads the weight of
``out_proj`` directly). ``x_proj`` and ``dt_proj`` are ``raw_linears``: the host reads the weight of
``dt_proj``, and on the fused path that of ``x_proj`` too, without calling them, so a module put in their
place may never run.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import Anatomy, LayerAnatomy, Role, register_family
from lightning_compress.nn.anatomy.lookup import (
    base_path,
    hidden_size,
    join,
    layer_paths,
    linear_slots,
    needed,
    present,
)

__all__ = ["describe_mamba"]

_ROLES: dict[str, Role] = {"mixer.in_proj": "mixer_in", "mixer.out_proj": "mixer_out"}
_RAW = ("mixer.x_proj", "mixer.dt_proj")


@register_family("mamba")
def describe_mamba(model: PreTrainedModel) -> Anatomy:
    """Describe a Mamba; head counts are 0, ``intermediate_size`` counts the mixer's channels."""
    base = base_path(model)
    stack = layer_paths(model, join(base, "layers"))
    layers = tuple(_describe_layer(model, path, index) for index, path in enumerate(stack))
    word_embeddings, final_norm = join(base, "embeddings"), join(base, "norm_f")
    needed(model, word_embeddings)
    needed(model, final_norm)
    head_modules = present(model, ["lm_head"]) if base else ()
    return Anatomy(
        model_type=model.config.model_type,
        base=base,
        layers=layers,
        embeddings=word_embeddings,
        word_embeddings=word_embeddings,
        final_norm=final_norm,
        pooler=None,
        head=head_modules[-1] if head_modules else None,
        hidden_size=hidden_size(model, layers),
        vocab_size=model.config.vocab_size,
        is_decoder=True,
        is_post_norm=False,
        head_modules=head_modules,
        is_head_per_token=True,
    )


def _describe_layer(model: PreTrainedModel, path: str, index: int) -> LayerAnatomy:
    slots, shapes = linear_slots(model, path, index, _ROLES)
    return LayerAnatomy(
        path=path,
        index=index,
        linears=slots,
        attention=None,
        num_heads=0,
        num_key_value_heads=0,
        head_dim=0,
        intermediate_size=shapes["mixer_out"][0],
        norms=(f"{path}.norm",),
        raw_linears=tuple(f"{path}.{raw}" for raw in _RAW),
    )

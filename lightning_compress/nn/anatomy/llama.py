"""Llama: a pre-norm decoder with grouped queries and a gated FFN.

Query head ``h`` reads key and value head ``h // (num_heads / num_key_value_heads)``, so heads leave in whole
groups. The FFN is ``down(act(gate(x)) * up(x))``: ``gate`` has the role ``ffn_gate``, ``up`` is ``ffn_in``.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import Anatomy, LayerAnatomy, Role, register_family
from lightning_compress.nn.anatomy.lookup import (
    base_path,
    head_size,
    hidden_size,
    join,
    layer_paths,
    linear_slots,
    needed,
    present,
)

__all__ = ["describe_llama"]

_ROLES: dict[str, Role] = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_in",
    "mlp.down_proj": "ffn_out",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEADS = ("lm_head", "score", "qa_outputs")


@register_family("llama")
def describe_llama(model: PreTrainedModel) -> Anatomy:
    """Describe a Llama; ``embeddings`` is the token table, positions are rotations inside the layers."""
    base = base_path(model)
    stack = layer_paths(model, join(base, "layers"))
    layers = tuple(_describe_layer(model, path, index) for index, path in enumerate(stack))
    word_embeddings, final_norm = join(base, "embed_tokens"), join(base, "norm")
    needed(model, word_embeddings)
    needed(model, final_norm)
    head_modules = present(model, _HEADS) if base else ()
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
        residual_writers=(word_embeddings, final_norm),
        residual_readers=head_modules,
    )


def _describe_layer(model: PreTrainedModel, path: str, index: int) -> LayerAnatomy:
    slots, shapes = linear_slots(model, path, index, _ROLES)
    attention = f"{path}.self_attn"
    head_dim = head_size(model, attention, "head_dim")
    return LayerAnatomy(
        path=path,
        index=index,
        linears=slots,
        attention=attention,
        num_heads=shapes["query"][1] // head_dim,
        num_key_value_heads=shapes["key"][1] // head_dim,
        head_dim=head_dim,
        intermediate_size=shapes["ffn_in"][1],
        norms=tuple(f"{path}.{norm}" for norm in _NORMS),
        activation=next(iter(present(model, [f"{path}.mlp.act_fn"])), None),
    )

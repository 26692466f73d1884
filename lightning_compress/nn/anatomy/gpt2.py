"""GPT-2: a pre-norm decoder whose linears are ``Conv1D`` (weights transposed), query, key and value in one.

The fused output is ``[query | key | value]``, each ``num_heads * head_dim`` wide. Pruning heads also means
setting ``split_size`` on the attention module to the new width.
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
    refuse_cross_attention,
)

__all__ = ["describe_gpt2"]

_ROLES: dict[str, Role] = {
    "attn.c_attn": "query_key_value",
    "attn.c_proj": "attention_output",
    "mlp.c_fc": "ffn_in",
    "mlp.c_proj": "ffn_out",
}
_NORMS = ("ln_1", "ln_2")
_HEADS = ("lm_head", "score", "classifier", "qa_outputs")


@register_family("gpt2")
def describe_gpt2(model: PreTrainedModel) -> Anatomy:
    """Describe a GPT-2; ``embeddings`` is the token table, positions are a table beside it."""
    refuse_cross_attention(model)
    base = base_path(model)
    stack = layer_paths(model, join(base, "h"))
    layers = tuple(_describe_layer(model, path, index) for index, path in enumerate(stack))
    word_embeddings, final_norm = join(base, "wte"), join(base, "ln_f")
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
        residual_writers=(word_embeddings, join(base, "wpe"), final_norm),
        residual_readers=present(model, [*head_modules, "multiple_choice_head.summary"]),
    )


def _describe_layer(model: PreTrainedModel, path: str, index: int) -> LayerAnatomy:
    slots, shapes = linear_slots(model, path, index, _ROLES)
    attention = f"{path}.attn"
    head_dim = head_size(model, attention, "head_dim")
    num_heads = shapes["query_key_value"][1] // (3 * head_dim)
    return LayerAnatomy(
        path=path,
        index=index,
        linears=slots,
        attention=attention,
        num_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=shapes["ffn_in"][1],
        norms=tuple(f"{path}.{norm}" for norm in _NORMS),
        activation=next(iter(present(model, [f"{path}.mlp.act"])), None),
        head_count_attributes=("num_heads",),
        head_width_attributes=("split_size",),
    )

"""DistilBERT: a post-norm encoder like BERT's under other names, without pooler and token types.

Its heads take two steps (``pre_classifier`` then ``classifier``), both listed in ``Anatomy.head_modules``.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import Anatomy, LayerAnatomy, Role, register_family
from lightning_compress.nn.anatomy.lookup import (
    base_path,
    head_size,
    hidden_size,
    is_per_token,
    join,
    layer_paths,
    linear_slots,
    needed,
    present,
)

__all__ = ["describe_distilbert"]

_ROLES: dict[str, Role] = {
    "attention.q_lin": "query",
    "attention.k_lin": "key",
    "attention.v_lin": "value",
    "attention.out_lin": "attention_output",
    "ffn.lin1": "ffn_in",
    "ffn.lin2": "ffn_out",
}
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "LayerNorm")
_NORMS = ("sa_layer_norm", "output_layer_norm")
_HEADS = (
    "vocab_transform",
    "vocab_layer_norm",
    "vocab_projector",
    "pre_classifier",
    "classifier",
    "qa_outputs",
)


@register_family("distilbert")
def describe_distilbert(model: PreTrainedModel) -> Anatomy:
    """Describe a DistilBERT."""
    base = base_path(model)
    embeddings, encoder = join(base, "embeddings"), join(base, "transformer")
    stack = layer_paths(model, f"{encoder}.layer")
    layers = tuple(_describe_layer(model, path, index) for index, path in enumerate(stack))
    needed(model, f"{embeddings}.word_embeddings")
    head_modules = present(model, _HEADS) if base else ()
    return Anatomy(
        model_type=model.config.model_type,
        base=base,
        layers=layers,
        embeddings=embeddings,
        word_embeddings=f"{embeddings}.word_embeddings",
        final_norm=None,
        pooler=None,
        head=head_modules[-1] if head_modules else None,
        hidden_size=hidden_size(model, layers),
        vocab_size=model.config.vocab_size,
        is_decoder=False,
        is_post_norm=True,
        head_modules=head_modules,
        is_head_per_token=is_per_token(model),
        encoder=encoder,
        residual_writers=present(model, (f"{embeddings}.{name}" for name in _EMBEDDINGS)),
        residual_readers=head_modules[:1],
    )


def _describe_layer(model: PreTrainedModel, path: str, index: int) -> LayerAnatomy:
    slots, shapes = linear_slots(model, path, index, _ROLES)
    attention = f"{path}.attention"
    head_dim = head_size(model, attention, "attention_head_size")
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
        activation=next(iter(present(model, [f"{path}.ffn.activation"])), None),
        attention_dropout=f"{attention}.dropout",
        ffn_dropout=f"{path}.ffn.dropout",
        head_count_attributes=("n_heads",),
        head_width_attributes=("dim",),
    )

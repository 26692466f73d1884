"""BERT, and the layout that RoBERTa and ELECTRA share with it.

Post-norm encoder: ``norm(x + attention(x))``, then ``norm(x + ffn(x))``. Head widths stay on the attention
module, so heads may be pruned by shrinking query, key, value and output alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import Anatomy, LayerAnatomy, Role, register_family
from lightning_compress.nn.anatomy.lookup import (
    base_path,
    find,
    head_size,
    hidden_size,
    is_per_token,
    join,
    layer_paths,
    linear_slots,
    needed,
    present,
    refuse_cross_attention,
)

__all__ = ["describe_bert", "describe_bert_like"]

_ROLES: dict[str, Role] = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "ffn_in",
    "output.dense": "ffn_out",
}
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
_READERS = (
    "cls.predictions.transform.dense",
    "lm_head.dense",
    "generator_predictions.dense",
    "discriminator_predictions.dense",
    "sequence_summary.summary",
    "classifier.dense",
    "qa_outputs",
)
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


@register_family("bert")
def describe_bert(model: PreTrainedModel) -> Anatomy:
    """Describe a BERT; its language-model and next-sentence heads are both called ``cls``."""
    return describe_bert_like(model, heads=("cls", "classifier", "qa_outputs"))


def describe_bert_like(model: PreTrainedModel, heads: Sequence[str]) -> Anatomy:
    """Describe a model whose encoder is laid out as BERT's.

    Args:
        model: The model.
        heads: Paths of the modules a task head may consist of, in the order in which they run.
    """
    refuse_cross_attention(model)
    base = base_path(model)
    embeddings, encoder = join(base, "embeddings"), join(base, "encoder")
    stack = layer_paths(model, f"{encoder}.layer")
    layers = tuple(_describe_layer(model, path, index) for index, path in enumerate(stack))
    needed(model, f"{embeddings}.word_embeddings")
    head_modules = present(model, heads) if base else ()
    return Anatomy(
        model_type=model.config.model_type,
        base=base,
        layers=layers,
        embeddings=embeddings,
        word_embeddings=f"{embeddings}.word_embeddings",
        final_norm=None,
        pooler=next(iter(present(model, [join(base, "pooler")])), None),
        head=head_modules[-1] if head_modules else None,
        hidden_size=hidden_size(model, layers),
        vocab_size=model.config.vocab_size,
        is_decoder=bool(getattr(model.config, "is_decoder", False)),
        is_post_norm=True,
        head_modules=head_modules,
        is_head_per_token=is_per_token(model),
        embedding_projection=next(iter(present(model, [join(base, "embeddings_project")])), None),
        encoder=encoder,
        residual_writers=_residual_writers(model, base),
        residual_readers=_residual_readers(model, base),
    )


def _residual_writers(model: PreTrainedModel, base: str) -> tuple[str, ...]:
    projection = present(model, [join(base, "embeddings_project")])
    return projection or present(model, (join(base, "embeddings", name) for name in _EMBEDDINGS))


def _residual_readers(model: PreTrainedModel, base: str) -> tuple[str, ...]:
    """Return the first linears of pooler and heads; a head's own linear counts where no pooler stands before it."""
    if not base:
        return present(model, ["pooler.dense"])
    pooled = present(model, [join(base, "pooler"), "sequence_summary"])
    bare = [path for path in present(model, ["classifier"]) if find(model, f"{path}.dense") is None]
    return present(model, [join(base, "pooler.dense"), *_READERS, *([] if pooled else bare)])


def _describe_layer(model: PreTrainedModel, path: str, index: int) -> LayerAnatomy:
    slots, shapes = linear_slots(model, path, index, _ROLES)
    attention = f"{path}.attention.self"
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
        activation=next(iter(present(model, [f"{path}.intermediate.intermediate_act_fn"])), None),
        attention_dropout=f"{attention}.dropout",
        output_dropout=f"{path}.attention.output.dropout",
        ffn_dropout=f"{path}.output.dropout",
        head_count_attributes=("num_attention_heads",),
        head_width_attributes=("all_head_size",),
    )

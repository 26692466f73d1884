"""ELECTRA: BERT's encoder behind embeddings that may be narrower than the hidden size.

The projection between the two is ``Anatomy.embedding_projection``. There is no pooler; the classification
head reads the first token.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import Anatomy, register_family
from lightning_compress.nn.anatomy.bert import describe_bert_like

__all__ = ["describe_electra"]

_HEADS = (
    "generator_predictions",
    "generator_lm_head",
    "discriminator_predictions",
    "sequence_summary",
    "classifier",
    "qa_outputs",
)


@register_family("electra")
def describe_electra(model: PreTrainedModel) -> Anatomy:
    """Describe an ELECTRA generator, discriminator or classifier."""
    return describe_bert_like(model, heads=_HEADS)

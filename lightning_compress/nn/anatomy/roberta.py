"""RoBERTa: BERT's encoder with other heads and positions that start after the padding index."""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_compress.nn.anatomy.base import Anatomy, register_family
from lightning_compress.nn.anatomy.bert import describe_bert_like

__all__ = ["describe_roberta"]


@register_family("roberta")
def describe_roberta(model: PreTrainedModel) -> Anatomy:
    """Describe a RoBERTa; its classification head holds two linears and reads the first token."""
    return describe_bert_like(model, heads=("lm_head", "classifier", "qa_outputs"))

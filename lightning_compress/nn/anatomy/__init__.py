"""Where things are inside other people's models, one file per family.

Methods ask the anatomy and never test for classes: :func:`describe` names every linear with its role, the
attention layout of each layer, the norms, the embeddings and the head, as the model is *now*.
:func:`find_transformer` finds the model inside whatever holds it. The next chapter is
:mod:`lightning_compress.nn.anatomy.base`.
"""

from lightning_compress.nn.anatomy import bert, distilbert, electra, gpt2, llama, mamba, roberta
from lightning_compress.nn.anatomy.base import (
    Anatomy,
    LayerAnatomy,
    LinearSlot,
    Role,
    UnknownFamilyError,
    describe,
    known_families,
    register_family,
)
from lightning_compress.nn.anatomy.find import find_transformer

__all__ = [
    "Anatomy",
    "LayerAnatomy",
    "LinearSlot",
    "Role",
    "UnknownFamilyError",
    "bert",
    "describe",
    "distilbert",
    "electra",
    "find_transformer",
    "gpt2",
    "known_families",
    "llama",
    "mamba",
    "register_family",
    "roberta",
]

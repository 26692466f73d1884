"""Running models packed: rows of tokens without padding, in blocks that are mostly products.

:func:`pack` gives a model this engine. Read :mod:`lightning_compress.runtime.attention`, then
:mod:`~lightning_compress.runtime.fusion`, :mod:`~lightning_compress.runtime.block`,
:mod:`~lightning_compress.runtime.encoder` and :mod:`~lightning_compress.runtime.packing`.
"""

from lightning_compress.runtime.attention import packed_attention, padded_attention
from lightning_compress.runtime.block import LeanLayer
from lightning_compress.runtime.encoder import PackedEncoder
from lightning_compress.runtime.packing import is_packed, pack, packed_encoder, unpack

__all__ = [
    "LeanLayer",
    "PackedEncoder",
    "is_packed",
    "pack",
    "packed_attention",
    "packed_encoder",
    "padded_attention",
    "unpack",
]

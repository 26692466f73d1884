"""ENGINE: operators. One folder each: schema, fake and gradient, then the reference, then the kernel.

Rows of a packed batch: :mod:`lightning_compress.ops.compact`. Matrices in blocks of few bits:
:mod:`lightning_compress.ops.block_quantize`, :mod:`lightning_compress.ops.block_dequantize`, both at once as
:mod:`lightning_compress.ops.block_round`, and :mod:`lightning_compress.ops.block_matmul`. What lies between products,
in whole numbers: :mod:`lightning_compress.ops.integer_softmax`, :mod:`lightning_compress.ops.integer_gelu` and
:mod:`lightning_compress.ops.integer_layernorm`; from blocks to blocks in one pass:
:mod:`lightning_compress.ops.integer_blocks`.
"""

__all__: list[str] = []

"""ENGINE: operators. One folder each: schema, fake and gradient, then the reference, then the kernel.

The first and only one so far is :mod:`lightning_compress.ops.compact`.
"""

__all__: list[str] = []

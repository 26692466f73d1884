"""When BlockQuantization happens: registered in setup, driven by the module's hooks, quantised at the end of fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.methods.block_quantization import BlockQuantizationConfig as Config
from lightning_compress.nn.block_format import Factor
from lightning_compress.nn.operator_formats import Preset

__all__ = ["BlockQuantization"]


class BlockQuantization(CompressionCallback):
    """Hold weights in blocks of few bits, and multiply integers: when training has ended, or trained for it.

    By default training is what it would be, and what it leaves is rounded when ``fit`` ends, without calibration data.
    With ``start`` below 1 training sees more and more of the rounding, and gradients pass as if there were none
    (quantisation-aware training); validation then computes the integers of the converted model.

    Args:
        preset: Bits of weights and activations: ``"w8a8"``, ``"w4a8"``, ``"w4a4"``, or ``"w8"``, weights alone.
        block: Rows and columns that share a factor, e.g. ``[32, 32]``; 0 stands for all there are. ``"row"`` is a
            factor per row, which fast kernels know. Activations get a factor per token and block of columns.
        factor: ``"scale"``, any real number, or ``"shift"``, a power of two.
        operators: What is quantised, of ``"linear"``, ``"embedding"``, ``"attention"``, ``"softmax"``,
            ``"activation"``, ``"norm"``; or ``"all"``.
        exclude: Shell patterns over module paths: what stays as it is.
        bits: Bits that differ from the preset's, of ``weight``, ``input``, ``embedding`` or ``attention``, as
            ``{"weight": 4}`` or ``["weight=4"]``.
        start: Share of training after which it sees the rounding, in [0, 1].
        ramp_end: Share of training after which it sees all of it, in [start, 1]; by default half of what is left.
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to quantise when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483); BCT-style, our own design.

    Example:
        >>> BlockQuantization(preset="w4a8", block=[1, 128]).config.formats.weight
        BlockFormat(bits=4, block=(1, 128), factor='scale')
    """

    def __init__(
        self,
        *,
        preset: Preset = Config.preset,
        block: Literal["row"] | Sequence[int] = Config.block,
        factor: Factor = Config.factor,
        operators: Sequence[str] | str = Config.operators,
        exclude: Sequence[str] = Config.exclude,
        bits: Mapping[str, int] | Sequence[str] = Config.bits,
        start: float = Config.start,
        ramp_end: float | None = Config.ramp_end,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        config = Config(
            preset=preset,
            block=block,  # type: ignore[arg-type]
            factor=factor,
            operators=operators,  # type: ignore[arg-type]
            exclude=exclude,  # type: ignore[arg-type]
            bits=bits,  # type: ignore[arg-type]
            start=start,
            ramp_end=ramp_end,
        )
        super().__init__(config, module=module, convert=convert)

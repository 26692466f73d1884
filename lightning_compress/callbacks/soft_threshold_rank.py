"""When SoftThresholdRank happens: registered in setup, driven by the module's hooks, converted at the end of fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig as Config

__all__ = ["SoftThresholdRank"]


class SoftThresholdRank(CompressionCallback):
    """Learn the rank of every linear layer while fine-tuning, and keep only that.

    Each linear becomes ``U f(sigma - alpha) V``. After a warm-up thresholds rise until the target is met (search),
    then ranks are pinned and the rest of training recovers. At the end of ``fit`` each layer is two thin linears,
    or one dense where that is smaller.

    Args:
        target_params: Share of the parameters of ``scope`` to keep, in (0, 1].
        scope: What that is a share of: weights of the factorised linears, the encoder's layers, or the whole model.
        include: Shell patterns over module paths: which of the family's linears to factorise.
        exclude: Shell patterns over module paths: which of them to leave dense.
        regularizer: ``"target"`` (log of size over a shrinking budget) or ``"exp"`` (sum of exp(-alpha)).
        regularizer_weight: Weight beside the task loss; by default 1 for ``"target"`` and 0.1 for ``"exp"``.
        allocation: ``"learned"`` ranks, or the same share for every layer (``"uniform"``) without a search.
        init: ``"whitened"`` by the inputs seen during the warm-up, or plain ``"svd"``.
        warmup: Share of training before thresholds move, in [0, 1).
        search_end: Share of training after which ranks are pinned at the latest, in (warmup, 1].
        sharpness: Slope of the gate, positive.
        relative: Whether thresholds are in units of each layer's root-mean-square singular value, or absolute.
        threshold_lr: Learning rate of the thresholds; by default from the distance they have to cross.
        rank_multiple: Kept ranks are rounded up to a multiple of this, at least 1.
        dense_above: A layer stays dense where two factors would exceed this share of its weights, in (0, 1].
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to make the model physically smaller when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range.

    Paper: SoftLMs (arXiv 2411.10543).

    Example:
        >>> SoftThresholdRank(target_params=0.5).config.scope
        'linear'
    """

    def __init__(
        self,
        *,
        target_params: float = Config.target_params,
        scope: Literal["linear", "encoder", "total"] = Config.scope,
        include: Sequence[str] = Config.include,
        exclude: Sequence[str] = Config.exclude,
        regularizer: Literal["target", "exp"] = Config.regularizer,
        regularizer_weight: float | None = Config.regularizer_weight,
        allocation: Literal["learned", "uniform"] = Config.allocation,
        init: Literal["svd", "whitened"] = Config.init,
        warmup: float = Config.warmup,
        search_end: float = Config.search_end,
        sharpness: float = Config.sharpness,
        relative: bool = Config.relative,
        threshold_lr: float | None = Config.threshold_lr,
        rank_multiple: int = Config.rank_multiple,
        dense_above: float = Config.dense_above,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        config = Config(
            target_params=target_params,
            scope=scope,
            include=tuple(include) if not isinstance(include, str) else (include,),
            exclude=tuple(exclude) if not isinstance(exclude, str) else (exclude,),
            regularizer=regularizer,
            regularizer_weight=regularizer_weight,
            allocation=allocation,
            init=init,
            warmup=warmup,
            search_end=search_end,
            sharpness=sharpness,
            relative=relative,
            threshold_lr=threshold_lr,
            rank_multiple=rank_multiple,
            dense_above=dense_above,
        )
        super().__init__(config, module=module, convert=convert)

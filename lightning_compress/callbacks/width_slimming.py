"""When WidthSlimming happens: registered in setup, driven by the module's hooks, converted at the end of fit."""

from __future__ import annotations

from typing import Literal

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.methods.width_slimming import WidthSlimmingConfig as Config

__all__ = ["WidthSlimming"]


class WidthSlimming(CompressionCallback):
    """Make every layer narrower while fine-tuning: fewer heads, fewer neurons, word embeddings of a lower rank.

    After a warm-up what matters least to the loss is closed in equal steps, by gradients that training has anyway;
    then the rest of training recovers. At the end of ``fit`` what was closed is cut off, and dense, smaller layers are
    left. Of each width, a whole number is how many are kept and a fraction which share, 1.0 being all; None leaves it
    as it is, or to the target.

    Args:
        heads: Attention heads kept in each layer (on average under a global ranking); with grouped queries in groups.
        ffn: Neurons of the FFN kept in each layer; shares are rounded to ``ffn_multiple``.
        embedding_rank: Rank of the factorised word embeddings.
        hidden: Width of the residual stream, with norms and embeddings.
        target_params: Share of the parameters of ``scope`` to keep, in (0, 1], by the widths that are not given; 0.5
            if nothing is given.
        target_flops: Instead: share of the layers' FLOPs to spend, in (0, 1].
        scope: What ``target_params`` is a share of: weights of the linears, the layers, or the whole model, whose
            word embeddings are then factorised too.
        text_length: Tokens of the text that ``target_flops`` is counted for, at least 1.
        criterion: ``"taylor"``, ``"group_taylor"``, ``"per_exit"`` or ``"l0"``, see the card.
        ranking: Whether each layer keeps the same share (``"uniform"``), or all layers compete (``"global"``).
        start: Share of training before slimming begins, in [0, 1).
        end: Share of training after which widths are those of deployment, in (start, 1].
        steps: Equal steps in which widths fall; by default one for each head that a layer loses, 8 where none does.
        calibration_batches: Batches of a separate pass before each step; 0 reads gradients of the ordinary steps.
        calibration_seed: Which batches these are, of those that training sees before the first step.
        importance_from: Whose losses importance is read off where the model has exits: of all of them, or in the
            separate pass of the model's own head alone, ``"final_exit"``.
        importance_loss: What the separate pass takes gradients of: losses against labels, or ``"official"``, what the
            official code compares with the teacher of a ``Distillation`` in the same run.
        ffn_multiple: Neurons kept are a multiple of this; by default up to 64, as the FFN's size allows.
        gate_lr: Learning rate of the gates by criterion ``"l0"``; by default from the length of the search.
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to make the model physically smaller when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range, or two goals are given.

    Paper: COST-EFF (arXiv 2210.15523).

    Example:
        >>> WidthSlimming(heads=6, ffn=1536, embedding_rank=384).config.ranking
        'uniform'
    """

    def __init__(
        self,
        *,
        heads: int | float | None = Config.heads,
        ffn: int | float | None = Config.ffn,
        embedding_rank: int | float | None = Config.embedding_rank,
        hidden: int | float | None = Config.hidden,
        target_params: float | None = Config.target_params,
        target_flops: float | None = Config.target_flops,
        scope: Literal["linear", "encoder", "total"] = Config.scope,
        text_length: int = Config.text_length,
        criterion: Literal["taylor", "group_taylor", "per_exit", "l0"] = Config.criterion,
        ranking: Literal["uniform", "global"] = Config.ranking,
        start: float = Config.start,
        end: float = Config.end,
        steps: int | None = Config.steps,
        calibration_batches: int = Config.calibration_batches,
        calibration_seed: int = Config.calibration_seed,
        importance_from: Literal["all_exits", "final_exit"] = Config.importance_from,
        importance_loss: Literal["labels", "official"] = Config.importance_loss,
        ffn_multiple: int | None = Config.ffn_multiple,
        gate_lr: float | None = Config.gate_lr,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        config = Config(
            heads=heads,
            ffn=ffn,
            embedding_rank=embedding_rank,
            hidden=hidden,
            target_params=target_params,
            target_flops=target_flops,
            scope=scope,
            text_length=text_length,
            criterion=criterion,
            ranking=ranking,
            start=start,
            end=end,
            steps=steps,
            calibration_batches=calibration_batches,
            calibration_seed=calibration_seed,
            importance_from=importance_from,
            importance_loss=importance_loss,
            ffn_multiple=ffn_multiple,
            gate_lr=gate_lr,
        )
        super().__init__(config, module=module, convert=convert)

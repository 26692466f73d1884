"""When ContributionTokenDropping happens: registered in setup, driven by the module's hooks, converted at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lightning_compress.callbacks.validation_dial import TokenDroppingCallback
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig as Config
from lightning_compress.methods.saliency_teacher import MODULE, SELF

__all__ = ["ContributionTokenDropping"]


class ContributionTokenDropping(TokenDroppingCallback):
    """Learn which tokens carry the prediction, and let the rest leave before they cost anything.

    The first part of training fine-tunes as usual; its result becomes the teacher whose gradient saliencies small
    predictors imitate, one before each layer. Then thresholds rise until the target is met, softly at first. At the
    end of ``fit`` the encoder runs packed: tokens leave for real, in batches.

    Saliency is that of the gold class where the model is called with ``labels``; without them it silently is that of
    the class that the teacher predicts.

    Args:
        target_flops: Share of the dense encoder's FLOPs to spend, in (0, 1]; 0.5 if no other goal is given.
        target_tokens: Instead: share of tokens that enter the layers, on average over layers, in (0, 1].
        length_weight: Instead: fixed weight of the summed token counts (the paper's phi), at least 0.
        saliency_weight: Weight of the distance between predictors and saliency (the paper's gamma), at least 0.
        saliency_to_encoder: Whether that distance also trains the encoder, as in the paper; slower.
        teacher: ``"self"``, the model itself at the end of the warm-up, or folder or name of a fine-tuned model.
        teacher_model: The fine-tuned model itself instead; never saved, so to be given again when resuming.
        teacher_bits: Hold the teacher's linears in so many bits (bitsandbytes); by default as they are.
        layers: Indices of layers before which tokens may leave, from 0; all by default.
        predictor_width: Neurons of each predictor, in [1, 4096].
        predictor_lr: Learning rate of the predictors when dropping begins, positive; falls linearly to 0.
        protect_first: How many tokens at the start of a text never leave, at least 1 (the classification token).
        protect_tokens: Token ids that never leave, e.g. the separator's.
        warmup: Share of training before dropping begins; by default 0.3 with the teacher ``"self"``, else 0.
        ramp_end: Share of training after which thresholds rest and removal is all but hard, in (warmup, 1]; by
            default halfway from the end of the warm-up to the end of training.
        slope_start: Slope of the soft removal when dropping begins, positive.
        slope_end: Slope at the end of the ramp; geometric between.
        threshold_init: Where the thresholds start, in units of the mean share, in [0.01, 1].
        threshold_lr: Learning rate of the thresholds; by default such that they can cross their range in the ramp.
        max_drop: By how much the validation score may be below that with nothing dropped, in [0, 1): at the end of
            ``fit`` the fastest setting within is chosen on the trainer's validation data, whose batches are
            dicts with ``"labels"``. By default thresholds stay as trained.
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to put the packed engine in place when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range, several goals or teachers are given, or ``max_drop`` is with
            ``convert=False``.

    Paper: AdapLeR (arXiv 2203.08991).

    Example:
        >>> ContributionTokenDropping(target_flops=0.33).config.teacher
        'self'
    """

    def __init__(
        self,
        *,
        target_flops: float | None = Config.target_flops,
        target_tokens: float | None = Config.target_tokens,
        length_weight: float | None = Config.length_weight,
        saliency_weight: float = Config.saliency_weight,
        saliency_to_encoder: bool = Config.saliency_to_encoder,
        teacher: str = Config.teacher,
        teacher_model: nn.Module | None = None,
        teacher_bits: Literal[4, 8] | None = Config.teacher_bits,
        layers: Sequence[int] | None = Config.layers,
        predictor_width: int = Config.predictor_width,
        predictor_lr: float = Config.predictor_lr,
        protect_first: int = Config.protect_first,
        protect_tokens: Sequence[int] = Config.protect_tokens,
        warmup: float | None = Config.warmup,
        ramp_end: float | None = Config.ramp_end,
        slope_start: float = Config.slope_start,
        slope_end: float = Config.slope_end,
        threshold_init: float = Config.threshold_init,
        threshold_lr: float | None = Config.threshold_lr,
        max_drop: float | None = Config.max_drop,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        if teacher_model is not None and teacher not in (SELF, MODULE):
            raise ValueError(f"teacher={teacher!r} and a teacher_model are two teachers: give one of them")
        config = Config(
            target_flops=target_flops,
            target_tokens=target_tokens,
            length_weight=length_weight,
            saliency_weight=saliency_weight,
            saliency_to_encoder=saliency_to_encoder,
            teacher=teacher if teacher_model is None else MODULE,
            teacher_bits=teacher_bits,
            layers=layers,  # type: ignore[arg-type]
            predictor_width=predictor_width,
            predictor_lr=predictor_lr,
            protect_first=protect_first,
            protect_tokens=protect_tokens,  # type: ignore[arg-type]
            warmup=warmup,
            ramp_end=ramp_end,
            slope_start=slope_start,
            slope_end=slope_end,
            threshold_init=threshold_init,
            threshold_lr=threshold_lr,
            max_drop=max_drop,
        )
        resources = None if teacher_model is None else {"teacher_model": teacher_model}
        super().__init__(config, max_drop, module=module, convert=convert, resources=resources)

"""When BottleneckTokenDropping happens: registered in setup, driven by the module's hooks, converted at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_compress.callbacks.validation_dial import TokenDroppingCallback
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig as Config

__all__ = ["BottleneckTokenDropping"]


class BottleneckTokenDropping(TokenDroppingCallback):
    """Let an information bottleneck decide, token by token, what goes on into each layer; the rest leaves.

    A sampler before each layer gives every token a probability of staying. While training, decisions are drawn, and an
    objective that prices the information in what stays is weighed against the task until the target is met. Then they
    are those of deployment, and training goes on. At the end of ``fit`` the encoder runs packed: tokens leave for
    real, in batches.

    Args:
        target_flops: Share of the dense encoder's FLOPs to spend, in (0, 1]; 0.5 if no other goal is given;
            samplers included.
        target_tokens: Instead: share of tokens that enter the layers, on average over layers, in (0, 1].
        removal_weight: Weight of the term that drops tokens (the paper's gamma of the norm); by default the published
            one. Without a target it alone decides how many leave.
        objective: ``"bottleneck"``, norm and entropy, or ``"skim"``, the plain share of tokens that stay.
        form: How the norm is taken: ``"rms"`` per text, ``"kl"`` as the Gaussian prior has it, or ``"batch_fro"`` of
            the whole batch, as in the official code.
        entropy_weight: Weight of the negative entropy, which keeps decisions soft, at least 0.
        entropy_from_start: Whether the entropy counts in the warm-up too, as in the paper.
        penalize: What the terms see of a decision: ``"probabilities"`` or noisy ``"samples"``.
        detach_hidden: Whether the norm falls by dropping alone; otherwise smaller states lower it too.
        layers: Indices of layers before which tokens may leave, from 0; all by default.
        sampler_width: Neurons of each sampler, at least 1; by default as wide as the model.
        sampler_lr: Learning rate of the samplers, positive; falls linearly to 0.
        protect_first: How many tokens at the start of a text never leave, at least 1 (the classification token).
        protect_tokens: Token ids that never leave, e.g. the separator's.
        warmup: Share of training before the norm counts, in [0, 1).
        ramp_end: Share of training after which decisions are those of deployment, in (warmup, 1].
        max_drop: By how much the validation score may be below that with nothing dropped, in [0, 1): at the end of
            ``fit`` the fastest setting within is chosen on the trainer's validation data, whose batches are
            dicts with ``"labels"``. By default the threshold stays as trained.
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to put the packed engine in place when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range, two goals are given, or ``max_drop`` is with
            ``convert=False``.

    Paper: Infor-Coef (arXiv 2305.12458).

    Example:
        >>> BottleneckTokenDropping(target_flops=0.33).config.form
        'rms'
    """

    def __init__(
        self,
        *,
        target_flops: float | None = Config.target_flops,
        target_tokens: float | None = Config.target_tokens,
        removal_weight: float | None = Config.removal_weight,
        objective: Literal["bottleneck", "skim"] = Config.objective,
        form: Literal["rms", "kl", "batch_fro"] = Config.form,
        entropy_weight: float = Config.entropy_weight,
        entropy_from_start: bool = Config.entropy_from_start,
        penalize: Literal["probabilities", "samples"] = Config.penalize,
        detach_hidden: bool = Config.detach_hidden,
        layers: Sequence[int] | None = Config.layers,
        sampler_width: int | None = Config.sampler_width,
        sampler_lr: float = Config.sampler_lr,
        protect_first: int = Config.protect_first,
        protect_tokens: Sequence[int] = Config.protect_tokens,
        warmup: float = Config.warmup,
        ramp_end: float = Config.ramp_end,
        max_drop: float | None = Config.max_drop,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        config = Config(
            target_flops=target_flops,
            target_tokens=target_tokens,
            removal_weight=removal_weight,
            objective=objective,
            form=form,
            entropy_weight=entropy_weight,
            entropy_from_start=entropy_from_start,
            penalize=penalize,
            detach_hidden=detach_hidden,
            layers=layers,  # type: ignore[arg-type]
            sampler_width=sampler_width,
            sampler_lr=sampler_lr,
            protect_first=protect_first,
            protect_tokens=protect_tokens,  # type: ignore[arg-type]
            warmup=warmup,
            ramp_end=ramp_end,
            max_drop=max_drop,
        )
        super().__init__(config, max_drop, module=module, convert=convert)

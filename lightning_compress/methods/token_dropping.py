"""What both policies of token dropping share: which models can drop, and how a policy gets in, out and back.

The next chapters are :mod:`lightning_compress.methods.contribution_token_dropping` and
:mod:`lightning_compress.runtime`.

Shape legend: B sequences, T padded length, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_compress.methods.base import check, check_kinds
from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.contribution_token_dropping import ExpectedTokens
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.kept_flops import DroppingCosts
from lightning_compress.nn.rounded_attention import TRAINING_IMPLEMENTATION
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.nn.tape import Tape, TokensKept
from lightning_compress.plan import PlanError
from lightning_compress.runtime import PackedEncoder

__all__ = [
    "TokenGuard",
    "check_can_drop",
    "check_shared_settings",
    "chosen_layers",
    "deploy_policy",
    "encoder_path",
    "flops_ratio_of_pass",
    "install_policy",
    "restore_policy",
    "whole_numbers",
]

_ATTENTION = ("sdpa", "eager", TRAINING_IMPLEMENTATION)


def check_shared_settings(config: Any) -> None:
    """Check the fields that the configurations of both policies have, and make lists tuples.

    Raises:
        TypeError: If a value is of another kind than its field.
        ValueError: If one is out of range.
    """
    tokens = config.protect_tokens
    are_listed = isinstance(tokens, Collection) and not isinstance(tokens, str)
    check(
        not are_listed or all(type(token) is int and token >= 0 for token in tokens),
        f"protect_tokens={tokens} are no token ids, whole numbers from 0: has the tokenizer such a token?",
    )
    check_kinds(config)
    for name in ("target_flops", "target_tokens"):
        value = getattr(config, name)
        is_share = isinstance(value, int | float) and 0.0 < value <= 1.0
        check(value is None or is_share, f"{name}={value!r} is outside (0, 1]: 0.5 asks for half")
    check(
        config.protect_first >= 1,
        f"protect_first={config.protect_first} is below 1: the classification token always stays",
    )
    check(
        config.max_drop is None or 0.0 <= config.max_drop < 1.0,
        f"max_drop={config.max_drop} is outside [0, 1): 0.01 is one point of accuracy",
    )
    object.__setattr__(config, "layers", None if config.layers is None else tuple(config.layers))
    object.__setattr__(config, "protect_tokens", tuple(tokens))


def check_can_drop(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model whose encoder can lose tokens.

    Raises:
        ValueError: If it is a decoder, has a head that reads every token, or none, or an attention implementation
            that takes no bias.
    """
    anatomy = describe(model)
    name = type(model).__name__
    if anatomy.is_decoder or not anatomy.is_post_norm or anatomy.encoder is None:
        raise ValueError(
            f"{name} is not an encoder like BERT's: tokens can be dropped from BERT, RoBERTa, DistilBERT and ELECTRA"
        )
    if anatomy.head is None or anatomy.is_head_per_token:
        reads = "has no head" if anatomy.head is None else "has a head that reads every token"
        raise ValueError(
            f"{name} {reads}, so tokens cannot be spared: token dropping is for models that classify or score a whole "
            "text, e.g. AutoModelForSequenceClassification"
        )
    attention = getattr(model.config, "_attn_implementation", "sdpa")
    if attention not in _ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r} takes no bias per key: load the model with attn_implementation='sdpa' "
            "to train it; the packed engine chooses its own kernel afterwards"
        )
    return anatomy


def chosen_layers(anatomy: Anatomy, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers before which tokens may leave, ascending; all if None.

    Raises:
        ValueError: If there is none, or one does not exist.
    """
    count = len(anatomy.layers)
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"layers={layers} must name layers from 0 to {count - 1}, at least one")
    return chosen


def encoder_path(model: nn.Module) -> str:
    """Return the path of the module that holds the layers."""
    path = describe(model).encoder
    assert path is not None, "only encoders come here"
    return path


class TokenGuard:
    """A hook of the embeddings that tells a policy which tokens are protected for what they are."""

    def __init__(self, policy: nn.Module, token_ids: Sequence[int]) -> None:
        self.policy = policy
        self.token_ids = tuple(token_ids)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note where the protected ids are.

        Raises:
            ValueError: If there are no ids.
        """
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids_BT, Tensor):
            raise ValueError(
                f"tokens {list(self.token_ids)} are protected, but the model was called without input_ids, by which "
                "they are known: pass input_ids, not inputs_embeds"
            )
        token_ids = torch.tensor(self.token_ids, device=ids_BT.device)
        self.policy.guarded_BT = (ids_BT.unsqueeze(-1) == token_ids).any(-1)  # ONNX has no `isin`


def install_policy(model: nn.Module, policy: nn.Module, protect_tokens: Sequence[int]) -> Ledger:
    """Put a trainable policy into the encoder.

    Raises:
        ValueError: If the model is packed already, or drops tokens by another policy.
    """
    path = encoder_path(model)
    encoder = get_module(model, path)
    if isinstance(encoder, DroppingEncoder):
        raise ValueError(
            "ContributionTokenDropping and BottleneckTokenDropping both decide which tokens enter the same layers: "
            "keep one of the two callbacks"
        )
    if isinstance(encoder, PackedEncoder):
        raise ValueError("the model is packed: call lightning_compress.unpack(model) before compressing it")
    _place(policy, encoder)
    ledger = Ledger(model)
    ledger.replace(path, DroppingEncoder(encoder, policy))
    _guard(model, policy, protect_tokens)
    return ledger


def deploy_policy(model: nn.Module, policy: nn.Module, protect_tokens: Sequence[int], ledger: Ledger) -> None:
    """Put the packed engine, with a policy to deploy, in the encoder's place.

    The policy is frozen: hard decisions give it no gradient, and whoever fine-tunes the model further (under DDP, say)
    has no parameter that waits for one.
    """
    policy.requires_grad_(False)
    path = encoder_path(model)
    encoder = get_module(model, path)
    _place(policy, encoder)
    _unguard(model)
    if isinstance(encoder, DroppingEncoder):
        ledger.replace(path, encoder.family)
    packed = PackedEncoder(model, describe(model))  # type: ignore[arg-type]
    packed.policy = policy
    ledger.replace(path, packed)
    _guard(model, policy, protect_tokens)


def flops_ratio_of_pass(handle: Any, lengths_B: Tensor | None) -> float:
    """Return the FLOPs of the latest training pass over those with every token kept, by the counts on the tape.

    Args:
        handle: Of a policy.
        lengths_B: Tokens of each sequence of the pass; where they are unknown, or of other sequences, the share of kept
            tokens is returned.
    """
    counts_BL = _counts_on_tape(handle.tape)
    if counts_BL is None:
        return 1.0
    if lengths_B is None or lengths_B.shape[0] != counts_BL.shape[0]:
        return handle.metrics()["tokens_kept"]
    dense_BL = lengths_B[:, None].expand_as(counts_BL)
    dense = DroppingCosts.of(handle.model, policy_flops_per_token=0).flops(dense_BL, lengths_B).sum()
    return float(DroppingCosts.of(handle.model).flops(counts_BL, lengths_B).sum() / dense)


def _counts_on_tape(tape: Tape) -> Tensor | None:
    """Tokens that entered each layer in the latest pass, ``[B, L]``; None while nothing is dropped."""
    for kind in (ExpectedTokens, TokensKept):
        try:
            records: list[Any] = tape.read(kind)
        except LookupError:
            continue
        counts = [r.count_B if kind is ExpectedTokens else r.keep_BT.sum(dim=1) for r in records]
        return torch.stack(counts, dim=1).detach()
    return None


def restore_policy(
    model: nn.Module,
    structure: Mapping[str, Any],
    new_policy: Callable[[nn.Module, Mapping[str, Any]], nn.Module],
) -> Ledger:
    """Rebuild a deployed policy and the packed engine on a fresh, possibly meta-device model.

    Raises:
        PlanError: If the structure does not fit the model.
    """
    if not isinstance(model, PreTrainedModel):
        raise PlanError(
            "tokens were dropped from a classifier, for what its head reads, and only its base model is being opened: "
            "open it with AutoModelForSequenceClassification or lightning_compress.load"
        )
    try:
        protect_tokens = whole_numbers(structure, "protect_tokens")
        layers = whole_numbers(structure, "layers")
        if list(chosen_layers(check_can_drop(model), layers)) != layers:
            raise ValueError(f"layers={layers} must be ascending, each once")
        with torch.device(next(model.parameters()).device):
            policy = new_policy(model, structure)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the plan of dropped tokens does not fit the model: {error}") from error
    ledger = Ledger(model)
    deploy_policy(model, policy, protect_tokens, ledger)
    return ledger


def whole_numbers(structure: Mapping[str, Any], name: str) -> list[int]:
    """Return the list of whole numbers at least 0 under a name.

    Raises:
        KeyError: If there is nothing under that name.
        TypeError: If it is something else.
    """
    numbers = structure[name]
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError(f"{name} must be a list of whole numbers from 0, got {numbers!r}")
    return numbers


def _place(policy: nn.Module, encoder: nn.Module) -> None:
    weight = next(encoder.parameters())
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.to(device=weight.device, dtype=weight.dtype)
    policy.to(weight.device)


def _guard(model: nn.Module, policy: nn.Module, token_ids: Sequence[int]) -> None:
    if token_ids:
        embeddings = get_module(model, describe(model).embeddings)
        embeddings.register_forward_pre_hook(TokenGuard(policy, token_ids), with_kwargs=True)


def _unguard(model: nn.Module) -> None:
    hooks = get_module(model, describe(model).embeddings)._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, TokenGuard)]:
        del hooks[key]

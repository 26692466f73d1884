"""What an encoder costs when tokens or examples leave it on the way: FLOPs from the tokens each layer keeps.

The companion of :mod:`lightning_compress.nn.flops`, which counts models that keep every token, and equal to it when
nothing leaves. The next chapter is :mod:`lightning_compress.metrics`, which adds such counts up over a data set.

Shape legend: B sequences, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import Anatomy, LayerAnatomy, describe
from lightning_compress.nn.exit_policy import ExitPolicy
from lightning_compress.nn.flops import flops_per_token
from lightning_compress.nn.surgery import get_module
from lightning_compress.nn.width_slimming import as_deployed

__all__ = ["DroppingCosts", "LastLayer", "count_exit_flops", "count_kept_flops"]

LastLayer = Literal["all", "first"]
"""Whether the last layer runs on all kept tokens, or for the first (classification) token only."""

_SLACK = 1e-3  # soft counts are sums of many rounded weights


@dataclass(frozen=True)
class DroppingCosts:
    """What one example costs that tokens leave, or that leaves early itself, as a formula in its kept tokens.

    FLOPs are 2 MACs. An example that left keeps 0 tokens from then on, and costs nothing more in the layers.
    """

    kept: tuple[int, ...]
    """Of each layer, per token that enters its attention."""
    pair: tuple[int, ...]
    """Of each layer, per query and key."""
    scored: tuple[int, ...]
    """Of the policy at each layer, per token that was there before removal."""
    embedded: int
    """Per token of the input: projections of narrow or factorised embeddings."""
    once: int
    """Per example, also of those that left early: pooler and task head."""
    last_layer: LastLayer
    """Whose queries the last layer computes; its ``pair`` is then per key."""
    last: int = 0
    """Per example that reaches the last layer: with ``last_layer="first"``, what only the first token needs."""
    exits: tuple[int, ...] = ()
    """Of the exit after each layer, per example that the layer ran on; empty where there is none."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        policy_flops_per_token: int | Sequence[int] | None = None,
        exit_flops: int | Sequence[int] | None = None,
        last_layer: LastLayer = "all",
    ) -> DroppingCosts:
        """Read the costs off a model, as it is now. Arguments and errors are those of :func:`count_kept_flops`."""
        if last_layer not in ("all", "first"):
            raise ValueError(f'last_layer must be "all" or "first", got {last_layer!r}')
        model = as_deployed(model)
        anatomy = describe(model)
        if anatomy.is_decoder or anatomy.is_head_per_token:
            raise ValueError(
                f"{type(model).__name__} needs every token at its output; tokens can leave only encoders with one "
                "output per sequence: count this model with lightning_compress.nn.count_flops"
            )
        kept = [_linear_flops(model, layer) for layer in anatomy.layers]
        last = 0
        if last_layer == "first":
            keys_and_values = _linear_flops(model, anatomy.layers[-1], roles=("key", "value"))
            last, kept[-1] = kept[-1] - keys_and_values, keys_and_values
        projections = [anatomy.embeddings, anatomy.embedding_projection]
        return cls(
            kept=tuple(kept),
            pair=tuple(4 * layer.num_heads * layer.head_dim for layer in anatomy.layers),
            scored=_policy_costs(model, anatomy, policy_flops_per_token),
            embedded=sum(
                flops_per_token(get_module(model, path)) for path in projections if path is not None
            ),
            once=sum(flops_per_token(get_module(model, path)) for path in _once_per_sequence(anatomy)),
            last_layer=last_layer,
            last=last,
            exits=_exit_costs(model, anatomy, exit_flops),
        )

    def flops(self, kept_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the FLOPs of each example, ``[B]``, without checking the counts: for use in every training step.

        Args:
            kept_BL: Tokens that enter each layer's attention; whole or expected numbers, 0 after an example has left.
            lengths_B: Tokens of each example before the first layer.
        """
        dtype = torch.float32 if kept_BL.device.type == "mps" else torch.float64
        kept_BL, lengths_B = kept_BL.to(dtype), lengths_B.to(kept_BL.device, dtype)
        is_here_BL = (kept_BL > 0).to(dtype)
        there_BL = torch.cat([lengths_B[:, None], kept_BL[:, :-1]], dim=1) * is_here_BL
        queries_BL = kept_BL
        if self.last_layer == "first":
            queries_BL = torch.cat([kept_BL[:, :-1], is_here_BL[:, -1:]], dim=1)
        kept_L, pair_L, scored_L = (
            kept_BL.new_tensor(costs) for costs in (self.kept, self.pair, self.scored)
        )
        layers_BL = kept_BL * kept_L + queries_BL * kept_BL * pair_L + there_BL * scored_L
        flops_B = layers_BL.sum(dim=1) + is_here_BL[:, -1] * self.last + lengths_B * self.embedded + self.once
        return flops_B + is_here_BL @ kept_BL.new_tensor(self.exits) if self.exits else flops_B


def count_kept_flops(
    model: nn.Module,
    kept_BL: Tensor,
    lengths_B: Tensor,
    *,
    policy_flops_per_token: int | Sequence[int] | None = None,
    exit_flops: int | Sequence[int] | None = None,
    last_layer: LastLayer = "all",
) -> Tensor:
    """Count the FLOPs (2 MACs) of each example of an encoder that tokens leave, or examples.

    Per layer and kept token ``2 * in * out`` for each linear (or its own ``flops_per_token``); per layer with n kept
    tokens ``4 * n^2 * heads * head_dim``; the policy's scores at the tokens that are there *before* removal; each exit
    that was asked once; pooler and head once, also for examples that left early, as the packed engine runs them. With
    every token kept, no policy and no exits this equals :func:`~lightning_compress.nn.flops.count_flops`.
    Differentiable in ``kept_BL``, so that expected counts can be driven to a target; a loop that counts every step
    builds :class:`DroppingCosts` once.

    Args:
        model: A transformers encoder of a known family with one output per sequence; may be on the meta device.
        kept_BL: Tokens that enter the attention of each layer, after removal at that layer; the classification
            token counts. Whole numbers, or expected ones while training; 0 in all layers after an example has left
            by an exit.
        lengths_B: Tokens of each example before the first layer, padding not included.
        policy_flops_per_token: What scoring one token costs, for all layers or for each one. Default: what the
            encoder's ``policy`` says in ``flops_per_token_of(layer)``, nothing where there is no policy.
        exit_flops: What asking the exit after a layer costs an example, for all layers or for each one. Default: what
            the heads of ``model.exits`` cost, and the rule, where the packed encoder's ``exits`` asks them.
        last_layer: ``"all"`` runs the last layer on all kept tokens, as the paper counts. ``"first"`` is what the
            packed engine does for classifiers: keys and values of all kept tokens, everything else of the
            last layer for the first token only.

    Returns:
        FLOPs of each example, float64 ``[B]`` (float32 on MPS devices, which have no other).

    Raises:
        TypeError: If ``model`` is not a ``PreTrainedModel``.
        ValueError: If the family is unknown or its tokens cannot leave, if shapes do not fit, or if a count is below
            1 (where examples can leave: in the first layer), above the length, or larger than in the layer before.

    Paper: AdapLeR, FLOPs of the official code.
    Departs from the paper: bias, softmax, norms and activations are not counted (0.2 % of BERT-base at 64 tokens),
    and scores are priced where they are computed, before removal.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> model = BertModel(config, add_pooling_layer=False)
        >>> kept_BL = torch.tensor([[3, 3], [3, 1]])
        >>> count_kept_flops(model, kept_BL, lengths_B=torch.tensor([3, 3])).tolist()
        [6720.0, 4416.0]
    """
    costs = DroppingCosts.of(
        model, policy_flops_per_token=policy_flops_per_token, exit_flops=exit_flops, last_layer=last_layer
    )
    _check_counts(kept_BL, lengths_B, len(costs.kept), can_exit=bool(costs.exits))
    return costs.flops(kept_BL, lengths_B)


def count_exit_flops(model: nn.Module, exits: ExitPolicy, asked: Iterable[int]) -> tuple[int, ...]:
    """Count the FLOPs (2 MACs) of asking the exit after each layer for one example; 0 where none is asked.

    Args:
        model: A transformers encoder with heads in ``model.exits``, by ``str(layer)``.
        exits: Whose rule, if it has weights, runs with every head.
        asked: Layers whose exits are asked.
    """
    heads, rule, asked = get_module(model, "exits"), flops_per_token(exits.rule), set(asked)
    return tuple(
        flops_per_token(get_module(heads, str(layer))) + rule if layer in asked else 0
        for layer in range(len(describe(model).layers))
    )


def _linear_flops(model: nn.Module, layer: LayerAnatomy, roles: Sequence[str] | None = None) -> int:
    paths = [slot.path for slot in layer.linears if roles is None or slot.role in roles]
    return sum(flops_per_token(get_module(model, path)) for path in paths)


def _once_per_sequence(anatomy: Anatomy) -> list[str]:
    return [path for path in [anatomy.pooler, *anatomy.head_modules] if path is not None]


def _policy_costs(model: nn.Module, anatomy: Anatomy, flops: int | Sequence[int] | None) -> tuple[int, ...]:
    """What scoring a token costs at each layer: as told, or as the encoder's policy says, or nothing."""
    num_layers = len(anatomy.layers)
    if flops is not None:
        return _of_each_layer("policy_flops_per_token", flops, num_layers)
    encoder = None if anatomy.encoder is None else get_module(model, anatomy.encoder)
    cost_of = getattr(getattr(encoder, "policy", None), "flops_per_token_of", None)
    return tuple(0 if cost_of is None else int(cost_of(layer)) for layer in range(num_layers))


def _exit_costs(model: nn.Module, anatomy: Anatomy, flops: int | Sequence[int] | None) -> tuple[int, ...]:
    """What asking each exit costs: as told, or what the encoder's exits ask for; empty where there are none."""
    num_layers = len(anatomy.layers)
    if flops is not None:
        return _of_each_layer("exit_flops", flops, num_layers)
    encoder = None if anatomy.encoder is None else get_module(model, anatomy.encoder)
    exits: ExitPolicy | None = getattr(encoder, "exits", None)
    return () if exits is None else count_exit_flops(model, exits, exits.rule.asked_layers())


def _of_each_layer(name: str, flops: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    if isinstance(flops, int):
        return (flops,) * num_layers
    if len(flops) != num_layers:
        raise ValueError(
            f"{name} must be one number or one for each of {num_layers} layers, got {len(flops)}"
        )
    return tuple(flops)


def _check_counts(kept_BL: Tensor, lengths_B: Tensor, num_layers: int, can_exit: bool) -> None:
    expected = (lengths_B.shape[0] if lengths_B.dim() == 1 else "B", num_layers)
    if lengths_B.dim() != 1 or tuple(kept_BL.shape) != expected:
        raise ValueError(
            f"kept_BL must be {list(expected)} (sequences, layers) and lengths_B [B]; "
            f"got {list(kept_BL.shape)} and {list(lengths_B.shape)}"
        )
    kept_BL = kept_BL.detach()
    there_BL = torch.cat([lengths_B[:, None].to(kept_BL), kept_BL[:, :-1]], dim=1)
    enough_BL = kept_BL >= 1 - _SLACK
    if can_exit:
        enough_BL = torch.cat([enough_BL[:, :1], enough_BL[:, 1:] | (kept_BL[:, 1:] == 0)], dim=1)
    wrong_BL = ~(enough_BL & (kept_BL <= there_BL * (1 + _SLACK)))
    if bool(wrong_BL.any()):
        sequence, layer = (int(index) for index in wrong_BL.nonzero()[0])
        raise ValueError(
            f"kept tokens must be at least 1 and never grow from layer to layer; sequence {sequence} keeps "
            f"{kept_BL[sequence, layer].item():g} of {there_BL[sequence, layer].item():g} at layer {layer}"
        )

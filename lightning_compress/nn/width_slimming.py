"""The gates of a whole model: while training what is to leave counts as zero, and shapes stay.

A model in training holds one :class:`WidthGates`, as ``model.width_gates``, whose hooks close what was pruned. What is
left when everything closed is cut off stands in :mod:`lightning_compress.nn.width_surgery`; the next chapter is
:mod:`lightning_compress.losses.width_slimming`.

Shape legend: K structures of one kind in one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.surgery import Ledger, get_module, remove_hook
from lightning_compress.nn.width_gate import HiddenGate, RankGate, StructureGate, masked_norm
from lightning_compress.nn.width_surgery import Widths, apply_widths

__all__ = ["WidthGates", "as_deployed", "narrowed"]

_NAME = "width_gates"


class WidthGates(nn.Module):
    """The gates of a model, one per layer for heads and one for neurons, held by the model as ``width_gates``.

    Args:
        model: A transformers model of a known family.
        heads: Whether heads are gated.
        neurons: Whether neurons are gated.
        embeddings: Whether the rank of the word embeddings is.
        hidden: Whether hidden dimensions are.
        learned: Whether heads and neurons are gated by learned distributions, with two multipliers beside.
    """

    multipliers: nn.Parameter | None

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: bool = True,
        neurons: bool = True,
        embeddings: bool = False,
        hidden: bool = False,
        learned: bool = False,
    ) -> None:
        super().__init__()
        anatomy = describe(model)
        self.heads, self.neurons = nn.ModuleList(), nn.ModuleList()
        for layer in anatomy.layers:
            groups, width = layer.num_key_value_heads, layer.num_heads * layer.head_dim
            self.heads.append(StructureGate(groups, width // groups, learned=learned and heads))
            self.neurons.append(StructureGate(layer.intermediate_size, 1, learned=learned and neurons))
        table = get_module(model, anatomy.word_embeddings)
        self.embeddings = RankGate(table.weight.shape[1]) if embeddings else None  # type: ignore[union-attr,arg-type]
        self.hidden = HiddenGate(anatomy.hidden_size) if hidden else None
        self.multipliers = nn.Parameter(torch.zeros(2)) if learned and (heads or neurons) else None
        if self.multipliers is not None:
            self.keep_in_graph(self.multipliers)
        self._hooks: list[Any] = []

    @classmethod
    def install(cls, model: nn.Module, **kinds: bool) -> WidthGates:
        """Give a model gates, all open, on its device.

        Raises:
            ValueError: If it has some.
        """
        if hasattr(model, _NAME):
            raise ValueError(f"{type(model).__name__} has width gates already: convert it first")
        gates = cls(model, **kinds).to(next(model.parameters()).device)
        model.add_module(_NAME, gates.train(model.training))
        gates._attach(model, describe(model))
        return gates

    @staticmethod
    def of(model: nn.Module) -> WidthGates | None:
        """Return the gates of a model, None where there are none."""
        gates = getattr(model, _NAME, None)
        return gates if isinstance(gates, WidthGates) else None

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Take gates and hooks off a model; nothing happens where there are none."""
        gates = WidthGates.of(model)
        if gates is not None:
            for hook in gates._hooks:
                remove_hook(model, hook)
            del model._modules[_NAME]

    def attach(self, model: nn.Module) -> None:
        """Close what is closed in a model that holds these gates: a copy that lost its hooks."""
        self._hooks = []
        self._attach(model, describe(model))

    @property
    def is_open(self) -> bool:
        """Whether nothing is closed."""
        return not any(_is_closing(gate) for gate in self.modules() if gate is not self)

    @property
    def widths(self) -> Widths:
        """What is kept now; None for what is whole."""
        hidden, rank = self.hidden, self.embeddings
        return Widths(
            heads=tuple(_kept(gate) for gate in self.heads),
            neurons=tuple(_kept(gate) for gate in self.neurons),
            embedding_rank=None if rank is None or rank.is_open else int(rank.rank),
            hidden=None if hidden is None else _kept(hidden),
        )

    @property
    def masks(self) -> list[LayerScores]:
        """1 for what is kept of each layer's heads and neurons, 0 for what is not; live buffers."""
        pairs = zip(self.heads, self.neurons, strict=True)
        return [LayerScores(heads.gate_K, neurons.gate_K) for heads, neurons in pairs]  # type: ignore[arg-type]

    @property
    def open_probabilities(self) -> list[LayerScores]:
        """Probability that each gate is open, of heads and neurons of each layer; 1 where they are not learned."""
        pairs = zip(self.heads, self.neurons, strict=True)
        return [LayerScores(heads.open_probability_K, neurons.open_probability_K) for heads, neurons in pairs]  # type: ignore[arg-type]

    def close(self, masks: Sequence[LayerScores]) -> None:
        """Keep what the masks of each layer have 1 for."""
        for heads, neurons, mask in zip(self.heads, self.neurons, masks, strict=True):
            heads.close(mask.heads_G)  # type: ignore[operator]
            neurons.close(mask.neurons_F)  # type: ignore[operator]

    def sample(self, is_sampled: bool) -> None:
        """Draw learned gates from their distributions, or stop it."""
        for gate in [*self.heads, *self.neurons]:
            gate.is_sampled = is_sampled and gate.log_alpha_K is not None  # type: ignore[assignment]

    def keep_in_graph(self, parameter: nn.Parameter) -> None:
        """Let a parameter that only a loss term reads, now and then, be part of every training pass."""
        learned = [gate for gate in [*self.heads, *self.neurons] if gate.log_alpha_K is not None]
        for gate in learned[:1]:
            gate._idle = (parameter,)  # type: ignore[assignment]

    @property
    def locations(self) -> list[nn.Parameter]:
        """Parameters of the learned gates."""
        found = [gate.log_alpha_K for gate in [*self.heads, *self.neurons]]
        return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]

    def _attach(self, model: nn.Module, anatomy: Anatomy) -> None:
        for layer, heads, neurons in zip(anatomy.layers, self.heads, self.neurons, strict=True):
            paths = {slot.role: slot.path for slot in layer.linears}
            self._hook(model, paths["attention_output"], _GateInput(heads))
            self._hook(model, paths["ffn_out"], _GateInput(neurons))
        if self.embeddings is not None:
            self._hook(model, anatomy.word_embeddings, _GateOutput(self.embeddings))
            for path in _tied_heads(model, anatomy):
                self._hook(model, path, _GateInput(self.embeddings))
        if self.hidden is not None:
            norms = [path for layer in anatomy.layers for path in layer.norms]
            for path in dict.fromkeys([*norms, *anatomy.residual_writers]):
                if not isinstance(get_module(model, path), nn.Embedding):  # norms follow tables
                    self._hook(model, path, _GateNorm(self.hidden))

    def _hook(self, model: nn.Module, path: str, hook: Any) -> None:
        module = get_module(model, path)
        if isinstance(hook, _GateInput):
            module.register_forward_pre_hook(hook)
        else:
            module.register_forward_hook(hook)
        self._hooks.append(hook)


def as_deployed(model: nn.Module) -> nn.Module:
    """Return what a model is to be counted as: itself, or without what its gates have closed.

    Returns:
        The model, or a copy without weights (matrices are on the meta device) that was cut to its widths.
    """
    gates = WidthGates.of(model)
    if gates is None or gates.is_open:
        return model
    return narrowed(model, gates.widths)


def narrowed(model: nn.Module, widths: Widths) -> nn.Module:
    """Return a copy of a model cut to these widths, without weights and gates: matrices are on the meta device."""
    memo: dict[int, Any] = {id(t): _light(t) for t in [*model.parameters(), *model.buffers()]}
    small = copy.deepcopy(model, memo)
    WidthGates.remove_from(small)
    apply_widths(small, widths, Ledger(small))
    return small


class _GateHook:
    """A hook that belongs to a place in the model, whichever module is there."""

    follows_module = True

    def __init__(self, gate: Any) -> None:
        self.gate = gate


class _GateInput(_GateHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.gate(args[0]), *args[1:])


class _GateOutput(_GateHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.gate(output)


class _GateNorm(_GateHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.gate.is_open:
            return output
        weight: Any = module.weight
        if weight is not None and weight.dim() > 1:  # a projection, no norm: closed dimensions are zero
            return self.gate(output)
        return masked_norm(module, args[0], self.gate.gate_K)


def _is_closing(gate: Any) -> bool:
    return not getattr(gate, "is_open", True) or getattr(gate, "is_sampled", False)


def _kept(gate: Any) -> tuple[int, ...] | None:
    return None if gate.is_open and not gate.is_sampled else gate.kept


def _light(tensor: Tensor) -> Tensor:
    """A matrix on the meta device; vectors as they are, since layers may look into them."""
    if tensor.dim() < 2:
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _tied_heads(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Paths of linears that share the table of the word embeddings, with which they compare states."""
    table = get_module(model, anatomy.word_embeddings).weight
    return [
        path
        for path, module in model.named_modules()
        if path != anatomy.word_embeddings and getattr(module, "weight", None) is table
    ]

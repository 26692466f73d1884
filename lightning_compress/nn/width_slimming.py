"""Gates of heads, neurons, embedding ranks and hidden dimensions: what is to leave counts as zero, shapes stay.

While training a model holds one :class:`WidthGates`, as ``model.width_gates``, whose hooks close what was pruned. What
is left when everything closed is cut off stands in :mod:`lightning_compress.nn.width_surgery`; the next chapter is
:mod:`lightning_compress.losses.width_slimming`.

Shape legend: B any leading dimensions, D hidden size, E width of the word embeddings, V vocabulary, R rank, K
structures of one kind in one layer, I = K times their width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.factored_embedding import leading_basis
from lightning_compress.nn.hard_concrete import expected_gate, sample_gate
from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.surgery import Ledger, get_module, remove_hook
from lightning_compress.nn.width_surgery import Widths, apply_widths

__all__ = [
    "HiddenGate",
    "RankGate",
    "StructureGate",
    "WidthGates",
    "as_deployed",
    "masked_norm",
    "narrowed",
]

_NAME = "width_gates"
_START = 3.0
"""Location at which learned gates start: open, but within reach."""


class StructureGate(nn.Module):
    """Multiplies each structure (a head, a neuron) of a linear's input by its gate.

    Args:
        size: Structures there are.
        width: Features of each, next to each other.
        learned: Whether gates are drawn from a learned distribution while :attr:`is_sampled`.
    """

    gate_K: Tensor
    log_alpha_K: nn.Parameter | None

    def __init__(self, size: int, width: int, *, learned: bool = False) -> None:
        super().__init__()
        self.width, self.is_sampled, self.is_open = width, False, True
        self.register_buffer("gate_K", torch.ones(size))
        self.log_alpha_K = nn.Parameter(torch.full((size,), _START)) if learned else None
        self._idle: tuple[nn.Parameter, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the structures that are not closed, ascending."""
        value_K = self.gate_K
        if self.is_sampled and self.log_alpha_K is not None:
            value_K = expected_gate(self.log_alpha_K.detach())
        return tuple(value_K.nonzero().flatten().tolist())

    @torch.no_grad()
    def close(self, mask_K: Tensor) -> None:
        """Keep what ``mask_K`` has 1 for, at full magnitude."""
        self.gate_K.copy_(mask_K)
        self._look()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Gate an input; it goes through as it is while everything is open."""
        if self.log_alpha_K is None or not (self.is_sampled or self.training):
            if self.is_open:
                return x_BI
            gate_K = self.gate_K
        elif self.is_sampled:
            gate_K = (sample_gate if self.training else expected_gate)(self.log_alpha_K)
        else:
            gate_K = self.gate_K + 0.0 * self.log_alpha_K
        if self.training:  # idle parameters stay in the graph: DDP expects every one it was given
            gate_K = gate_K + sum(0.0 * parameter.sum() for parameter in self._idle)
        return x_BI * gate_K.to(x_BI.dtype).repeat_interleave(self.width)

    def _look(self) -> None:
        """Look once, not in ``forward``, which would wait for the device and break compiled graphs."""
        self.is_open = self.gate_K.is_meta or bool((self.gate_K == 1).all())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look()


class RankGate(nn.Module):
    """Projects word embeddings on a subspace: ``E P`` with ``P = V_R V_R^T``, which has the rank of what is kept.

    Args:
        width: Width of the embeddings.
    """

    projector_EE: Tensor
    rank: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.is_open = True
        self.register_buffer("projector_EE", torch.eye(width))
        self.register_buffer("rank", torch.tensor(width))

    @torch.no_grad()
    def close(self, weight_VE: Tensor, rank: int) -> None:
        """Keep the ``rank`` directions in which the embeddings, as projected now, are largest; rank 0 decides for all.

        Paper: COST-EFF, specification §3.2: unweighted truncated SVD, again at each step.
        """
        basis_ER = leading_basis(weight_VE.detach() @ self.projector_EE.to(weight_VE.dtype), rank)
        self.projector_EE.copy_(basis_ER @ basis_ER.T)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.projector_EE, src=0)
        self.rank.fill_(rank)
        self._look()

    def forward(self, x_BE: Tensor) -> Tensor:
        """Project embeddings, or what is compared with them."""
        return x_BE if self.is_open else x_BE @ self.projector_EE.to(x_BE.dtype)

    def _look(self) -> None:
        self.is_open = self.rank.is_meta or int(self.rank) == len(self.projector_EE)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look()


class HiddenGate(StructureGate):
    """Hidden dimensions: closed ones are zero in what norms put out, and norms do not count them.

    Args:
        size: Hidden size.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, 1)


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


def masked_norm(norm: nn.Module, x_BD: Tensor, keep_D: Tensor) -> Tensor:
    """Return what ``norm`` would put out over the kept dimensions alone, and zero for the others.

    Args:
        norm: A LayerNorm, or a norm by the root mean square.
        x_BD: Its input.
        keep_D: 1 for kept dimensions, 0 for others.

    Example:
        >>> masked_norm(nn.LayerNorm(3), torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])).detach().round()
        tensor([-1.,  1.,  0.])
    """
    keep_D = keep_D.to(torch.float32)
    count, wide_BD = keep_D.sum(), x_BD.to(torch.float32)
    weight_D: Any = norm.weight
    bias_D: Any = getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm):
        wide_BD = wide_BD - (wide_BD * keep_D).sum(-1, keepdim=True) / count
        epsilon = norm.eps
    else:
        epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None) or 0.0))
    variance_B1 = (wide_BD.square() * keep_D).sum(-1, keepdim=True) / count
    normed_BD = (wide_BD * torch.rsqrt(variance_B1 + epsilon)).to(x_BD.dtype) * weight_D
    normed_BD = normed_BD if bias_D is None else normed_BD + bias_D
    return normed_BD * keep_D.to(normed_BD.dtype)

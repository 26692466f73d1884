"""How much a loss would feel the loss of a head, a neuron or a hidden dimension: first-order Taylor scores.

Scores are read off weights and their gradients, wherever gradients come from: ordinary training steps or a separate
pass. The next chapter is :mod:`lightning_compress.nn.width_costs`; with both, :mod:`lightning_compress.nn.width_budget`
chooses what is kept.

Shape legend: O out features, I in features, G heads (groups of query heads that share key and value), F neurons of the
FFN, D hidden size, K structures of any of these kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import get_module, unwrap_adapter

__all__ = [
    "ImportanceMeter",
    "LayerScores",
    "group_taylor",
    "input_factor",
    "output_factor",
    "taylor",
]

Criterion = Literal["taylor", "group_taylor"]
Gradient = Callable[[nn.Parameter], Tensor | None]
_READERS = ("query", "key", "value", "query_key_value", "ffn_in", "ffn_gate")
_WRITERS = ("attention_output", "ffn_out")


def taylor(weight_KX: Tensor, gradient_KX: Tensor) -> Tensor:
    """Return ``sum_x |w_kx g_kx|``, shape ``[K]``: absolute values inside the sum, so that nothing cancels.

    Args:
        weight_KX: The weights that go with each structure, one row per structure.
        gradient_KX: Their gradients.

    Paper: COST-EFF, specification §3.2, from the official code.

    Example:
        >>> taylor(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]]))
        tensor([4.])
    """
    return (weight_KX * gradient_KX).abs().sum(dim=1)


def group_taylor(weight_KX: Tensor, gradient_KX: Tensor) -> Tensor:
    """Return ``|sum_x w_kx g_kx|``, shape ``[K]``: what the loss changes to first order if the whole group goes.

    Summed over the weights that read a structure, it is the gradient of a gate on that structure.

    Paper: COST-EFF, specification §6-B, A2.

    Example:
        >>> group_taylor(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]]))
        tensor([2.])
    """
    return (weight_KX * gradient_KX).sum(dim=1).abs()


def input_factor(linear: nn.Module) -> tuple[nn.Parameter, bool]:
    """Return the parameter that holds a linear's weights of each input, and whether inputs are its rows.

    Of a factorised linear that is the second factor. An adapter is looked through.

    Raises:
        TypeError: If the module is none of the forms that linears have here.
    """
    base = _base(linear)
    if isinstance(base, Conv1D):
        return base.weight, True
    for owner, name in ((base, "v_MI"), (getattr(base, "down", None), "weight"), (base, "weight")):
        parameter = getattr(owner, name, None)
        if isinstance(parameter, nn.Parameter):
            return parameter, False
    raise TypeError(_unknown(linear))


def output_factor(linear: nn.Module) -> tuple[nn.Parameter, bool]:
    """Return the parameter that holds a linear's weights of each output, and whether outputs are its rows.

    Raises:
        TypeError: If the module is none of the forms that linears have here.
    """
    base = _base(linear)
    if isinstance(base, Conv1D):
        return base.weight, False
    for owner, name in ((base, "u_OM"), (getattr(base, "up", None), "weight"), (base, "weight")):
        parameter = getattr(owner, name, None)
        if isinstance(parameter, nn.Parameter):
            return parameter, True
    raise TypeError(_unknown(linear))


@dataclass
class LayerScores:
    """Scores of one layer's structures, larger for those to keep."""

    heads_G: Tensor
    """Of heads, or of groups that share key and value."""
    neurons_F: Tensor
    """Of neurons of the FFN."""


class ImportanceMeter:
    """Sums of scores over passes, for each layer's heads and neurons and, if asked, for hidden dimensions.

    A head is scored by the columns of the attention's output that read it; queries, keys and values are not looked
    at. A neuron is scored by its rows in the FFN's input (and gate) and its column in the output; with
    ``"group_taylor"`` by the column alone, for either side going takes the other along. Biases are never scored.

    Args:
        model: A transformers model.
        criterion: ``"taylor"`` or ``"group_taylor"``.
        heads: Whether heads are scored; otherwise their sums stay 0, and their weights may be frozen.
        neurons: The same of neurons.
        hidden: Whether hidden dimensions are scored too: by all columns that read and rows that write them.

    Paper: COST-EFF, specification §3.2 and §6-B.
    Departs from the paper: summed over ordinary steps, each step counts with the weights of that step. In a separate
    pass, where weights rest, that is the official ``|W * sum |g||``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = "taylor",
        *,
        heads: bool = True,
        neurons: bool = True,
        hidden: bool = False,
    ) -> None:
        anatomy = describe(model)
        self.model, self.criterion = model, criterion
        self._reads_heads, self._reads_neurons = heads, neurons
        self._slots = [{slot.role: slot.path for slot in layer.linears} for layer in anatomy.layers]
        self._sizes = [(layer.num_key_value_heads, layer.intermediate_size) for layer in anatomy.layers]
        self._hidden_size = anatomy.hidden_size if hidden else 0
        self.num_passes = 0
        self.layers: list[LayerScores] = []
        self.hidden_D: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.num_passes = 0
        self.layers = [
            LayerScores(torch.zeros(heads), torch.zeros(neurons)) for heads, neurons in self._sizes
        ]
        self.hidden_D = torch.zeros(self._hidden_size) if self._hidden_size else None

    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are read."""
        found: dict[int, nn.Parameter] = {}
        for slots in self._slots:
            for parameter in self._read(slots):
                found[id(parameter)] = parameter
        return list(found.values())

    def add(self, gradient_of: Gradient = lambda parameter: parameter.grad) -> None:
        """Add the scores of one pass; gradients that are not finite (of a skipped step) count as none.

        Args:
            gradient_of: Returns a parameter's gradient, or None where it got none.
        """
        self._sum(gradient_of)
        self.num_passes += 1

    def add_sizes(self) -> None:
        """Add the sums of absolute weights: what is left to go by where no gradient was seen."""
        self._sum(torch.sign)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum over processes, which then decide alike."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        device = next(self.model.parameters()).device
        flat = torch.cat([tensor.to(device) for tensor in self._tensors()])
        dist.all_reduce(flat)
        for tensor, part in zip(self._tensors(), flat.split([len(t) for t in self._tensors()]), strict=True):
            tensor.copy_(part)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, as plain tensors on the CPU."""
        return {"num_passes": self.num_passes, "sums": [tensor.cpu().clone() for tensor in self._tensors()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self.reset()
        self.num_passes = state["num_passes"]
        for tensor, saved in zip(self._tensors(), state["sums"], strict=True):
            tensor.copy_(saved)

    @torch.no_grad()
    def _sum(self, gradient_of: Gradient) -> None:
        for index, (slots, scores) in enumerate(zip(self._slots, self.layers, strict=True)):
            heads_G, neurons_F = scores.heads_G, scores.neurons_F
            if self._reads_heads:
                new_G = self._of_inputs(slots["attention_output"], len(heads_G), gradient_of)
                heads_G = _added(heads_G, new_G)
            if self._reads_neurons:
                new_F = self._of_inputs(slots["ffn_out"], len(neurons_F), gradient_of)
                inner = ("ffn_in", "ffn_gate") if self.criterion == "taylor" else ()
                paths = [slots[role] for role in inner if role in slots]
                new_F = sum((self._of_outputs(path, gradient_of) for path in paths), start=new_F)
                neurons_F = _added(neurons_F, new_F)
            self.layers[index] = LayerScores(heads_G, neurons_F)
            if self.hidden_D is not None:
                readers = [slots[role] for role in _READERS if role in slots]
                writers = [slots[role] for role in _WRITERS if role in slots]
                parts = [self._of_inputs(path, len(self.hidden_D), gradient_of) for path in readers]
                parts += [self._of_outputs(path, gradient_of) for path in writers]
                for part_D in parts:
                    self.hidden_D = _added(self.hidden_D, part_D)

    def _of_inputs(self, path: str, structures: int, gradient_of: Gradient) -> Tensor:
        """Score equal runs of a linear's inputs, shape ``[structures]``."""
        parameter, are_rows = input_factor(get_module(self.model, path))
        return self._score(parameter, are_rows, structures, gradient_of)

    def _of_outputs(self, path: str, gradient_of: Gradient) -> Tensor:
        parameter, are_rows = output_factor(get_module(self.model, path))
        return self._score(parameter, are_rows, parameter.shape[0 if are_rows else 1], gradient_of)

    def _score(
        self, parameter: nn.Parameter, are_rows: bool, structures: int, gradient_of: Gradient
    ) -> Tensor:
        gradient = gradient_of(parameter)
        if gradient is None:
            return torch.zeros(structures, device=parameter.device)
        weight, gradient = parameter.detach().float(), gradient.detach().float()
        rows = (weight, gradient) if are_rows else (weight.T, gradient.T)
        weight_KX, gradient_KX = (matrix.reshape(structures, -1) for matrix in rows)
        formula = taylor if self.criterion == "taylor" else group_taylor
        return formula(weight_KX, gradient_KX)

    def _read(self, slots: Mapping[str, str]) -> Iterable[nn.Parameter]:
        is_whole = self.hidden_D is not None
        inputs = (
            *(("attention_output",) if self._reads_heads else ()),
            *(("ffn_out",) if self._reads_neurons else ()),
            *(_READERS if is_whole else ()),
        )
        outputs = (
            *(("ffn_in", "ffn_gate") if self._reads_neurons and self.criterion == "taylor" else ()),
            *(_WRITERS if is_whole else ()),
        )
        for roles, factor in ((inputs, input_factor), (outputs, output_factor)):
            for role in roles:
                if role in slots:
                    yield factor(get_module(self.model, slots[role]))[0]

    def _tensors(self) -> Sequence[Tensor]:
        flat = [tensor for scores in self.layers for tensor in (scores.heads_G, scores.neurons_F)]
        return flat if self.hidden_D is None else [*flat, self.hidden_D]


def _added(sum_K: Tensor, new_K: Tensor) -> Tensor:
    """Add, on the device of what is new, unless that is not finite."""
    return sum_K.to(new_K.device) + torch.where(new_K.isfinite().all(), new_K, torch.zeros_like(new_K))


def _base(linear: nn.Module) -> nn.Module:
    return get_module(linear, unwrap_adapter(linear, "").lstrip("."))


def _unknown(linear: nn.Module) -> str:
    return (
        f"{type(linear).__name__} holds its weights in no form that importance can be read from: use nn.Linear, Conv1D "
        "or a factorised linear of this library"
    )

"""What training sees of the rounding: gates on the places that will be quantised, with a strength from 0 to 1.

Gates are hooks: no module is replaced, no parameter added, and the state has the same names as before. At full strength
and without gradients they compute what :mod:`lightning_compress.nn.quantization_plan` will leave, bit for bit. How
single operators are rounded is in :mod:`lightning_compress.nn.rounded_operators`; the next chapter is
:mod:`lightning_compress.losses.block_quantization`.

Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), which do not train; quantisation-aware training is ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.nn.adapters import check_foldable
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.operator_formats import OperatorFormats
from lightning_compress.nn.quantized_attention import BlockAttention
from lightning_compress.nn.rounded_attention import RoundedAttention, attend_in_training
from lightning_compress.nn.rounded_embedding import NarrowEmbedding, rounded_embedding
from lightning_compress.nn.rounded_operators import Ramp, rounded_activation, rounded_linear, rounded_norm
from lightning_compress.nn.rounded_places import Features, features_of, places_in_training
from lightning_compress.nn.surgery import Ledger, get_module, remove_hook, unwrap_adapter
from lightning_compress.nn.width_slimming import WidthGates

__all__ = ["QuantizationGate", "QuantizationGates"]


class QuantizationGate(ABC):
    """A forward hook in whose place something will be quantised; it stays in its place.

    What a module puts out is computed anew while anything of the rounding is seen.

    Args:
        ramp: How much of it is seen.
    """

    follows_module = True

    def __init__(self, ramp: Ramp) -> None:
        self.ramp = ramp
        self.inputs: Features | None = None
        """Of the inputs those that width gates leave; None for all."""
        self.outputs: Features | None = None
        """The same of outputs."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return what the module puts out when it is rounded; None leaves its output as it is."""
        if not self.ramp.is_active:
            return None
        kept = tuple(None if part is None else part.kept() for part in (self.inputs, self.outputs))
        return self.rounded(module, args[0], output, *kept)

    @abstractmethod
    def rounded(
        self, module: Any, x: Tensor, output: Tensor, inputs_K: Tensor | None, outputs_N: Tensor | None
    ) -> Tensor:
        """Return the rounded output."""


class QuantizationGates:
    """The gates of a model, and the strength that they share.

    Args:
        formats: How each operator will be quantised.
        places: Where, as :func:`~lightning_compress.nn.rounded_places.places_in_training` returns it.
    """

    def __init__(self, formats: OperatorFormats, places: Mapping[str, Any]) -> None:
        self.formats, self.places, self.ramp = formats, dict(places), Ramp()
        self._gates: dict[str, QuantizationGate] = {}

    @classmethod
    def install(
        cls, ledger: Ledger, formats: OperatorFormats, exclude: Sequence[str] = (), *, is_trained: bool = True
    ) -> QuantizationGates:
        """Put gates on a model, all of them open: outputs stay the same.

        Args:
            ledger: Whose root is a transformers model of a known family, dense or with what other methods train in it.
            formats: How each operator will be quantised.
            exclude: Patterns over paths that stay as they are.
            is_trained: Whether training is to see the rounding; otherwise places are only looked for.

        Raises:
            ValueError: If something cannot be quantised, or there is nothing to quantise, or there is an adapter around
                a linear that cannot be folded into it.
        """
        model = ledger.root
        gates = cls(formats, places_in_training(model, formats, exclude))
        for path in gates.places["linears"]:
            inner = unwrap_adapter(model, path)
            if inner != path:
                check_foldable(inner, get_module(model, path))
        if is_trained:
            ledger.on_revert(cls.remove_from)
            gates._attach(ledger)
        return gates

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Take all gates off a model; nothing happens where there are none."""
        for module in model.modules():
            if isinstance(getattr(module, "block_attention", None), RoundedAttention):
                module.block_attention = None  # type: ignore[assignment]
            for hook in list(module._forward_hooks.values()):
                if isinstance(hook, QuantizationGate):
                    remove_hook(module, hook)

    def follow(self, model: nn.Module, widths: WidthGates | None) -> None:
        """Leave out of what is rounded whatever width gates have closed; None if there are none."""
        features = {} if widths is None else features_of(model, widths)
        for path, gate in self._gates.items():
            slot, _, part = path.rpartition(".")
            inputs, outputs = features.get(path) or features.get(slot) or (None, None)
            gate.inputs = None if part == "up" else inputs
            gate.outputs = None if part == "down" else outputs
            if isinstance(gate, _Table) and path == describe(model).word_embeddings:
                gate.narrow = self._narrow(widths)

    def _narrow(self, widths: WidthGates | None) -> NarrowEmbedding | None:
        if widths is None or widths.embeddings is None:
            return None
        assert self.formats.embedding is not None
        return NarrowEmbedding(
            widths.embeddings, self.formats.embedding, self.formats.weight, self.formats.input
        )

    def _attach(self, ledger: Ledger) -> None:
        model, formats, ramp = ledger.root, self.formats, self.ramp
        for path in self.places["linears"]:
            assert formats.weight is not None
            self._hook(model, path, _Linear(ramp, formats.weight, formats.input))
        for path in self.places["embeddings"]:
            assert formats.embedding is not None
            self._hook(model, path, _Table(ramp, formats.embedding))
        for path in self.places["norms"]:
            self._hook(model, path, _Norm(ramp))
        for path, function in self.places["activations"].items():
            self._hook(model, path, _Activation(ramp, function))
        if self.places["attention"]:
            attention = BlockAttention(formats.attention, formats.softmax)
            attend_in_training(ledger, self.places["attention"], RoundedAttention(attention, ramp))

    def _hook(self, model: nn.Module, path: str, gate: QuantizationGate) -> None:
        get_module(model, path).register_forward_hook(gate)
        self._gates[path] = gate


class _Linear(QuantizationGate):
    def __init__(self, ramp: Ramp, weight: BlockFormat, inputs: BlockFormat | None) -> None:
        super().__init__(ramp)
        self.formats = weight, inputs

    def rounded(self, module: Any, x: Tensor, output: Tensor, inputs_K: Any, outputs_N: Any) -> Tensor:
        weight, inputs = self.formats
        return rounded_linear(module, x, self.ramp, inputs_K, outputs_N, weight=weight, inputs=inputs)


class _Table(QuantizationGate):
    def __init__(self, ramp: Ramp, form: BlockFormat) -> None:
        super().__init__(ramp)
        self.form = form
        self.narrow: NarrowEmbedding | None = None

    def rounded(self, module: Any, x: Tensor, output: Tensor, inputs_K: Any, outputs_N: Any) -> Tensor:
        return rounded_embedding(module, x, output, self.ramp, outputs_N, form=self.form, narrow=self.narrow)


class _Norm(QuantizationGate):
    def rounded(self, module: Any, x: Tensor, output: Tensor, inputs_K: Any, outputs_N: Any) -> Tensor:
        return rounded_norm(module, x, output, self.ramp, outputs_N)


class _Activation(QuantizationGate):
    def __init__(self, ramp: Ramp, function: str) -> None:
        super().__init__(ramp)
        self.function = function

    def rounded(self, module: Any, x: Tensor, output: Tensor, inputs_K: Any, outputs_N: Any) -> Tensor:
        return rounded_activation(x, output, self.ramp, outputs_N, function=self.function)

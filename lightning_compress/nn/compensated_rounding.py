"""Rounding that knows what a linear is given: the error of each column is made up for by the columns after it.

Weights stay floats here, but such that plain rounding loses nothing more of them: the modules that hold them in few
bits, and all that stores and computes them, need not know. The next chapter is
:mod:`lightning_compress.deploy.quantize`.

Shape legend: N outputs, K inputs, C of them at a time, M rows of inputs; F, G blocks over rows and columns; B batch,
T tokens.

Paper: GPTQ (arXiv 2210.17323), the second-order update of the weights that are left, in its Cholesky form.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.surgery import get_module
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.block_quantize.reference import split_blocks

__all__ = ["compensated_weight", "gather_moments"]

_CHUNK = 128
"""Columns after which the rest of the matrix is told of their errors."""


@torch.no_grad()
def compensated_weight(
    weight_NK: Tensor, moment_KK: Tensor, form: BlockFormat, damping: float = 0.01
) -> Tensor:
    """Return weights that a format holds exactly, and that give nearly the same outputs for the inputs that were seen.

    Column after column is rounded; what that changes in ``X W^T`` is taken back, as far as it can be, by the columns
    that are not rounded yet. Factors stay those of the weights as they are given.

    Args:
        weight_NK: The weights, finite.
        moment_KK: ``X^T X`` over inputs ``X`` of shape ``[M, K]``.
        form: Bits, blocks and kind of factors.
        damping: Share of the mean of the moment's diagonal that is added to it.

    Returns:
        ``[N, K]`` in the dtype of the weights: integers times factors. Rounding it again changes nothing in float32.

    Raises:
        ValueError: If weights (on CPU) or moments are not finite, or the damping is not positive.

    Departs from the paper: the largest element of each block stays, so that the same factors are found again; columns
    are taken in their order; moments are those of the model before anything of it is rounded.

    Paper: GPTQ (arXiv 2210.17323): with ``U`` the upper Cholesky factor of ``(X^T X + damping)^-1``, columns after k
    change by ``-(w_k - q_k) / U_kk * U_k``.

    Example:
        >>> weight_NK, x_MK = torch.tensor([[3.0, 1.4, 1.4]]), torch.ones(1, 3)
        >>> compensated_weight(weight_NK, x_MK.T @ x_MK, BlockFormat(bits=3))  # the sum was 5.8
        tensor([[3., 1., 2.]])
    """
    if not bool(moment_KK.isfinite().all()):
        raise ValueError(
            "moments of the inputs are NaN or infinite: calibrate with batches that the model can read"
        )
    if not damping > 0.0:
        raise ValueError(
            f"damping={damping} is not positive: inputs that depend on each other need some, e.g. 0.01"
        )
    left_NK, upper_KK = weight_NK.float().clone(), _upper_factor(moment_KK, damping)
    step_NK, pinned_NK = _grid(left_NK, form)
    held_NK, num_columns = torch.empty_like(left_NK), left_NK.shape[1]
    for start in range(0, num_columns, _CHUNK):
        stop = min(start + _CHUNK, num_columns)
        error_NC = torch.empty_like(left_NK[:, start:stop])
        for k in range(start, stop):
            divisor_N = torch.where(step_NK[:, k] > 0, step_NK[:, k], 1.0)
            integer_N = (left_NK[:, k] / divisor_N).round().clamp(-form.largest, form.largest)
            held_NK[:, k] = torch.where(pinned_NK[:, k] != 0, pinned_NK[:, k], integer_N) * step_NK[:, k]
            error_NC[:, k - start] = (left_NK[:, k] - held_NK[:, k]) / upper_KK[k, k]
            left_NK[:, k + 1 : stop] -= error_NC[:, k - start, None] * upper_KK[k, k + 1 : stop]
        left_NK[:, stop:] -= error_NC @ upper_KK[start:stop, stop:]
    return held_NK.to(weight_NK.dtype)


def _upper_factor(moment_KK: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse, computed in float64; the identity where no input ever came."""
    mean = moment_KK.diagonal().double().mean()
    moment_KK = moment_KK.double().clone()
    moment_KK.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(moment_KK))
    return torch.linalg.cholesky(inverse_KK, upper=True).float()


def _grid(weight_NK: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Steps of all elements, and the integers of those that have to stay for the same factors to be found again.

    Blocks of zeros have steps of zero: they stay zeros.
    """
    payload_NK, factors = block_quantize(weight_NK, form.bits, form.block, form.factor)
    ones_NK = torch.ones_like(payload_NK)
    amax_FG = split_blocks(weight_NK.abs(), *form.block).amax(dim=(-3, -1))
    amax_NK = block_dequantize(ones_NK, amax_FG, form.block)
    step_NK = torch.where(amax_NK > 0, block_dequantize(ones_NK, factors, form.block), 0.0)
    if form.factor == "shift":  # should a smaller exponent be found, it holds the same numbers
        return step_NK, torch.zeros_like(step_NK)
    return step_NK, (payload_NK * (weight_NK.abs() == amax_NK)).float()


@torch.no_grad()
def gather_moments(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Run a model over batches, and return ``X^T X`` of the inputs of linears, float32 ``[K, K]``, by path.

    Padding does not count: where a batch has some, its texts run one by one, without it. All moments are held at once,
    ``4 K^2`` bytes for each linear.

    Args:
        model: A transformers model; each of its modules is in its mode again afterwards.
        paths: Of the linears.
        batches: What the model is called with, tensors by name; labels and what it does not know are left out. All are
            used. An ``attention_mask`` is ``[B, T]``, zero where padding is.

    Raises:
        TypeError: If a batch is no mapping.
        ValueError: If there is no batch, one holds nothing that the model knows or another kind of mask, a linear did
            not run, or its inputs are not finite.
    """
    if isinstance(batches, Mapping):
        raise TypeError("calibration is one batch: put it into a list, calibration=[batch]")
    moments: dict[str, Tensor] = {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _watched(model, paths, moments):
            for batch in batches:
                for given in _texts(_known(model, batch)):
                    model(**given)
    finally:
        for module, mode in modes.items():
            module.training = mode
    missing = [path for path in paths if path not in moments]
    if missing:
        reason = f"no text came as far as {missing[0]}" if moments else "there is no batch"
        raise ValueError(
            f"calibration saw too little: {reason}. Give more batches, or exclude what does not run"
        )
    unusable = [path for path in paths if not bool(moments[path].isfinite().all())]
    if unusable:
        raise ValueError(
            f"calibration found inputs of {unusable[0]} that are NaN, infinite or too large to be squared: look at the "
            "weights before it and at the batches, or exclude it"
        )
    return moments


def _known(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What of a batch the model is to be called with, where the model is."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a calibration batch is a {type(batch).__name__}: give mappings of what the model is called with, such as "
            "{'input_ids': ..., 'attention_mask': ...}"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    device = next(model.parameters()).device
    given = {
        name: value.to(device)
        for name, value in batch.items()
        if isinstance(value, Tensor) and name != "labels" and (name in names or not names)
    }
    if not given:
        raise ValueError(
            f"a calibration batch holds {sorted(batch)}, of which the model knows no tensor: its inputs are "
            f"{sorted(names)[:8]}"
        )
    mask = batch.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            "attention_mask of a calibration batch is no tensor [B, T]: give one with zeros where padding is, or none"
        )
    return given


def _texts(given: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a batch without padding as it is, and the texts of another one by one, cut to what they are."""
    mask_BT = given.get("attention_mask")
    if mask_BT is None or bool((mask_BT != 0).all()):
        yield given
        return
    for row in range(len(mask_BT)):
        is_text_T = mask_BT[row] != 0
        if bool(is_text_T.any()):
            yield {name: _cut(value, row, is_text_T, mask_BT.shape) for name, value in given.items()}


def _cut(value: Tensor, row: int, is_text_T: Tensor, shape: tuple[int, ...]) -> Tensor:
    if value.shape[:2] == shape:
        return value[row : row + 1, is_text_T]
    return value[row : row + 1] if value.shape[:1] == shape[:1] else value


@contextmanager
def _watched(model: nn.Module, paths: Sequence[str], moments: dict[str, Tensor]) -> Iterator[None]:
    """Add up the inputs of linears while the model runs."""

    def watcher(path: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_MK = args[0].flatten(0, -2).float()
            if len(x_MK):
                moments.setdefault(path, x_MK.new_zeros(2 * x_MK.shape[1:])).addmm_(x_MK.T, x_MK)

        return add

    handles = [get_module(model, path).register_forward_pre_hook(watcher(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

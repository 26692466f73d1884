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
        ValueError: If weights or moments are not finite (weights on CPU).

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
    left_NK, upper_KK = weight_NK.float().clone(), _upper_factor(moment_KK, damping)
    step_NK, pinned_NK = _grid(left_NK, form)
    held_NK, num_columns = torch.empty_like(left_NK), left_NK.shape[1]
    for start in range(0, num_columns, _CHUNK):
        stop = min(start + _CHUNK, num_columns)
        error_NC = torch.empty_like(left_NK[:, start:stop])
        for k in range(start, stop):
            integer_N = (left_NK[:, k] / step_NK[:, k]).round().clamp(-form.largest, form.largest)
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
    """Steps of all elements, and the integers of those that have to stay for the same factors to be found again."""
    payload_NK, factors = block_quantize(weight_NK, form.bits, form.block, form.factor)
    ones_NK = torch.ones_like(payload_NK)
    step_NK = block_dequantize(ones_NK, factors, form.block)
    step_NK = torch.where(step_NK > 0, step_NK, 1.0)
    if form.factor == "shift":  # should a smaller exponent be found, it holds the same numbers
        return step_NK, torch.zeros_like(step_NK)
    amax_FG = split_blocks(weight_NK.abs(), *form.block).amax(dim=(-3, -1))
    is_largest_NK = weight_NK.abs() == block_dequantize(ones_NK, amax_FG, form.block)
    return step_NK, (payload_NK * is_largest_NK).float()


@torch.no_grad()
def gather_moments(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Run a model over batches, and return ``X^T X`` of the inputs of linears, float32 ``[K, K]``, by path.

    Padding does not count. All moments are held at once, ``4 K^2`` bytes for each linear.

    Args:
        model: A transformers model; its mode stays as it was.
        paths: Of the linears.
        batches: What the model is called with; labels and what it does not know are left out. All are used.

    Raises:
        TypeError: If a batch is no mapping.
        ValueError: If there is no batch, or a linear did not run.
    """
    moments: dict[str, Tensor] = {}
    known = set(inspect.signature(model.forward).parameters) - {"labels"}
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"a calibration batch is a {type(batch).__name__}: give mappings of what the model is called "
                    "with, such as {'input_ids': ..., 'attention_mask': ...}"
                )
            given = {
                name: v.to(device) for name, v in batch.items() if name in known and isinstance(v, Tensor)
            }
            with _watched(model, paths, given.get("attention_mask"), moments):
                model(**given)
    finally:
        model.train(was_training)
    missing = [path for path in paths if path not in moments]
    if missing:
        reason = f"no text came as far as {missing[0]}" if moments else "there is no batch"
        raise ValueError(
            f"calibration saw too little: {reason}. Give more batches, or exclude what does not run"
        )
    return moments


@contextmanager
def _watched(
    model: nn.Module, paths: Sequence[str], mask_BT: Tensor | None, moments: dict[str, Tensor]
) -> Iterator[None]:
    """Add up the inputs of linears while a batch runs."""

    def watcher(path: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            is_padded = mask_BT is not None and x.shape[:-1] == mask_BT.shape
            x_MK = (x[mask_BT.bool()] if is_padded else x.flatten(0, -2)).float()  # type: ignore[union-attr]
            moments.setdefault(path, x_MK.new_zeros(2 * x_MK.shape[1:])).addmm_(x_MK.T, x_MK)

        return add

    handles = [get_module(model, path).register_forward_pre_hook(watcher(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

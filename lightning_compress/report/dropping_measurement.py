"""What is measured of dropped tokens for a report: a converted model runs over texts, and each token leaves somewhere.

`callbacks/report.py` asks; `dropping_record` is what it gets.

Shape legend: B sequences, T padded length, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.nn.kept_flops import DroppingCosts
from lightning_compress.report.dropping_record import DialRecord, DroppingRecord, TokenText
from lightning_compress.runtime import PackedEncoder, packed_encoder
from lightning_compress.runtime.dial import sweep_threshold_scale
from lightning_compress.runtime.trial import inputs_of, is_regression, kept_counts

__all__ = ["DroppingMeasurement", "measure_dropping"]

_FAR = 1.4
"""How far from the target a measured ratio is worth a word."""
_SHOWN_TEXTS = 12
_SHORT = 128
"""Texts of at most so many tokens are shown, if there are enough."""
_DIAL = (0.0, 0.5, 1.0, 1.4, 2.0)
"""Settings of the dial, in units of the deployed one."""


class DroppingMeasurement(NamedTuple):
    """What validation texts cost, and what became of their tokens."""

    record: DroppingRecord
    dense_flops: float
    """Of a text, on average, without compression."""
    flops: float
    """Of a text, on average, as its tokens left; every kept token of the last layer counted, as in the target."""

    @property
    def flops_ratio(self) -> float:
        """What a text costs, over what it costs the dense model."""
        return self.flops / self.dense_flops

    def misses(self, target: Mapping[str, Any]) -> list[str]:
        """Return what to say of a model that spends much more or less than its target asks, as the only entry."""
        asked, ratio = target.get("target_flops"), self.flops_ratio
        if asked is None or 1.0 / _FAR < ratio / asked < _FAR:
            return []
        text = (
            f"Asked for {asked:.0%} of the FLOPs, but on validation texts the model spends {ratio:.1%}: train longer, "
            f"or set the dial with choose_threshold_scale(model, batches, target_flops={asked})."
        )
        return [text]


def measure_dropping(
    model: nn.Module, dense: nn.Module, batches: Sequence[Mapping[str, Tensor]], tokenizer: Any = None
) -> DroppingMeasurement | None:
    """Run a converted model over texts and note where each token left; None if it drops none, or there is no text.

    Args:
        model: The transformers model; runs where it is, in evaluation mode, without gradients.
        dense: The dense model, maybe on the meta device; for its costs.
        batches: Keyword arguments of the model, with ``labels`` where known.
        tokenizer: Writes the pieces; without one token ids are shown.
    """
    encoder = packed_encoder(model)
    if encoder is None or encoder.policy is None or not batches:
        return None
    was_training = model.training
    model.eval()
    try:
        passes = [_run(model, encoder, batch) for batch in batches]
    finally:
        model.train(was_training)
    kept_BL, lengths_B = torch.cat([p.kept_BL for p in passes]), torch.cat([p.lengths_B for p in passes])
    dense_BL = lengths_B[:, None].expand_as(kept_BL)
    dense_flops = float(DroppingCosts.of(dense).flops(dense_BL, lengths_B).mean())
    whole = DroppingCosts.of(model, policy_flops_per_token=0, exit_flops=0)
    whole_flops = whole.flops(dense_BL, lengths_B).mean()
    record = DroppingRecord(
        num_texts=len(lengths_B),
        layers=tuple((kept_BL.sum(dim=0) / lengths_B.sum()).tolist()),
        texts=_texts(model, passes, tokenizer),
        scale=_scale_of(encoder) or 1.0,
        metric="correlation" if is_regression(model) else "accuracy",
        curve=_curve(model, encoder, batches, float(whole_flops) / dense_flops),
    )
    flops = float(DroppingCosts.of(model).flops(kept_BL, lengths_B).mean())
    return DroppingMeasurement(record, dense_flops, flops)


class _Pass(NamedTuple):
    """One batch, run, on the CPU."""

    ids_BT: Tensor
    real_BT: Tensor
    entered_BT: Tensor
    """How many layers each token entered."""
    kept_BL: Tensor
    lengths_B: Tensor
    logits_BC: Tensor
    labels_B: Tensor | None


@torch.no_grad()
def _run(model: nn.Module, encoder: PackedEncoder, batch: Mapping[str, Tensor]) -> _Pass:
    logits_BC = model(**inputs_of(model, batch)).logits
    ids_BT, mask_BT = batch["input_ids"], batch.get("attention_mask")
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    entered = torch.zeros(ids_BT.numel(), dtype=torch.long)
    for segments in encoder.latest:
        entered[segments.origin_N.cpu()] += 1
    kept_BL = kept_counts(encoder).cpu()
    labels_B = batch.get("labels")
    return _Pass(
        ids_BT,
        real_BT,
        entered.view_as(ids_BT),
        kept_BL,
        real_BT.sum(dim=1),
        logits_BC.float().cpu(),
        labels_B,
    )


def _texts(model: nn.Module, passes: Sequence[_Pass], tokenizer: Any) -> tuple[TokenText, ...]:
    """Some texts from all over the batches, short ones if there are enough."""
    places = [(p, row) for p in passes for row in range(len(p.lengths_B))]
    short = [(p, row) for p, row in places if p.lengths_B[row] <= _SHORT]
    candidates = short if len(short) >= min(_SHOWN_TEXTS, len(places)) else places
    number = min(_SHOWN_TEXTS, len(candidates))
    chosen = [candidates[index * len(candidates) // number] for index in range(number)]
    return tuple(_text(model, p, row, tokenizer) for p, row in chosen)


def _text(model: nn.Module, seen: _Pass, row: int, tokenizer: Any) -> TokenText:
    real_T = seen.real_BT[row]
    label = None if seen.labels_B is None or seen.labels_B[row].numel() != 1 else seen.labels_B[row].item()
    if is_regression(model):
        words = [
            None if value is None else f"{value:.3g}" for value in (label, seen.logits_BC[row, 0].item())
        ]
    else:
        names: Any = getattr(model.config, "id2label", None) or {}
        words = [
            None if value is None else str(names.get(int(value), int(value)))
            for value in (label, seen.logits_BC[row].argmax().item())
        ]
    return TokenText(
        tokens=tuple(_pieces(tokenizer, seen.ids_BT[row][real_T].tolist())),
        layers=tuple(seen.entered_BT[row][real_T].tolist()),
        label=words[0],
        prediction=words[1],
    )


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Pieces as the tokenizer writes them; of tokenizers over bytes with the bytes read as text."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [str(number) for number in ids]
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    if not any(piece.startswith("Ġ") for piece in pieces):
        return pieces
    special = set(tokenizer.all_special_tokens)
    return [piece if piece in special else _from_bytes(tokenizer, piece) for piece in pieces]


def _from_bytes(tokenizer: Any, piece: str) -> str:
    text = tokenizer.convert_tokens_to_string([piece])
    return f"Ġ{text[1:]}" if text.startswith(" ") else text


def _curve(
    model: nn.Module, encoder: PackedEncoder, batches: Sequence[Mapping[str, Tensor]], share: float
) -> tuple[DialRecord, ...]:
    """Turn the dial; ``share`` is what the model costs with every token kept, over dense."""
    scale, problem = _scale_of(encoder), getattr(model.config, "problem_type", None)
    if not scale or problem == "multi_label_classification" or any("labels" not in b for b in batches):
        return ()
    points = sweep_threshold_scale(model, batches, [factor * scale for factor in _DIAL])
    return tuple(
        DialRecord(scale=point.scale, score=point.score, flops_ratio=share * point.flops_ratio)
        for point in points
        if point.score is not None
    )


def _scale_of(encoder: PackedEncoder) -> float | None:
    scale = getattr(encoder.policy, "scale", None)
    return float(scale) if isinstance(scale, Tensor) else None

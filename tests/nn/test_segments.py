"""Rows of ragged batches, against loops over the sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compress.nn.segments import Segments, segment_max, segment_softmax, segment_sum


def mask(*lengths: int, left: bool = False) -> Tensor:
    places = torch.arange(max(lengths))
    real = places < torch.tensor(lengths)[:, None]
    return real.flip(1) if left else real


BATCHES = {"ragged": mask(3, 1, 5, 2), "one": mask(4), "equal": mask(2, 2), "left": mask(2, 3, left=True)}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def real(request: pytest.FixtureRequest) -> Tensor:
    return request.param


def values(segments: Segments, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(int(n), generator=generator) for n in segments.lengths_B]


def test_rows_of_a_sequence_lie_together_and_know_where_they_came_from(real: Tensor) -> None:
    segments = Segments.of(real)
    batch, width = real.shape
    expected = [(b, b * width + t) for b in range(batch) for t in range(width) if real[b, t]]
    assert list(zip(segments.sequence_N.tolist(), segments.origin_N.tolist(), strict=True)) == expected
    assert segments.offsets == [0, *real.sum(1).cumsum(0).tolist()]
    assert segments.num_rows == int(real.sum()) and segments.num_sequences == batch
    assert segments.firsts_B.tolist() == segments.offsets[:-1]
    assert segments.lengths_B.tolist() == real.sum(1).tolist()


def test_reductions_equal_loops_over_sequences(real: Tensor) -> None:
    segments = Segments.of(real)
    parts = values(segments)
    rows = torch.cat(parts)
    assert torch.equal(segment_max(rows, segments), torch.stack([part.max() for part in parts]))
    assert torch.allclose(segment_sum(rows, segments), torch.stack([part.sum() for part in parts]))
    softmax = torch.cat([part.softmax(0) for part in parts])
    assert torch.allclose(segment_softmax(rows, segments), softmax, atol=1e-7)


def test_gradients_of_the_softmax_stay_within_the_sequence(real: Tensor) -> None:
    segments = Segments.of(real)
    rows = torch.cat(values(segments)).requires_grad_()
    segment_softmax(rows, segments)[0].backward()
    own = segments.sequence_N == 0
    assert (rows.grad[~own] == 0).all()
    assert int(own.sum()) == 1 or (rows.grad[own] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_of_half_precision_is_computed_in_float_and_survives_large_logits(
    dtype: torch.dtype,
) -> None:
    segments = Segments.of(mask(3, 2))
    rows = torch.tensor([60000.0, 59000.0, -60000.0, 5.0, 5.0]).to(dtype)
    shares = segment_softmax(rows, segments)
    assert shares.dtype == torch.float32
    assert torch.allclose(shares, torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5]))


def test_double_precision_is_kept() -> None:
    assert (
        segment_softmax(torch.zeros(3, dtype=torch.float64), Segments.of(mask(2, 1))).dtype == torch.float64
    )


def test_selecting_rows_keeps_where_they_came_from_and_who_is_protected() -> None:
    real, protected = mask(3, 2), torch.tensor([[True, False, True], [True, False, True]])
    segments = Segments.of(real, protected)
    assert segments.protected_N.tolist() == [True, False, True, True, False]
    chosen = segments.select(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3]))
    assert chosen.origin_N.tolist() == [0, 2, 3] and chosen.lengths_B.tolist() == [2, 1]
    assert chosen.protected_N.tolist() == [True, True, True]
    assert Segments.of(real).select(torch.tensor([0, 3]), torch.tensor([0, 1, 2])).protected_N is None


def test_a_sequence_of_padding_alone_is_refused_by_number() -> None:
    real = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match=r"sequences \[1, 2\] of the batch hold no token"):
        Segments.of(real)


def test_an_empty_batch_has_no_rows() -> None:
    segments = Segments.of(torch.zeros(0, 4, dtype=torch.bool))
    assert (segments.num_rows, segments.num_sequences, segments.offsets) == (0, 0, [0])
    assert segment_softmax(torch.zeros(0), segments).shape == (0,)


def test_sequences_that_left_are_counted_only_as_part_of_the_whole_batch() -> None:
    real = mask(3, 1, 5, 2)
    segments = Segments.of(real, real)
    assert segments.examples_B.tolist() == [0, 1, 2, 3] and segments.of_batch(4) is segments
    for stay in ([0, 2], [3], [1, 2, 3], []):
        rows = torch.isin(segments.sequence_N, torch.tensor(stay)).nonzero().squeeze(1)
        lengths = [segments.lengths_B.tolist()[b] if b in stay else 0 for b in range(4)]
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
        left = segments.select(rows, offsets).of_sequences(torch.tensor(stay, dtype=torch.long))
        assert left.num_sequences == len(stay) and left.examples_B.tolist() == stay
        assert left.lengths_B.tolist() == [lengths[b] for b in stay]
        assert left.sequence_N.tolist() == [place for place, b in enumerate(stay) for _ in range(lengths[b])]
        assert left.origin_N.tolist() == segments.origin_N[rows].tolist()
        assert left.protected_N.tolist() == [True] * len(rows)
        assert left.of_batch(4).lengths_B.tolist() == lengths


def test_numbers_of_examples_are_kept_when_others_leave_later_and_when_rows_leave() -> None:
    segments = Segments.of(mask(2, 2, 2))
    later = segments.select(torch.tensor([2, 3, 4, 5]), torch.tensor([0, 0, 2, 4])).of_sequences(
        torch.tensor([1, 2])
    )
    last = later.select(torch.tensor([2]), torch.tensor([0, 0, 1])).of_sequences(torch.tensor([1]))
    assert (last.examples_B.tolist(), last.origin_N.tolist()) == ([2], [4])
    assert last.of_batch(3).lengths_B.tolist() == [0, 0, 1]
    dropped = later.select(torch.tensor([0, 2]), torch.tensor([0, 1, 2]))
    assert (dropped.examples_B.tolist(), dropped.origin_N.tolist()) == ([1, 2], [2, 4])

"""A format says what a matrix costs, and packing loses no integer."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.nn.block_format import BlockFormat, pack_payload, unpack_payload


@pytest.mark.parametrize(
    ("block", "shape", "blocks"),
    [
        ((1, 0), (5, 7), (5, 1)),
        ((0, 0), (5, 7), (1, 1)),
        ((32, 32), (64, 65), (2, 3)),
        ((1, 128), (3, 128), (3, 1)),
        ((2, 3), (0, 7), (0, 3)),
        ((0, 0), (0, 0), (0, 0)),
    ],
)
def test_blocks_cover_the_matrix(block: tuple[int, int], shape: tuple[int, int], blocks: tuple[int, int]):
    assert BlockFormat(block=block).factor_shape(shape) == blocks


def test_the_bits_of_a_matrix_are_those_of_its_bytes():
    # 3 rows of ceil(5 / 2) bytes, and 2 x 2 exponents of a byte
    assert BlockFormat(3, (2, 4), "shift").storage_bits((3, 5)) == 3 * 3 * 8 + 4 * 8
    # 3 rows of 5 bytes, and a float for each
    assert BlockFormat(5, (1, 0), "scale").storage_bits((3, 5)) == 3 * 5 * 8 + 3 * 32
    packed = pack_payload(torch.zeros(3, 5, dtype=torch.int8), 3)
    assert packed.numel() == 9 and packed.dtype == torch.uint8


def test_a_format_survives_json():
    for form in (BlockFormat(), BlockFormat(4, (32, 32), "shift")):
        assert BlockFormat.from_dict(json.loads(json.dumps(form.to_dict()))) == form
    assert BlockFormat.from_dict({"bits": 4}) == BlockFormat(bits=4)
    assert hash(BlockFormat(block=[1, 0])) == hash(BlockFormat())


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"bits": 9}, ValueError, "bits=9 is not from 2 to 8"),
        ({"bits": 1}, ValueError, "bits=1 is not from 2 to 8"),
        ({"bits": 4.0}, TypeError, r"bits=4\.0 and block"),
        ({"block": (1,)}, ValueError, r"block=\(1,\) is not two numbers"),
        ({"block": (1, -1)}, ValueError, r"block=\(1, -1\) is not two numbers of at least 0"),
        ({"block": (1, True)}, TypeError, "have to be integers"),
        ({"factor": "real"}, ValueError, r"factor='real' is not one of \['scale', 'shift'\]"),
        ({"depth": 1}, ValueError, r"no fields \['depth'\]"),
    ],
)
def test_what_is_no_format_is_refused(wrong: dict[str, object], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        BlockFormat.from_dict(wrong)


def test_integers_lie_in_nibbles_as_a_hand_puts_them():
    payload = torch.tensor([[7, -7, 0], [-1, 1, -2]], dtype=torch.int8)
    # lower half first: 7 | 9 << 4, 0;  15 | 1 << 4, 14
    assert pack_payload(payload, 4).tolist() == [[0x97, 0x00], [0x1F, 0x0E]]
    assert pack_payload(payload, 8).tolist() == [[7, 249, 0], [255, 1, 254]]


@given(
    bits=st.integers(2, 8), rows=st.integers(0, 4), columns=st.integers(0, 7), seed=st.integers(0, 1_000_000)
)
def test_what_is_packed_is_unpacked(bits: int, rows: int, columns: int, seed: int):
    largest = BlockFormat(bits).largest
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(-largest, largest + 1, (columns, rows), generator=generator).to(torch.int8).t()
    packed = pack_payload(payload, bits)
    assert packed.numel() * 8 == BlockFormat(bits, (0, 0)).storage_bits((rows, columns)) - (
        32 if rows and columns else 0
    )
    unpacked = unpack_payload(packed, bits, columns)
    assert torch.equal(unpacked, payload) and unpacked.dtype == torch.int8 and unpacked.is_contiguous()


def test_packed_bytes_are_not_the_integers_themselves():
    payload = torch.ones(2, 2, dtype=torch.int8)
    packed = pack_payload(payload, 8)
    unpacked = unpack_payload(packed, 8, 2)
    payload.zero_()
    packed.zero_()
    assert unpacked.tolist() == [[1, 1], [1, 1]]


def test_wrong_integers_are_named():
    payload = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"torch\.int32: give torch\.int8"):
        pack_payload(payload.int(), 4)
    with pytest.raises(ValueError, match=r"shaped \(6,\): give a matrix"):
        pack_payload(payload.flatten(), 4)
    with pytest.raises(ValueError, match="bits=9"):
        pack_payload(payload, 9)
    with pytest.raises(TypeError, match=r"torch\.int8: give torch\.uint8"):
        unpack_payload(payload, 4, 3)
    with pytest.raises(ValueError, match="a row has 2 bytes: 5 columns of 4 bits have 3"):
        unpack_payload(pack_payload(payload, 4), 4, 5)

import doctest
import threading
import time
import warnings

import pytest
import torch

from lightning_compress.runtime import fbgemm_linear
from lightning_compress.runtime.fbgemm_linear import FbgemmProduct, has_fbgemm, prepack
from tests.runtime.toys_engines import weight

needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="no fbgemm here")


@needs_fbgemm
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_integers_are_multiplied_exactly(rows):
    weight_NK, scales_N, _ = weight()
    x_MK = torch.randint(-127, 128, (rows, 32), generator=torch.Generator().manual_seed(0))
    expected = (x_MK @ weight_NK.long().T).double() * scales_N.double()
    found = FbgemmProduct(weight_NK, scales_N)(x_MK.float()).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@needs_fbgemm
def test_numbers_are_rounded_in_units_of_the_scale_and_halves_to_even():
    weight_NK = torch.eye(4, dtype=torch.int8)
    found = FbgemmProduct(weight_NK, torch.ones(4))(torch.tensor([[0.25, 0.75, -0.6, 63.5]]), scale=0.5)
    assert found.tolist() == [[0.0, 1.0, -0.5, 63.5]]


@needs_fbgemm
def test_the_largest_integers_do_not_overflow():
    product = FbgemmProduct(torch.full((1, 64), 127, dtype=torch.int8), torch.ones(1))
    assert product(torch.full((1, 64), 127.0)).item() == 64 * 127 * 127
    assert product(torch.full((1, 64), -127.0)).item() == -64 * 127 * 127


@needs_fbgemm
def test_settings_of_torch_stay_as_they_are_and_nothing_is_said():
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FbgemmProduct(*weight()[:2])
    assert torch.backends.quantized.engine == engine


@needs_fbgemm
@pytest.mark.filterwarnings("error")
def test_threads_lay_weights_out_one_after_the_other_and_leave_settings_of_torch_alone(monkeypatch):
    original, before = fbgemm_linear._quantized_tensor, torch.backends.quantized.engine
    inside: list[int] = []
    together: list[int] = []
    packed: dict[int, object] = {}

    def slow(*args):
        inside.append(1)
        together.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return original(*args)

    monkeypatch.setattr(fbgemm_linear, "_quantized_tensor", slow)
    filters = list(warnings.filters)

    def work(index: int) -> None:
        packed[index] = prepack(("fbgemm", "onednn")[index % 2], *weight()[:2], None)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 6 and len(packed) == 6
    assert torch.backends.quantized.engine == before and warnings.filters == filters


def test_a_build_without_it_is_told(monkeypatch):
    monkeypatch.setattr(fbgemm_linear, "has_fbgemm", lambda: False)
    with pytest.raises(RuntimeError, match="no fbgemm"):
        FbgemmProduct(*weight()[:2])
    assert doctest.testmod(fbgemm_linear).failed == 0

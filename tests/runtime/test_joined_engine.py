import threading
import time

import pytest
import torch
from torch import nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.runtime.joined_engine import JoinedEngine, PartEngine, joined_engine
from lightning_compress.runtime.linear_backends import build_engine


def three() -> list[QuantizedLinear]:
    torch.manual_seed(0)
    layers = [
        QuantizedLinear.from_linear(nn.Linear(8, size), BlockFormat(), BlockFormat()) for size in (4, 2, 3)
    ]
    joined = JoinedEngine(build_engine("fp32", layers), [4, 2, 3])
    for place, layer in enumerate(layers):
        layer.engine = PartEngine(joined, place, lambda layer=layer: build_engine("fp32", layer))
    return layers


def test_one_product_gives_what_the_layers_give():
    layers, x = three(), torch.randn(5, 8)
    with torch.no_grad():
        joined = joined_engine(layers)
        assert joined is not None
        for found, layer in zip(joined(x), layers, strict=True):
            torch.testing.assert_close(found, nn.functional.linear(x, layer.dequantized_weight(), layer.bias))
            torch.testing.assert_close(layer(x), found)


def test_the_engine_of_a_layer_alone_is_built_when_first_needed_and_once_for_all_threads():
    built: list[int] = []

    def build():
        built.append(1)
        time.sleep(0.01)
        return lambda x: 2 * x

    part = PartEngine(JoinedEngine(lambda x: x, [1]), 0, build)
    assert built == []
    threads = [threading.Thread(target=part, args=(torch.ones(1, 1),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert part(torch.ones(1, 1)).item() == 2.0 and built == [1]


def test_layers_run_on_their_own_while_gradients_are_on():
    layers = three()
    with torch.enable_grad():
        assert joined_engine(layers) is None


@pytest.mark.parametrize("change", ["order", "engine", "hook", "plain"])
def test_layers_that_do_not_belong_together_run_on_their_own(change):
    layers: list[nn.Module] = list(three())
    if change == "order":
        layers = layers[::-1]
    elif change == "engine":
        layers[1] = three()[1]
    elif change == "hook":
        layers[2].register_forward_hook(lambda *_: None)
    else:
        layers[0] = nn.Linear(8, 4)
    with torch.no_grad():
        assert joined_engine(layers) is None

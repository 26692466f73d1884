import copy

import pytest
import torch
from torch import nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.operator_formats import preset
from lightning_compress.nn.quantization_plan import quantize_model
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.soft_threshold_rank import LowRankLinear
from lightning_compress.nn.surgery import get_module, replace_module
from lightning_compress.runtime.block import LeanLayer
from tests.runtime.conftest import FAMILIES

ROWS = [7, 1, 4]


def block_of(model: nn.Module, index: int = 1) -> tuple[LeanLayer, nn.Module]:
    anatomy = describe(model).layers[index]
    layer = get_module(model, anatomy.path)
    return LeanLayer(layer, anatomy), layer


def inputs() -> tuple[torch.Tensor, Segments]:
    generator = torch.Generator().manual_seed(5)
    segments = Segments.of(torch.arange(max(ROWS)) < torch.tensor(ROWS)[:, None])
    return torch.randn(sum(ROWS), 32, generator=generator, dtype=torch.float64), segments


def one_by_one(layer: nn.Module, hidden_ND: torch.Tensor, segments: Segments) -> torch.Tensor:
    return torch.cat([layer(rows[None])[0] for rows in hidden_ND.split(segments.lengths_B.tolist())])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_block_equals_the_familys_own_layer(classifier, family, context):
    block, layer = block_of(classifier(family))
    hidden_ND, segments = inputs()
    with context():
        torch.testing.assert_close(
            block(hidden_ND, segments), one_by_one(layer, hidden_ND, segments), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_single_queries_give_the_rows_that_all_queries_give(classifier, family, context):
    block, _ = block_of(classifier(family))
    hidden_ND, segments = inputs()
    with context():
        everything = block(hidden_ND, segments)
        firsts = block(hidden_ND, segments, segments.firsts_B)
    assert firsts.shape == (3, 32)
    torch.testing.assert_close(firsts, everything[segments.firsts_B], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_spare_rows_are_carried_along_and_seen_by_nobody(classifier, context):
    block, _ = block_of(classifier("bert"))
    hidden_ND, segments = inputs()
    spare = torch.full((4, 32), 100.0, dtype=torch.float64)
    with context():
        found = block(torch.cat([hidden_ND, spare]), segments)
        assert found.shape == (16, 32)
        torch.testing.assert_close(found[:12], block(hidden_ND, segments), rtol=1e-12, atol=1e-12)
        firsts = block(torch.cat([hidden_ND, spare]), segments, segments.firsts_B)
        torch.testing.assert_close(
            firsts, block(hidden_ND, segments, segments.firsts_B), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_alone_skip_the_attention_and_stay_equal(classifier, family):
    block, layer = block_of(classifier(family))
    hidden_ND, _ = inputs()
    segments = Segments.of(torch.ones(12, 1, dtype=torch.bool))
    with torch.no_grad():
        expected = one_by_one(layer, hidden_ND, segments)
        torch.testing.assert_close(block(hidden_ND, segments), expected, rtol=1e-10, atol=1e-10)
        firsts = block(hidden_ND, segments, segments.firsts_B)
    torch.testing.assert_close(firsts, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_were_replaced_after_the_block_was_built_run_as_what_they_are(classifier, family):
    model = classifier(family)
    block, layer = block_of(model)
    hidden_ND, segments = inputs()
    with torch.no_grad():
        before = block(hidden_ND, segments)
        for slot in describe(model).layers[1].linears:
            if slot.role in ("key", "ffn_in"):
                size = get_module(model, slot.path).out_features
                replace_module(
                    model, slot.path, LowRankLinear(nn.Linear(32, 2, bias=False), nn.Linear(2, size)).double()
                )
        after = block(hidden_ND, segments)
        torch.testing.assert_close(after, one_by_one(layer, hidden_ND, segments), rtol=1e-10, atol=1e-10)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "operators", [("softmax",), ("linear", "attention", "softmax", "activation", "norm")]
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_a_quantised_layer_attends_in_integers_as_the_familys_own_code_does(
    classifier, family, operators, context
):
    model = classifier(family)
    block, layer = block_of(model)
    hidden_ND, segments = inputs()
    with context():
        exact = block(hidden_ND, segments)
        quantize_model(model, preset("w8a8", factor="shift", operators=operators))
        found = block(hidden_ND, segments)
        torch.testing.assert_close(found, one_by_one(layer, hidden_ND, segments), rtol=0.0, atol=1e-6)
        firsts = block(hidden_ND, segments, segments.firsts_B)
        torch.testing.assert_close(firsts, found[segments.firsts_B], rtol=0.0, atol=1e-6)
        assert 0.0 < (found - exact).abs().max() < 1.0


def test_a_quantised_layer_attends_in_integers_to_rows_that_are_alone_and_to_padded_ones(classifier):
    model = classifier("bert")
    block, layer = block_of(model)
    quantize_model(model, preset("w8a8", factor="shift", operators=("attention", "softmax")))
    hidden_ND, _ = inputs()
    alone = Segments.of(torch.ones(12, 1, dtype=torch.bool))
    with torch.no_grad():
        expected = one_by_one(layer, hidden_ND, alone)
        torch.testing.assert_close(block(hidden_ND, alone), expected, rtol=0.0, atol=1e-6)
        for rows, seen in ((12, torch.ones(12, 1)), (1, torch.ones(1, 12)), (2, torch.ones(2, 6))):
            padded = block.padded(hidden_ND.unflatten(0, (rows, -1)), seen.bool())
            own = layer(hidden_ND.unflatten(0, (rows, -1)))
            torch.testing.assert_close(padded, own, rtol=0.0, atol=1e-6)


def test_fewer_heads_are_seen_as_they_are(classifier):
    model = classifier("bert")
    block, layer = block_of(model)
    hidden_ND, segments = inputs()
    for slot in describe(model).layers[1].linears[:3]:
        replace_module(model, slot.path, nn.Linear(32, 16).double())
    replace_module(model, describe(model).layers[1].linears[3].path, nn.Linear(16, 32).double())
    with torch.no_grad():
        torch.testing.assert_close(block(hidden_ND, segments), one_by_one(layer, hidden_ND, segments))


def test_query_key_and_value_run_as_one_product_only_while_nobody_wants_their_gradients(
    classifier, monkeypatch
):
    block, _ = block_of(classifier("bert"))
    hidden_ND, segments = inputs()
    widths: list[int] = []
    linear = nn.functional.linear

    def counted(rows, weight, bias=None):
        widths.append(weight.shape[0])
        return linear(rows, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    with torch.no_grad():
        block(hidden_ND, segments)
    assert widths == [96, 32, 48, 32]
    widths.clear()
    block(hidden_ND, segments)
    assert widths == [32, 32, 32, 32, 48, 32]
    widths.clear()
    with torch.no_grad():
        block(hidden_ND, segments, segments.firsts_B)
    assert widths == [64, 32, 32, 48, 32]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropouts_apply_where_and_when_the_family_applies_them(classifier, family):
    model = classifier(family)
    block, layer = block_of(model)
    anatomy = describe(model).layers[1]
    hidden_ND, segments = inputs()
    exact = block(hidden_ND, segments)
    for path in (anatomy.attention_dropout, anatomy.output_dropout, anatomy.ffn_dropout):
        if path is None:
            continue
        dropout = get_module(model, path)
        dropout.p = 0.5
        dropout.train()
        assert not torch.equal(block(hidden_ND, segments), exact)
        dropout.p = 0.0
        torch.testing.assert_close(block(hidden_ND, segments), exact)
    layer.train()
    torch.testing.assert_close(block(hidden_ND, segments), exact)


@pytest.mark.parametrize("name", ["output_dropout", "ffn_dropout"])
def test_hidden_dropouts_take_the_same_draws_as_the_familys_own_layer(classifier, name):
    model = classifier("bert")
    block, layer = block_of(model)
    path = getattr(describe(model).layers[1], name)
    get_module(model, path).train()
    hidden_ND, _ = inputs()
    segments = Segments.of(torch.ones(1, 12, dtype=torch.bool))
    torch.manual_seed(3)
    expected = layer(hidden_ND[None])[0]
    torch.manual_seed(3)
    torch.testing.assert_close(block(hidden_ND, segments), expected, rtol=1e-10, atol=1e-10)


def test_gradients_reach_every_parameter_as_in_the_familys_own_layer(classifier):
    block, layer = block_of(classifier("bert"))
    hidden_ND, segments = inputs()
    one_by_one(layer, hidden_ND, segments).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    block(hidden_ND, segments).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9)


def test_autocast_computes_in_its_own_precision(classifier):
    block, layer = block_of(classifier("bert").float())
    hidden_ND, segments = inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(hidden_ND.float(), segments)
        torch.testing.assert_close(
            found, one_by_one(layer, hidden_ND.float(), segments), rtol=0.05, atol=0.05
        )


def test_hooks_on_the_parts_run(classifier):
    model = classifier("bert")
    block, layer = block_of(model)
    seen: list[tuple[int, ...]] = []
    layer.intermediate.dense.register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    block(*inputs())
    assert seen == [(12, 48)]


def test_a_copy_runs_the_copys_parts(classifier):
    model = classifier("bert")
    holder = nn.ModuleDict({"model": model})
    holder.block = block_of(model)[0]
    hidden_ND, segments = inputs()
    with torch.no_grad():
        before = holder.block(hidden_ND, segments)
        twin = copy.deepcopy(holder)
        twin["model"].bert.encoder.layer[1].attention.self.value.weight.zero_()
        assert torch.equal(holder.block(hidden_ND, segments), before)
        assert not torch.equal(twin.block(hidden_ND, segments), before)


def test_a_layer_without_an_activation_module_is_refused(tiny):
    model = tiny("bert", "BertModel")
    del model.encoder.layer[0].intermediate.intermediate_act_fn
    with pytest.raises(ValueError, match=r"encoder\.layer\.0.*activation"):
        block_of(model, 0)

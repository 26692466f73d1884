"""Backends of whole models: what is chosen, what it changes, and what must stay as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.surgery import get_module, replace_module
from lightning_compress.runtime import backends, int8_linear, pack, packed_encoder, unpack
from lightning_compress.runtime.backends import check_backend, use_backend
from lightning_compress.runtime.engine_timing import BackendReport
from lightning_compress.runtime.int8_linear import has_int8_kernels
from lightning_compress.runtime.joined_engine import PartEngine
from tests.runtime.conftest import FAMILIES, ragged

NAMES = ["fp32", "bf16", *(["int8"] if has_int8_kernels() else [])]
BATCH = ragged([7, 1, 4])


def quantized(
    model: nn.Module, inputs: BlockFormat | None = None, paths: list[str] | None = None
) -> nn.Module:
    """Put the linears of all layers into 8 bits, in place."""
    for layer in describe(model).layers:
        for slot in layer.linears:
            if paths is None or slot.path in paths:
                linear = get_module(model, slot.path)
                held = QuantizedLinear.from_linear(linear, BlockFormat(), inputs or BlockFormat())
                replace_module(model, slot.path, held)
    return model.eval()


@pytest.fixture
def bert(classifier):
    return quantized(classifier("bert").float())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).norm() < tolerance * expected.norm()
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_reference(classifier, family, name, packed):
    model = quantized(classifier(family).float())
    expected = logits(model)
    if packed:
        pack(model)
    report = use_backend(model, name, verbose=False)
    assert set(report.choices.values()) == {name}
    close(logits(model), expected, 1e-4 if name == "int8" else 0.03)


@pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
def test_query_key_and_value_are_one_product_of_a_packed_model_and_alone_for_single_queries(
    bert, monkeypatch
):
    model = pack(bert)
    sizes: list[int] = []
    operator = torch.ops.onednn.qlinear_pointwise.default

    def counted(*args):
        sizes.append(args[4].shape[0])
        return operator(*args)

    monkeypatch.setattr(int8_linear, "has_fbgemm", lambda: False)
    use_backend(model, "int8", verbose=False)
    monkeypatch.setattr(torch.ops.onednn.qlinear_pointwise, "default", counted)
    logits(model)
    # two layers; in the last one only the first token of each text queries
    assert sizes == [96, 32, 48, 32, 32, 32, 32, 32, 48, 32]


def test_gradients_go_by_the_reference(bert):
    inputs = torch.randn(3, 32)
    linear = bert.bert.encoder.layer[0].intermediate.dense
    expected = linear(inputs)
    use_backend(bert, "bf16", verbose=False)
    found = linear(inputs.requires_grad_())
    assert torch.equal(found, expected)
    found.sum().backward()
    assert inputs.grad is not None and linear.bias.grad is not None
    with torch.no_grad():
        assert not torch.equal(linear(inputs), expected)


def test_nothing_is_saved(bert):
    before = bert.state_dict()
    use_backend(bert, "fp32", verbose=False)
    logits(bert)
    after = bert.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float32),
        lambda model: model.load_state_dict(model.state_dict()) and model,
        lambda model: use_backend(model, "reference", verbose=False) and model,
    ],
    ids=["copy", "pickle", "cast", "load", "reference"],
)
def test_other_weights_go_back_to_the_reference(bert, change):
    model = pack(bert)
    expected = logits(model)
    use_backend(model, "bf16", bf16_states=True, verbose=False)
    close(logits(model), expected, 0.05)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(change(model)), expected)


def test_replicas_on_other_devices_go_back_to_the_reference(bert):
    model = pack(bert)
    use_backend(model, "bf16", bf16_states=True, verbose=False)
    encoder = packed_encoder(model)
    # what nn.DataParallel makes of each module
    assert encoder._replicate_for_data_parallel().states is None
    assert encoder.layer[0].output.dense._replicate_for_data_parallel().engine is None
    assert encoder.states == torch.bfloat16


def test_layers_can_stay_with_the_reference_by_name_and_all_choices_can_be_given_again(bert):
    reference = use_backend(bert, "reference", verbose=False).choices
    before = logits(bert)
    assert set(reference.values()) == {"reference"}
    assert use_backend(bert, reference, verbose=False).choices == reference
    assert torch.equal(logits(bert), before)
    some = dict.fromkeys(reference, "reference") | dict.fromkeys(list(reference)[:2], "bf16")
    use_backend(bert, some, verbose=False)
    engines = [
        part.engine is not None for _, part in bert.named_modules() if isinstance(part, QuantizedLinear)
    ]
    assert sum(engines) == 2 and all(engines[:2])
    close(logits(bert), before, 0.05)


def test_a_copy_leaves_the_engines_of_the_model_alone(bert):
    use_backend(bert, "bf16", verbose=False)
    fast = logits(bert)
    copy.deepcopy(bert)
    assert torch.equal(logits(bert), fast)


def test_the_fastest_of_those_that_can_is_chosen_for_each_shape(bert, monkeypatch, capsys):
    asked: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = []
    numbers: set[int] = set()

    def told(engines, num_inputs, rows, like):
        asked.append((num_inputs, tuple(engines), tuple(rows)))
        numbers.update(len(layers) for layers in engines.values())
        best = "fp32" if num_inputs == 48 else "bf16"
        return {name: tuple(1.0 if name == best else 2.0 for _ in rows) for name in engines}

    monkeypatch.setattr(backends, "time_engines", told)
    report = use_backend(pack(bert), "auto", batch_tokens=(3, 5))
    assert {(inputs, rows) for inputs, _, rows in asked} == {(32, (3, 5)), (48, (3, 5))}
    assert numbers == {2}  # one of each layer
    assert len(asked) == 4  # query, key and value as one; attention output; both of the FFN
    assert all(names == tuple(n for n in ("int8", "bf16", "fp32") if n in NAMES) for _, names, _ in asked)
    assert {path: name for path, name in report.choices.items() if name == "fp32"} == {
        f"bert.encoder.layer.{index}.output.dense": "fp32" for index in range(2)
    }
    assert [timing.num_outputs for timing in report.timings] == [96, 32, 48, 32]
    assert capsys.readouterr().out == f"{report}\n"


def test_only_what_runs_together_is_timed_together(bert, tiny, monkeypatch):
    monkeypatch.setattr(backends, "time_engines", lambda engines, *_: dict.fromkeys(engines, (1.0,)))

    def sizes(model: nn.Module) -> list[int]:
        report = use_backend(model, "auto", batch_tokens=(2,), verbose=False)
        return [timing.num_outputs for timing in report.timings]

    decoder = quantized(tiny("llama", "LlamaModel").float())
    for model, expected in ((bert, [32, 48, 32]), (decoder, [32, 16, 48, 32])):
        assert sizes(model) == expected
        parts = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
        assert not any(isinstance(part.engine, PartEngine) for part in parts)
    assert sizes(pack(bert)) == [96, 32, 48, 32]
    assert isinstance(bert.bert.encoder.layer[0].attention.self.query.engine, PartEngine)


@pytest.mark.parametrize(("block", "first"), [((1, 0), ("int8",)), ((16, 16), ()), ((1, 16), ())])
def test_on_cuda_triton_is_measured_with_the_others(block, first, monkeypatch):
    asked: list[tuple[str, ...]] = []

    def told(engines, num_inputs, rows, like):
        asked.append(tuple(engines))
        assert like.device.type == "cuda"
        return {name: (1.0 if name == "triton" else 2.0,) for name in engines}

    monkeypatch.setattr(backends, "time_engines", told)
    monkeypatch.setattr(backends, "build_engine", lambda name, *_, **__: lambda x: name)
    formats = BlockFormat(block=block), BlockFormat(block=(1, block[1]))
    with FakeTensorMode():  # needs no GPU
        model = nn.Sequential(QuantizedLinear(32, 32, *formats, device="cuda"))
        report = use_backend(model, "auto", batch_tokens=(2,), verbose=False)
    assert asked == [(*first, "triton", "bf16", "fp32")]
    assert report.choices == {"0": "triton"}
    with torch.no_grad():
        assert model(torch.empty(1, 32)) == "triton"


def test_what_was_chosen_once_can_be_chosen_again_without_measuring(bert, monkeypatch):
    use = use_backend(bert, "auto", batch_tokens=(2,), verbose=False)
    monkeypatch.setattr(backends, "time_engines", None)
    again = use_backend(bert, use.choices, verbose=False)
    assert again.choices == use.choices and again.timings == []


@pytest.mark.parametrize("has_amx", [True, False])
def test_a_report_brings_the_dtype_of_states_back_and_choices_alone_do_not(bert, monkeypatch, has_amx):
    monkeypatch.setattr(backends, "_has_amx", lambda: has_amx)
    model = pack(bert)
    report = use_backend(model, "auto", batch_tokens=(2,), verbose=False)
    fast = logits(model)
    assert report.states == (torch.bfloat16 if has_amx else None)
    for had_amx in (True, False):
        monkeypatch.setattr(backends, "_has_amx", lambda had_amx=had_amx: had_amx)
        again = use_backend(model, report, verbose=False)
        assert (again.choices, again.states, again.timings) == (report.choices, report.states, [])
        assert packed_encoder(model).states == report.states
        assert torch.equal(logits(model), fast)
    assert use_backend(model, report.choices, verbose=False).states is None
    assert use_backend(model, report, bf16_states=False, verbose=False).states is None


@pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
def test_a_report_remembers_one_factor_for_all_rows():
    torch.manual_seed(0)
    model = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(8, 8), BlockFormat(), BlockFormat()))
    x = torch.randn(3, 8) * torch.tensor([[1.0], [10.0], [0.1]])
    with torch.inference_mode():
        report = use_backend(model, "int8", one_factor=True, verbose=False)
        assert report.one_factor and "int8 for 1; one factor for all rows" in str(report)
        found = model(x)
        assert use_backend(model, report, verbose=False).one_factor and torch.equal(model(x), found)
        assert not use_backend(model, report.choices, verbose=False).one_factor
        assert not torch.equal(model(x), found)
        assert not use_backend(model, report, one_factor=False, verbose=False).one_factor


def test_a_report_is_refused_where_its_states_cannot_be(bert):
    report = use_backend(pack(bert), "fp32", bf16_states=True, verbose=False)
    with pytest.raises(ValueError, match=r"call pack\(model\) first"):
        use_backend(unpack(bert), report, verbose=False)
    assert use_backend(bert, report, bf16_states=False, verbose=False).states is None


def test_layers_that_integers_cannot_do_get_another_backend(bert):
    model = bert
    path = "bert.encoder.layer.1.output.dense"
    linear = nn.Linear(48, 32)
    replace_module(model, path, QuantizedLinear.from_linear(linear, BlockFormat(block=(16, 16))))
    report = use_backend(model, "auto", batch_tokens=(2,), verbose=False)
    assert report.choices[path] in ("bf16", "fp32")


def test_what_runs_together_is_built_when_it_is_chosen(bert, monkeypatch):
    built: list[int] = []
    build = backends.build_engine

    def counted(name, parts, **kwargs):
        built.append(1 if isinstance(parts, QuantizedLinear) else len(parts))
        return build(name, parts, **kwargs)

    monkeypatch.setattr(backends, "build_engine", counted)
    use_backend(pack(bert), "fp32", verbose=False)
    assert sorted(built) == [1] * 6 + [3] * 2  # in two layers query, key and value, and three others
    logits(bert)
    # only in the last layer some run alone: there one token of each text queries
    assert sorted(built) == [1] * 9 + [3] * 2


def test_projections_with_different_backends_run_on_their_own(bert):
    model = pack(bert)
    expected = logits(model)
    choices = use_backend(model, "fp32", verbose=False).choices
    choices["bert.encoder.layer.0.attention.self.key"] = "bf16"
    use_backend(model, choices, verbose=False)
    layers = model.bert.encoder.layer
    assert not isinstance(layers[0].attention.self.query.engine, PartEngine)
    assert isinstance(layers[1].attention.self.query.engine, PartEngine)
    close(logits(model), expected, 0.03)


def test_states_are_bfloat16_between_operators_and_come_out_as_they_went_in(bert):
    model = pack(bert)
    expected = logits(model)
    report = use_backend(model, "bf16", bf16_states=True, verbose=False)
    assert report.states == torch.bfloat16
    seen: list[torch.dtype] = []
    norm = model.bert.encoder.layer[0].output.LayerNorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    close(logits(model), expected, 0.05)
    assert seen == [torch.bfloat16]
    model(**BATCH)
    assert seen == [torch.bfloat16, torch.float32]  # gradients are on
    handle.remove()


@pytest.mark.parametrize("has_amx", [True, False])
def test_states_are_bfloat16_by_themselves_where_the_processor_is_made_for_it(bert, monkeypatch, has_amx):
    monkeypatch.setattr(backends, "_has_amx", lambda: has_amx)
    model = pack(bert)
    expected = torch.bfloat16 if has_amx else None
    assert use_backend(model, "auto", batch_tokens=(2,), verbose=False).states == expected
    assert use_backend(model, "auto", batch_tokens=(2,), bf16_states=False, verbose=False).states is None
    assert use_backend(model, "fp32", verbose=False).states is None
    assert packed_encoder(model).states is None


def test_linears_that_stay_dense_keep_the_states_as_they_are(classifier, monkeypatch):
    monkeypatch.setattr(backends, "_has_amx", lambda: True)
    model = classifier("bert").float()
    model = pack(quantized(model, paths=["bert.encoder.layer.0.output.dense"]))
    assert use_backend(model, "auto", batch_tokens=(2,), verbose=False).states is None
    with pytest.raises(ValueError, match=r"not quantised.*query"):
        use_backend(model, "bf16", bf16_states=True, verbose=False)


def test_states_of_a_model_that_is_not_packed_are_refused(bert):
    with pytest.raises(ValueError, match=r"call pack\(model\) first"):
        use_backend(bert, "bf16", bf16_states=True, verbose=False)


def test_a_model_without_quantised_linears_is_refused(classifier):
    with pytest.raises(ValueError, match=r"no quantised linear: call lightning_compress\.quantize"):
        use_backend(classifier("bert"), "fp32")


def test_a_backend_that_cannot_is_refused_with_the_layer_and_nothing_changes(bert):
    expected = logits(bert)
    with pytest.raises(ValueError, match=r"'nf4' cannot compute 'bert\..*multiples of 64"):
        use_backend(bert, "nf4")
    assert torch.equal(logits(bert), expected)
    with pytest.raises(ValueError, match="'int5' is not one of"):
        use_backend(bert, "int5")
    with pytest.raises(ValueError, match="other layers than there are"):
        use_backend(bert, {"classifier": "fp32"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": {"classifier": "fp32"}},
        {"backend": "nf4"},
        {"backend": "int5"},
        {"batch_tokens": (0,)},
    ],
    ids=str,
)
def test_what_is_refused_leaves_engines_and_states_as_they_were(bert, wrong):
    model = pack(bert)
    use_backend(model, "bf16", bf16_states=True, verbose=False)
    fast = logits(model)
    with pytest.raises(ValueError):
        use_backend(model, **wrong)
    assert packed_encoder(model).states == torch.bfloat16
    assert torch.equal(logits(model), fast)
    model.bert.encoder.layer[0].output.dense = nn.Linear(48, 32)
    with pytest.raises(ValueError, match="not quantised"):
        use_backend(model, "fp32", bf16_states=True)
    assert packed_encoder(model).states == torch.bfloat16
    assert model.bert.encoder.layer[1].output.dense.engine is not None


@pytest.mark.parametrize("failing", ["time_engines", "build_engine"])
def test_what_fails_on_the_way_leaves_the_reference(bert, failing, monkeypatch):
    model = pack(bert)
    before = logits(model)
    use_backend(model, "bf16", bf16_states=True, verbose=False)
    original, calls = getattr(backends, failing), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(backends, failing, fail)
    with pytest.raises(MemoryError):
        use_backend(model, "auto" if failing == "time_engines" else "fp32", batch_tokens=(2,), verbose=False)
    assert packed_encoder(model).states is None
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("wrong", [(), (0,), (-1,), (8, "a"), (1.5,), (True,), 8])
def test_numbers_of_rows_that_are_none_are_refused(bert, wrong):
    with pytest.raises(ValueError, match=r"batch_tokens=.* whole numbers from 1.*such as \(16, 128\)"):
        use_backend(bert, "auto", batch_tokens=wrong)


def test_any_module_with_quantised_linears_will_do():
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantizedLinear.from_linear(nn.Linear(8, 8), BlockFormat(), BlockFormat()), nn.ReLU()
    )
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
        assert use_backend(model, "bf16", verbose=False).choices == {"0": "bf16"}
        close(model(x), expected, 0.03)


def test_names_are_known_before_there_is_a_model():
    for known in ("auto", "reference", "nf4", {"a": "bf16", "b": "reference"}, BackendReport({"a": "fp32"})):
        check_backend(known)
    for unknown in ("int5", {"a": "bf16", "b": "auto"}, BackendReport({"a": "int5"})):
        with pytest.raises(ValueError, match="is not one of"):
            check_backend(unknown)

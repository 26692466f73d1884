from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from lightning_compress import load, pack, plan_of, quantize, save_pretrained
from lightning_compress.callbacks import BlockQuantization, MultiExit, SoftThresholdRank, WidthSlimming
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.surgery import get_module
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer

IDS = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 3]])


@torch.no_grad()
def answer(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def quantised_layers(model: nn.Module) -> int:
    return sum(isinstance(module, QuantizedLinear) for module in model.modules())


def weight_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_one_call_quantises_a_dense_model_which_opens_again(tmp_path: Path) -> None:
    model = tiny_bert(vocab_size=500)
    before = answer(model)
    model.save_pretrained(tmp_path / "dense")
    assert quantize(model, "w4a8", operators="all") is model
    assert 0.0 < float((answer(model) - before).abs().max()) < 0.02
    save_pretrained(model, tmp_path / "small")
    for again in (
        load(tmp_path / "small"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "small"),
    ):
        assert torch.equal(answer(again), answer(model)) and quantised_layers(again) == 12
    assert weight_bytes(tmp_path / "small") < 0.5 * weight_bytes(tmp_path / "dense")


@pytest.mark.parametrize(
    "method",
    [
        lambda: SoftThresholdRank(target_params=0.5, rank_multiple=4),
        lambda: WidthSlimming(heads=2, ffn=0.5, embedding_rank=12),
        lambda: MultiExit(threshold=0.68, dropout=0.0),
    ],
    ids=["ranks", "widths", "exits"],
)
def test_what_another_method_left_is_quantised_and_saved_with_both_in_its_plan(
    method: Any, tmp_path: Path
) -> None:
    module = ToyModule()
    callback = method()
    toy_trainer(callbacks=[callback]).fit(module, toy_loader())
    save_pretrained(module, tmp_path / "first")
    for model in (load(tmp_path / "first"), module):
        before = answer(getattr(model, "model", model))
        quantize(model)  # type: ignore[type-var]
        after = answer(getattr(model, "model", model))
        assert 0.0 < float((after - before).abs().max()) < 0.05
        plan = plan_of(model)  # type: ignore[arg-type]
        assert plan is not None and plan.is_converted
        assert [record.method for record in plan.methods] == [callback.config.stem, "block_quantization"]
        save_pretrained(model, tmp_path / "second")  # type: ignore[arg-type]
        assert torch.equal(answer(load(tmp_path / "second")), after)


@pytest.mark.parametrize("operators", ["linear", ("linear", "attention"), ("linear", "softmax"), "all"])
def test_what_is_excluded_stays_dense_whatever_else_is_quantised(operators: Any) -> None:
    model = quantize(tiny_bert(), operators=operators, exclude=["*.query", "*.value"])
    attention = model.bert.encoder.layer[1].attention.self
    kinds = [type(part) for part in (attention.query, attention.key, attention.value)]
    assert kinds == [nn.Linear, QuantizedLinear, nn.Linear] and quantised_layers(model) == 8


@pytest.mark.parametrize("operators", [("linear", "attention"), "all"])
def test_what_is_excluded_of_a_decoder_stays_dense_too(operators: Any) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    llama = LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    quantize(llama, operators=operators, exclude=["*.q_proj"])
    assert {type(layer.self_attn.q_proj) for layer in llama.layers} == {nn.Linear}
    assert quantised_layers(llama) == 2 * 6


def test_a_packed_model_is_quantised_where_it_is() -> None:
    model, twin = pack(tiny_bert()), tiny_bert()
    for each in (model, twin):
        quantize(each, operators="all", factor="shift")
    assert torch.allclose(answer(model), answer(twin), atol=1e-5)
    assert torch.equal(answer(model), answer(pack(twin)))


def test_a_model_is_quantised_once() -> None:
    model = quantize(tiny_bert())
    with pytest.raises(ValueError, match="compressed before, by block_quantization"):
        quantize(model, "w4a8")


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    model = tiny_bert()
    before, names = answer(model), list(model.state_dict())
    for settings in (
        {"exclude": ["*.conv"]},
        {"block": (1, 8), "bits": {"input": 1}},
        {"operators": "pooler"},
    ):
        with pytest.raises(ValueError, match=r"match nothing|bits=1|operators="):
            quantize(model, **settings)  # type: ignore[arg-type]
    table = model.bert.embeddings.word_embeddings.weight.data
    kept, table[3, 0] = table[3, 0].clone(), torch.inf
    with pytest.raises(ValueError, match="word_embeddings holds NaN or infinities"):
        quantize(model)
    table[3, 0] = kept
    assert list(model.state_dict()) == names and torch.equal(answer(model), before) and plan_of(model) is None


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(3, 20, (8, 6), generator=generator), "labels": torch.zeros(8).long()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("block", ["row", (1, 8), (4, 4)], ids=str)
def test_with_calibration_outputs_of_linears_are_nearer(block: Any, tmp_path: Path) -> None:
    dense, plain, calibrated = (tiny_bert(initializer_range=0.3).eval() for _ in range(3))
    quantize(plain, "w4a8", block=block, operators=["linear"])
    quantize(calibrated, "w4a8", block=block, operators=["linear"], calibration=iter(texts(4)))
    with torch.no_grad():
        truth, *found = (
            torch.cat([model(input_ids=batch["input_ids"]).logits for batch in texts(4)])
            for model in (dense, plain, calibrated)
        )
    assert (found[1] - truth).norm() < 0.9 * (found[0] - truth).norm()
    assert plan_of(calibrated) == plan_of(plain)
    save_pretrained(calibrated, tmp_path)
    assert torch.equal(answer(load(tmp_path)), answer(calibrated))


GPT2 = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=20, n_positions=16)
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
)


def test_calibration_is_for_what_is_quantised_of_any_family() -> None:
    for model in (GPT2LMHeadModel(GPT2).eval(), LlamaForCausalLM(LLAMA).eval()):
        batches = [{"input_ids": batch["input_ids"]} for batch in texts(2)]
        excluded = describe(model).linears[0].path
        before, plain = get_module(model, excluded).weight.detach().clone(), copy.deepcopy(model)
        with torch.no_grad():
            truth = model(**batches[0]).logits
            quantize(plain, "w4a8", exclude=[excluded], operators=["linear"])
            quantize(model, "w4a8", exclude=[excluded], operators=["linear"], calibration=batches)
            errors = [float((part(**batches[0]).logits - truth).norm()) for part in (model, plain)]
        assert errors[0] < 0.95 * errors[1]
        assert torch.equal(get_module(model, excluded).weight, before)


def test_calibration_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = tiny_bert().eval()
    before = answer(model)
    nan = [{"inputs_embeds": torch.full((1, 3, 32), torch.nan)}]
    for settings, message in (
        ({"calibration": []}, "there is no batch"),
        ({"calibration": nan}, r"inputs of bert.encoder.layer.0.* NaN, infinite or too large"),
        ({"calibration": texts(1), "operators": ["embedding"]}, r"operators=\['embedding'\] leave them"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, "w4a8", **settings)  # type: ignore[arg-type]
        assert torch.equal(answer(model), before) and plan_of(model) is None
    quantize(model, "w4a8", calibration=texts(1))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_calibration_wants_adapters_merged() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"adapter around .*query.*merge_and_unload"):
        quantize(model, "w4a8", calibration=texts(1))
    quantize(model.merge_and_unload(), "w4a8", calibration=texts(1))


def test_what_is_not_finite_can_be_excluded() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    before = repr(model)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense holds NaN"):
        quantize(model)
    assert repr(model) == before and plan_of(model) is None
    assert quantised_layers(quantize(model, exclude=["*.1.output.dense"])) == 11


def test_a_module_in_training_form_is_refused() -> None:
    module = ToyModule()
    toy_trainer(callbacks=[SoftThresholdRank(target_params=0.5, rank_multiple=4, convert=False)]).fit(
        module, toy_loader()
    )
    with pytest.raises(ValueError, match="training form \\(it has a SoftThresholdLinear\\)"):
        quantize(module)


@pytest.mark.parametrize(
    ("operators", "kind"), [("linear", "QuantizationGate"), ("softmax", "RoundedAttention")], ids=str
)
def test_a_module_that_trains_for_its_rounding_is_refused(operators: str, kind: str) -> None:
    module = ToyModule()
    bits = BlockQuantization(operators=operators, start=0.0, convert=False)
    toy_trainer(callbacks=[bits]).fit(module, toy_loader())
    with pytest.raises(ValueError, match=f"training form \\(it has a {kind}\\)"):
        quantize(module)

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.compressor import Compressor
from lightning_compress.methods import config_from_dict
from lightning_compress.methods.block_quantization import (
    BlockQuantizationConfig,
    BlockQuantizationHandle,
    convert,
    prepare,
    restore,
    update,
)
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.teacher import snapshot
from lightning_compress.methods.width_slimming import WidthSlimmingConfig
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.operator_formats import OPERATORS
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedEmbedding
from lightning_compress.nn.surgery import get_module
from lightning_compress.plan import PlanError
from tests.toys import ToyTexts, tiny_bert
from tests.toys_training import training_steps

QUERY = "bert.encoder.layer.0.attention.self.query"


def batch() -> dict[str, Tensor]:
    rows = [ToyTexts()[i] for i in range(8)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return model.eval()(batch()["input_ids"]).logits


def prepared(**settings: Any) -> BlockQuantizationHandle:
    handle = prepare(tiny_bert(), BlockQuantizationConfig(**settings))
    handle.meet({})
    return handle


def test_words_become_formats() -> None:
    formats = BlockQuantizationConfig().formats
    assert formats.weight == formats.input == formats.embedding == BlockFormat(8, (1, 0), "scale")
    assert formats.operators == ("linear", "embedding")
    words: Any = {"block": [32, 16], "operators": ["norm", "linear"], "bits": {"input": 6, "weight": 3}}
    config = BlockQuantizationConfig(preset="w4a8", factor="shift", **words)
    assert config.formats.weight == BlockFormat(3, (32, 16), "shift")
    assert config.formats.input == BlockFormat(6, (1, 16), "shift")
    assert config.operators == config.formats.operators == ("linear", "norm")
    assert config.bits == ("input=6", "weight=3")


def test_the_same_choice_in_other_words_is_the_same_config() -> None:
    words: Any = {"operators": "all", "bits": "weight=4", "exclude": "*query", "block": [1, 8]}
    spelled: Any = {
        "operators": OPERATORS[::-1],
        "bits": {"weight": 4},
        "exclude": ["*query"],
        "block": (1, 8),
    }
    one, other = BlockQuantizationConfig(**words), BlockQuantizationConfig(**spelled)
    assert one == other and hash(one) == hash(other)
    assert config_from_dict(BlockQuantizationConfig, one.to_dict()) == one
    assert BlockQuantizationConfig(preset="w8", operators="all").operators == ("linear", "embedding")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"preset": "w2a2"}, "preset='w2a2' is not one of"),
        ({"block": (32,)}, "neither 'row' nor"),
        ({"block": "rows"}, "block='rows' is neither 'row' nor"),
        ({"block": 3}, "block=3 is neither 'row' nor"),
        ({"block": (1.5, 2)}, "neither 'row' nor"),
        ({"block": (1, -1)}, "at least 0"),
        ({"factor": "power"}, "factor='power'"),
        ({"operators": ("linear", "pooler")}, "operators=\\['linear', 'pooler'\\]"),
        ({"operators": ()}, "operators=\\[\\]"),
        ({"preset": "w8", "operators": ("softmax",)}, "preset 'w8'"),
        ({"bits": ("weight",)}, "bits='weight' is no name and number"),
        ({"bits": {"weight": 9}}, "bits=9 is not from 2 to 8"),
        ({"bits": {"table": 4}}, "bits for \\['table'\\]"),
        ({"bits": {"weight": 4.5}}, "bits of 'weight' are 4.5: give a whole number from 2 to 8"),
        ({"bits": {"weight": True}}, "bits of 'weight' are True"),
        ({"bits": {"weight": "four"}}, "bits of 'weight' are 'four'"),
        ({"bits": ["weight=4", "weight=8"]}, "names something twice"),
        ({"bits": 9}, "bits=9 is no list of words"),
        ({"exclude": None}, "exclude=None is no list of words"),
        ({"operators": None}, "operators=None is no list of words"),
        ({"start": 1.5}, "start=1.5 is outside"),
        ({"start": 0.5, "ramp_end": 0.4}, "ramp_end=0.4 is outside \\[start=0.5, 1\\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockQuantizationConfig(**settings)


def test_without_a_start_training_sees_nothing_and_conversion_rounds() -> None:
    handle = prepared()
    for progress in (0.0, 0.5, 1.0):
        update(handle, progress)
        assert torch.equal(answer(handle.model), answer(tiny_bert()))
    assert handle.is_on_target and not any(m._forward_hooks for m in handle.model.modules())
    structure = convert(handle)
    assert len(structure["linears"]) == 12 and len(structure["embeddings"]) == 3 and "merged" not in structure
    assert isinstance(get_module(handle.model, QUERY), QuantizedLinear)
    assert 0.0 < float((answer(handle.model) - answer(tiny_bert())).abs().max()) < 0.01


def test_the_strength_ramps_from_start_to_ramp_end() -> None:
    handle, seen = prepared(start=0.25, ramp_end=0.75), []
    for progress in (0.0, 0.2, 0.25, 0.5, 0.75, 1.0):
        update(handle, progress)
        seen.append((handle.phase, handle.metrics()["strength"], handle.is_on_target))
    assert seen == [
        ("float", 0.0, False),
        ("float", 0.0, False),
        ("ramp", 0.0, False),
        ("ramp", 0.5, False),
        ("rounded", 1.0, True),
        ("rounded", 1.0, True),
    ]
    assert BlockQuantizationConfig(start=0.5).full_at == 0.75
    step = prepared(start=0.5, ramp_end=0.5)
    update(step, 0.49)
    assert step.phase == "float"
    update(step, 0.5)
    assert step.phase == "rounded"


def test_the_state_is_phase_and_strength() -> None:
    handle, other = prepared(start=0.0, ramp_end=1.0), prepared(start=0.0, ramp_end=1.0)
    update(handle, 0.3)
    other.load_state_dict(handle.state_dict())
    assert other.state_dict() == handle.state_dict() and other.phase == "ramp"
    assert torch.equal(answer(other.model), answer(handle.model))


def test_training_that_sees_the_rounding_makes_good_what_it_costs() -> None:
    losses = {}
    for start in (0.5, 1.0):
        config = BlockQuantizationConfig(bits=("weight=2",), start=start, ramp_end=start)
        compressor = Compressor(tiny_bert(initializer_range=0.2), [config])
        compressor.prepare()
        list(training_steps(compressor, lambda _: batch(), 30))
        before = float(compressor.model(**batch()).loss.detach())
        compressor.convert()
        losses[start] = before, float(compressor.model(**batch()).loss.detach())
    assert losses[0.5][0] == losses[0.5][1] < 0.1 < losses[1.0][1] and losses[1.0][0] < 0.1, losses


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("block", ["row", (1, 8), (8, 8), (0, 0)])
def test_a_slim_model_of_learned_ranks_is_evaluated_as_it_will_be_quantised(block: Any, factor: Any) -> None:
    configs = [
        WidthSlimmingConfig(heads=2, ffn=0.5, embedding_rank=12),
        SoftThresholdRankConfig(target_params=0.5, rank_multiple=4),
        BlockQuantizationConfig(block=block, factor=factor, operators=OPERATORS, start=0.2, ramp_end=0.5),
    ]
    compressor = Compressor(tiny_bert(), configs)
    compressor.prepare()
    list(training_steps(compressor, lambda _: batch(), 10))
    evaluated = answer(compressor.model)
    plan = compressor.convert()
    assert torch.allclose(answer(compressor.model), evaluated, atol=1e-5)
    structure = plan.methods[-1].structure
    assert f"{QUERY}.down" in structure["linears"] or QUERY in structure["linears"]
    assert "bert.embeddings.word_embeddings.table" in structure["embeddings"]


def test_what_is_excluded_stays_so_when_its_rank_is_learned() -> None:
    configs = [
        SoftThresholdRankConfig(target_params=0.5, rank_multiple=4),
        BlockQuantizationConfig(exclude=("*.layer.0.*query", "*token_type_embeddings"), start=0.2),
    ]
    compressor = Compressor(tiny_bert(), configs)
    compressor.prepare()
    list(training_steps(compressor, lambda _: batch(), 6))
    compressor.convert()
    held = {
        name
        for name, m in compressor.model.named_modules()
        if isinstance(m, QuantizedLinear | QuantizedEmbedding)
    }
    assert not any(name.startswith(QUERY) for name in held) and len(held) >= 11 + 2
    assert "bert.embeddings.token_type_embeddings" not in held


def test_a_model_that_becomes_its_own_teacher_teaches_without_rounding() -> None:
    handle = prepared(operators=("all",), start=0.0, ramp_end=0.0)
    update(handle, 0.0)
    teacher = snapshot(handle.model)
    assert torch.allclose(answer(teacher), answer(tiny_bert()), atol=1e-6)
    assert not torch.allclose(answer(handle.model), answer(teacher), atol=1e-6)


def test_what_cannot_be_quantised_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="match nothing"):
        prepared(exclude=("*.conv",))
    handle = prepared()
    convert(handle)
    with pytest.raises(ValueError, match="quantised already"):
        prepare(handle.model, BlockQuantizationConfig())


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default"])
def test_training_that_diverged_is_noticed_before_anything_is_rounded(part: str) -> None:
    handle = prepare(adapted(), BlockQuantizationConfig())
    before = repr(handle.model)
    weight = handle.model.get_submodule(f"{QUERY}.{part}").weight
    weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=f"{QUERY} holds NaN"):
        convert(handle)
    assert (
        repr(handle.model) == before
        and int(handle.model.state_dict()[f"{QUERY}.{part}.weight"].isnan().sum()) == 1
    )


@pytest.mark.parametrize("merged", ["query", ["pooler"], [1]])
def test_a_plan_that_merges_what_it_does_not_list_is_refused(merged: Any) -> None:
    structure = convert(prepared())
    with pytest.raises(PlanError, match="merged"):
        restore(tiny_bert(), {**structure, "merged": merged})


class Lora(nn.Module):
    """Stands for peft's LoRA layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.active_adapters = base_layer, ["default"]
        sizes = self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(sizes[0], 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, sizes[1], bias=False)})
        self.scaling, self.merged, self.disable_adapters = {"default": 0.5}, False, False

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * low


def adapted() -> Any:
    model: Any = tiny_bert()
    torch.manual_seed(1)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = Lora(attention.query)
    return model


@pytest.mark.parametrize(
    "others", [[], [SoftThresholdRankConfig(target_params=0.5, rank_multiple=4)]], ids=len
)
def test_adapters_are_rounded_with_the_weights_and_folded_in(others: list[Any]) -> None:
    compressor = Compressor(adapted(), [*others, BlockQuantizationConfig(start=0.2, ramp_end=0.4)])
    compressor.prepare()
    query = get_module(compressor.model, QUERY)
    list(training_steps(compressor, lambda _: batch(), 8))
    assert all(p.grad is None or p.grad.any() for p in query.parameters())
    evaluated = answer(compressor.model)
    plan = compressor.convert()
    assert torch.allclose(answer(compressor.model), evaluated, atol=1e-5)
    assert not any("lora" in name for name, _ in compressor.model.named_modules())
    assert plan.methods[-1].structure.get("merged", []) == ([] if others else [QUERY])


def test_a_plan_with_folded_adapters_is_restored_on_adapted_and_on_plain_models() -> None:
    handle = prepare(adapted(), BlockQuantizationConfig())
    structure = convert(handle)
    assert structure["merged"] == [QUERY]
    for fresh in (adapted(), tiny_bert(seed=3)):
        names = list(fresh.state_dict())
        ledger = restore(fresh, structure)
        fresh.load_state_dict(handle.model.state_dict())
        assert torch.equal(answer(fresh), answer(handle.model))
        ledger.revert()
        assert list(fresh.state_dict()) == names


def test_adapters_that_cannot_be_folded_are_refused_before_training() -> None:
    model = adapted()
    model.get_submodule(QUERY).merged = True
    with pytest.raises(ValueError, match="unmerge_adapter"):
        prepare(model, BlockQuantizationConfig())

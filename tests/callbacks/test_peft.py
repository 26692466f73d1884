"""LoRA on the model: the adapters train beside frozen factors, and are folded in by conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_compress import save_pretrained
from lightning_compress.callbacks import CompressionMixin, SoftThresholdRank, convert
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft's

DENSE = count_parameters(tiny_bert()).linear


class Adapted(CompressionMixin, ToyModule):
    """The user's module with LoRA on its model; the head is trained in full, as peft does for this task."""

    def __init__(self, build_in: str = "init", output: str = "tensor", **lora: Any) -> None:
        self.lora = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], **lora}
        super().__init__(build_in, output)

    def _build(self) -> None:
        self.model = get_peft_model(tiny_bert(), LoraConfig(**self.lora))  # type: ignore[assignment,arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def ranks(**settings: Any) -> SoftThresholdRank:
    return SoftThresholdRank(**{"target_params": 0.5, "rank_multiple": 4, **settings})


def fit(module: ToyModule, **settings: Any) -> ToyModule:
    toy_trainer(callbacks=[ranks(**settings)], max_steps=8).fit(module, toy_loader())
    return module.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(next(iter(toy_loader(16, 16)))["input_ids"]).logits


def test_only_adapters_head_and_thresholds_train() -> None:
    module = Adapted()
    dense = module.model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.clone()
    fit(module, convert=False)
    trained = {
        name.split(".")[-2 if ".lora" not in name else -3]
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    layers = {name: m for name, m in module.named_modules() if isinstance(m, SoftThresholdLinear)}
    assert len(layers) == 12
    assert all(not layer.u_OM.requires_grad and not layer.sigma_M.requires_grad for layer in layers.values())
    assert {"lora_A", "lora_B"} <= trained
    query = module.model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert float(query.lora_B["default"].weight.detach().abs().max()) > 0
    full = query.base_layer.u_OM * query.base_layer.sigma_M @ query.base_layer.v_MI
    assert torch.allclose(full, dense, atol=1e-4)


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"r": 2, "lora_alpha": 32}], ids=str
)
def test_conversion_folds_adapters_in_and_keeps_the_outputs(lora: dict[str, Any]) -> None:
    module = fit(Adapted(**lora), convert=False)
    before = logits(module.model)
    plan = convert(module)
    assert torch.allclose(logits(module.model), before, atol=1e-5)
    encoder = module.model.base_model.model.bert.encoder
    assert not any("lora" in name for name, _ in encoder.named_modules())
    paths = [*plan.methods[0].structure["ranks"], *plan.methods[0].structure.get("merged", ())]
    assert paths and not any("base_layer" in path or "base_model" in path for path in paths)
    assert count_parameters(module.model.base_model.model).linear <= 0.5 * DENSE


def test_a_converted_model_is_merged_saved_and_opened_as_a_plain_one(tmp_path: Path) -> None:
    module = fit(
        Adapted(), target_params=0.6, exclude=("*.layer.1.attention.self.value", "*.layer.0.output.dense")
    )
    before = logits(module.model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_pretrained(module, tmp_path / "model")
    plain = module.model.merge_and_unload()
    assert torch.allclose(logits(plain), before, atol=1e-5)
    save_pretrained(plain, tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(plain))
    assert any(isinstance(m, LowRankLinear) for m in again.modules())


def test_checkpoints_of_both_forms_restore_an_adapted_model(tmp_path: Path) -> None:
    module = Adapted()
    trainer = toy_trainer(callbacks=[ranks(convert=False)], max_steps=8)
    trainer.fit(module, toy_loader())
    trainer.save_checkpoint(tmp_path / "training.ckpt")
    convert(module)
    trainer.save_checkpoint(tmp_path / "converted.ckpt")
    converted = logits(module.eval().model)
    for form in ("training", "converted", "training"):
        trainer.test(module, toy_loader(8), ckpt_path=tmp_path / f"{form}.ckpt", verbose=False)
        assert any(isinstance(m, SoftThresholdLinear) for m in module.modules()) == (form == "training")
        assert torch.allclose(logits(module.eval().model), converted, atol=1e-5)
    fresh = Adapted.load_from_checkpoint(tmp_path / "converted.ckpt", weights_only=True).eval()
    assert torch.equal(logits(fresh.model), converted)


def test_the_budget_counts_the_rank_of_folded_adapters() -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        fit(Adapted(r=16), target_params=0.3)
    fit(Adapted(r=2), target_params=0.3)


def test_adapters_on_transposed_linears_are_folded_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0.0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)

    class Decoder(Adapted):
        def _build(self) -> None:
            self.model = get_peft_model(GPT2LMHeadModel(config), lora)  # type: ignore[assignment,arg-type]

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    module = fit(Decoder(), target_params=0.6, convert=False)
    before = logits(module.model)
    plan = convert(module)
    assert plan.methods[0].structure["ranks"]
    assert torch.allclose(logits(module.model), before, atol=1e-5)
    assert not any("lora" in name for name, _ in module.named_modules())


@pytest.mark.parametrize(
    ("lora", "reason"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias")],
    ids=["DoRA", "bias"],
)
def test_adapters_that_are_no_plain_product_are_refused_before_training(
    lora: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        fit(Adapted(**lora))


def test_merged_adapters_are_refused_before_training() -> None:
    module = Adapted()
    module.model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        fit(module)


def test_wrappers_that_are_not_lora_are_refused_before_training() -> None:
    class Other(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.in_features, self.out_features = base_layer, 32, 32

    module = ToyModule()
    attention = module.model.bert.encoder.layer[0].attention.self
    attention.query = Other(attention.query)
    with pytest.raises(ValueError, match="is not LoRA"):
        fit(module)

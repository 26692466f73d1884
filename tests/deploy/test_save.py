from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BertTokenizer, PreTrainedModel

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, detach_plan, load, plan_of, save_pretrained
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig

Logits = Callable[[PreTrainedModel], Tensor]
Builders = dict[str, Callable[[], PreTrainedModel]]


def prepared(model: PreTrainedModel) -> Compressor:
    compressor = Compressor(model, [SoftThresholdRankConfig(target_params=0.5, rank_multiple=1, init="svd")])
    compressor.prepare()
    return compressor


def artefact(folder: Path) -> tuple[str, bytes]:
    return (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()


def test_every_family_gives_an_equal_artefact_in_every_generation(
    compressed: PreTrainedModel, tmp_path: Path, logits: Logits
) -> None:
    first = artefact(save_pretrained(compressed, tmp_path / "ours"))
    compressed.save_pretrained(tmp_path / "host")
    assert artefact(tmp_path / "host") == first
    loaded = load(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "second")
    assert artefact(tmp_path / "second") == first
    assert artefact(save_pretrained(loaded, tmp_path / "third")) == first
    assert torch.equal(logits(load(tmp_path / "second")), logits(compressed))


def test_only_safetensors_and_readable_text_are_on_disk(bert: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    folder = save_pretrained(bert, tmp_path / "model", BertTokenizer(str(tmp_path / "vocab.txt")))
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md", ".txt"}
    for path in folder.glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)


def test_the_plan_is_in_the_configuration_and_the_small_tensors_in_the_file(
    bert: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save_pretrained(bert, tmp_path / "model")
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    plan = plan_of(bert)
    assert plan is not None
    assert entry == {"quant_method": "lightning_compress", "root": "model", "plan": plan.to_dict()}
    (path, rank), *_ = plan.methods[0].structure["ranks"].items()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.get_slice(f"{path}.down.weight").get_shape()[0] == rank


def test_a_model_inside_a_module_and_a_compiled_one_are_found(
    bert: PreTrainedModel, tmp_path: Path, logits: Logits
) -> None:
    holder = nn.ModuleDict({"net": bert, "metric": nn.Identity()})
    compiled = torch.compile(bert)
    assert isinstance(compiled, nn.Module)
    for name, module in (("holder", holder), ("compiled", compiled)):
        assert plan_of(module) == plan_of(bert)
        assert torch.equal(logits(load(save_pretrained(module, tmp_path / name))), logits(bert))


def test_a_copy_carries_the_plan_and_detaching_takes_it_off(bert: PreTrainedModel, tmp_path: Path) -> None:
    copied = copy.deepcopy(bert)
    assert plan_of(copied) == plan_of(bert)
    detach_plan(copied)
    detach_plan(copied)
    assert plan_of(copied) is None
    assert not hasattr(copied.config, "quantization_config")
    assert plan_of(bert) is not None


def test_a_dense_model_has_no_plan_and_is_refused(build: Builders, tmp_path: Path) -> None:
    dense = build["bert"]()
    assert plan_of(dense) is None
    with pytest.raises(ValueError, match=r"carries no compression plan.*lightning_compress.convert"):
        save_pretrained(dense, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_training_form_is_refused_with_and_without_its_plan(
    build: Builders, tmp_path: Path
) -> None:
    model = build["bert"]()
    compressor = prepared(model)
    with pytest.raises(ValueError, match=r"lightning_compress.convert\(module\)"):
        save_pretrained(model, tmp_path / "model")
    attach_plan(model, compressor.plan)
    with pytest.raises(ValueError, match=r"lightning_compress.convert\(module\)"):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "host")
    assert list(tmp_path.iterdir()) == []


def test_a_structure_that_left_its_plan_is_refused(
    build: Builders, bert: PreTrainedModel, tmp_path: Path
) -> None:
    again = build["bert"]()
    plan = plan_of(bert)
    assert plan is not None
    attach_plan(again, plan)
    with pytest.raises(ValueError, match="tensors do not fit the model's plan"):
        save_pretrained(again, tmp_path / "model")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_adapters_have_to_be_merged_first(bert: PreTrainedModel, tmp_path: Path) -> None:
    adapted = get_peft_model(bert, LoraConfig(r=2, target_modules=["classifier"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_pretrained(adapted, tmp_path / "model")
    merged = adapted.merge_and_unload()  # type: ignore[operator]
    assert plan_of(load(save_pretrained(merged, tmp_path / "model"))) == plan_of(bert)


def test_saving_leaves_the_random_state_and_the_mode_alone(bert: PreTrainedModel, tmp_path: Path) -> None:
    bert.train()
    state = torch.get_rng_state()
    save_pretrained(bert, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert bert.training


def test_a_failure_in_mid_save_leaves_the_old_model(
    bert: PreTrainedModel, tmp_path: Path, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = save_pretrained(bert, tmp_path / "model"), logits(bert)
    with torch.no_grad():
        bert.classifier.bias.add_(1.0)  # type: ignore[union-attr, operator]
    monkeypatch.setattr("lightning_compress.deploy.save.model_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(bert, folder)
    assert torch.equal(logits(load(folder)), before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    save_pretrained(bert, folder)
    assert torch.equal(logits(load(folder)), before + 1.0)


def test_the_model_replaces_sharded_weights_and_keeps_other_files(
    bert: PreTrainedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    bert.save_pretrained(folder, max_shard_size="20KB")
    (folder / "notes.txt").write_text("mine")
    save_pretrained(bert, folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert load(folder).num_labels == 3


def test_bad_measurements_are_refused_before_anything_is_written(
    bert: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="lacks"):
        save_pretrained(bert, tmp_path / "model", measurements={"rows": [{"accuracy": 0.9}]})
    assert list(tmp_path.iterdir()) == []

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    pipeline,
)

from lightning_compress.deploy import load, plan_of, quantize, save_pretrained
from lightning_compress.deploy.load import CompressionConfig, CompressionQuantizer, register
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.soft_threshold_rank import LowRankLinear
from lightning_compress.plan import PlanError
from lightning_compress.runtime.backends import use_backend

load_module = importlib.import_module("lightning_compress.deploy.load")  # the package exports the function

Logits = Callable[[PreTrainedModel], Tensor]
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def saved(bert: PreTrainedModel, tmp_path: Path) -> Path:
    return save_pretrained(bert, tmp_path / "model")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_ranks(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_config(
        folder, lambda c: change(c["quantization_config"]["plan"]["methods"][0]["structure"]["ranks"])
    )


def test_every_family_gives_the_same_bits_after_loading(
    compressed: PreTrainedModel, tmp_path: Path, logits: Logits
) -> None:
    save_pretrained(compressed, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert type(loaded) is type(compressed)
    assert not loaded.training
    assert sum(isinstance(module, LowRankLinear) for module in loaded.modules()) > 0
    assert torch.equal(logits(loaded), logits(compressed))
    assert plan_of(loaded) == plan_of(compressed)


def test_the_auto_class_opens_the_model(bert: PreTrainedModel, saved: Path, logits: Logits) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert torch.equal(logits(loaded), logits(bert))


def test_a_process_without_lightning_opens_the_model(
    bert: PreTrainedModel, saved: Path, logits: Logits
) -> None:
    script = (
        "import sys, json, torch, lightning_compress\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(saved)!r})\n"
        "tokens = torch.arange(2, 18).view(2, 8)\n"
        "with torch.no_grad():\n"
        "    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits\n"
        "hosts = [m for m in ('lightning', 'pytorch_lightning') if m in sys.modules]\n"
        "print(json.dumps({'hosts': hosts, 'logits': logits.double().tolist()}))\n"
    )
    root = Path(str(load_module.__file__)).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["hosts"] == []
    torch.testing.assert_close(torch.tensor(printed["logits"]), logits(bert), check_dtype=False)


def test_a_text_classification_pipeline_opens_the_folder(bert: PreTrainedModel, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    folder = save_pretrained(bert, tmp_path / "model", tokenizer)
    (answer,) = pipeline("text-classification", model=str(folder), device="cpu")("good film")
    with torch.no_grad():
        scores = bert(**tokenizer("good film", return_tensors="pt")).logits.softmax(-1)
    assert answer["label"] == f"LABEL_{int(scores.argmax())}"
    assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_the_requested_dtype_and_device_are_used(saved: Path) -> None:
    loaded = load(saved, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in load(saved, device="meta").parameters()} == {"meta"}


def test_a_model_saved_in_half_precision_comes_back_in_it(bert: PreTrainedModel, tmp_path: Path) -> None:
    folder = save_pretrained(bert.to(torch.bfloat16), tmp_path / "model")
    assert {p.dtype for p in load(folder).parameters()} == {torch.bfloat16}


def test_a_loaded_model_can_be_cast_like_a_plain_one(saved: Path) -> None:
    loaded = load(saved)
    assert not loaded.is_quantized
    assert {p.dtype for p in loaded.half().parameters()} == {torch.float16}
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.to(torch.float64).parameters()} == {torch.float64}


def test_fine_tuning_goes_on_and_reaches_every_parameter(saved: Path) -> None:
    model = load(saved).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens, labels = torch.arange(2, 18).view(2, 8), torch.tensor([0, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = model(input_ids=tokens, labels=labels).loss
    first.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    assert not torch.equal(before[f"{QUERY}.down.weight"], model.get_parameter(f"{QUERY}.down.weight"))
    assert model.eval()(input_ids=tokens, labels=labels).loss < first


def test_the_base_model_opens_from_a_folder_with_a_head_and_back(
    bert: PreTrainedModel, saved: Path, tmp_path: Path
) -> None:
    base = AutoModel.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    query = base.get_parameter("encoder.layer.0.attention.self.query.down.weight")
    assert torch.equal(query, bert.get_parameter(f"{QUERY}.down.weight").bfloat16())
    save_pretrained(base, tmp_path / "base")
    headed = BertForTokenClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(headed.get_parameter(f"{QUERY}.down.weight"), query)
    save_pretrained(headed, tmp_path / "headed")
    assert plan_of(load(tmp_path / "headed")) == plan_of(bert)


def test_every_family_opens_as_a_bare_base_model(compressed: PreTrainedModel, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(save_pretrained(compressed, tmp_path / "model"))
    trained = compressed.base_model.state_dict()
    shared = [name for name in base.state_dict() if name in trained]
    assert sum(".down." in name for name in shared) > 0
    for name in shared:
        assert torch.equal(base.state_dict()[name], trained[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_a_loaded_decoder_generates_the_same_tokens(
    build: dict[str, Callable[[], PreTrainedModel]],
    compress: Callable[[PreTrainedModel], PreTrainedModel],
    family: str,
    tmp_path: Path,
) -> None:
    model = compress(build[family]())
    loaded = load(save_pretrained(model, tmp_path / "model"))
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ours, theirs = (m.generate(prompt, **settings) for m in (loaded, model))  # type: ignore[operator]
    assert ours.shape[1] > 3
    assert torch.equal(ours, theirs)


def test_a_plan_made_for_a_base_model_is_restored_under_a_head(bert: PreTrainedModel, tmp_path: Path) -> None:
    config = bert.config.quantization_config
    plan = json.loads(json.dumps(config.plan).replace('"bert.', '"'))
    base = bert.base_model
    base.config.quantization_config = CompressionConfig(plan, "base_model")
    base.save_pretrained(tmp_path / "base")
    headed = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    query = headed.get_parameter(f"{QUERY}.down.weight")
    assert torch.equal(query, base.get_parameter(f"{QUERY.removeprefix('bert.')}.down.weight"))


def test_sharded_weights_are_read(bert: PreTrainedModel, tmp_path: Path, logits: Logits) -> None:
    bert.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "model")), logits(bert))


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    state = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_reloading_the_module_registers_again_without_failing(saved: Path) -> None:
    register()
    try:
        importlib.reload(load_module)
        assert AutoModelForSequenceClassification.from_pretrained(saved).num_labels == 3
    finally:
        load_module.CompressionConfig = CompressionConfig
        load_module.CompressionQuantizer = CompressionQuantizer
        register()


def test_a_name_taken_by_another_package_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type("Stranger", (CompressionConfig,), {"__module__": "elsewhere"})
    monkeypatch.setitem(load_module.AUTO_QUANTIZATION_CONFIG_MAPPING, "lightning_compress", stranger)
    with pytest.raises(RuntimeError, match="elsewhere"):
        register()


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_an_unknown_schema_version_is_refused(saved: Path, version: Any) -> None:
    edit_config(saved, lambda c: c["quantization_config"]["plan"].update(version=version))
    with pytest.raises(PlanError, match="schema version"):
        load(saved)
    with pytest.raises(PlanError, match="schema version"):
        AutoModelForSequenceClassification.from_pretrained(saved)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operator returns, on the meta device too."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("rank", [0, -1, 33, 10**9, 10**30, 1.5, True, "4", None])
def test_an_impossible_rank_is_refused_before_anything_is_allocated(saved: Path, rank: Any) -> None:
    edit_ranks(saved, lambda ranks: ranks.update({QUERY: rank}))
    (saved / "model.safetensors").write_bytes(b"not to be read")
    with LargestTensor() as largest:
        with pytest.raises(PlanError, match="allowed are whole numbers from 1 to 32"):
            AutoModelForSequenceClassification.from_pretrained(saved)
        with pytest.raises(PlanError, match="allowed are whole numbers from 1 to 32"):
            load(saved)
    assert 0 < largest.numel <= 32 * 64


@pytest.mark.parametrize(
    "path", ["bert.encoder.layer.7.output.dense", "", "..", "bert.embeddings", "bert.__class__", "os.system"]
)
def test_a_path_that_is_no_linear_of_the_model_is_refused(saved: Path, path: str) -> None:
    edit_ranks(saved, lambda ranks: ranks.update({path: 4}))
    with pytest.raises(PlanError):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_rank_that_differs_from_the_weights_is_refused(saved: Path) -> None:
    edit_ranks(saved, lambda ranks: ranks.update({QUERY: ranks[QUERY] + 1}))
    with pytest.raises(PlanError, match=r"down.weight.*do not belong together"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_weights_that_the_plan_needs_must_be_in_the_file(saved: Path) -> None:
    edit_ranks(saved, lambda ranks: ranks.update({"classifier": 2}))
    with pytest.raises(PlanError, match=r"classifier.down.weight.*no such tensor"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_weights_that_the_plan_does_not_know_must_be_in_the_file_too(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['classifier.weight'\]"):
        load(saved)


def test_a_plan_for_another_family_is_refused(saved: Path) -> None:
    edit_config(saved, lambda c: c["quantization_config"]["plan"].update(model_type="roberta"))
    with pytest.raises(PlanError, match=r"'roberta'.*'bert'"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_an_unknown_method_is_refused(saved: Path) -> None:
    edit_config(saved, lambda c: c["quantization_config"]["plan"]["methods"][0].update(method="magic"))
    with pytest.raises(PlanError, match="magic"):
        load(saved)


def test_a_plan_in_training_form_is_refused(saved: Path) -> None:
    edit_config(saved, lambda c: c["quantization_config"]["plan"]["methods"][0].update(stage="prepared"))
    with pytest.raises(ValueError, match=r"lightning_compress.convert\(module\)"):
        AutoModelForSequenceClassification.from_pretrained(saved)


@pytest.mark.parametrize("entry", [{"extra": 1}, {"root": "elsewhere"}])
def test_unknown_fields_beside_the_plan_are_refused(saved: Path, entry: dict[str, Any]) -> None:
    edit_config(saved, lambda c: c["quantization_config"].update(entry))
    with pytest.raises(PlanError, match="quantization_config"):
        load(saved)


def test_an_entry_without_a_plan_is_refused(saved: Path) -> None:
    edit_config(saved, lambda c: c["quantization_config"].pop("plan"))
    with pytest.raises(PlanError, match="no 'plan'"):
        load(saved)


def test_pickled_weights_are_refused(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(saved)
    with pytest.raises(ValueError, match="not read from pickles"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_dense_checkpoint_cannot_be_compressed_by_loading(
    build: dict[str, Callable[[], PreTrainedModel]], bert: PreTrainedModel, tmp_path: Path
) -> None:
    build["bert"]().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="this checkpoint is dense"):
        BertForSequenceClassification.from_pretrained(
            tmp_path / "dense", quantization_config=bert.config.quantization_config
        )


def test_an_absent_folder_and_one_without_a_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no config.json"):
        load(tmp_path)


def test_a_dense_model_is_not_ours(build: dict[str, Callable[[], PreTrainedModel]], tmp_path: Path) -> None:
    build["bert"]().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="was not compressed by lightning_compress"):
        load(tmp_path / "dense")


def test_a_broken_config_is_reported(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(saved)


@pytest.mark.parametrize(
    "names", [None, [], ["NoSuchModel"], ["AutoModel"], ["pipeline"], ["BertConfig"], [3]]
)
def test_only_model_classes_of_transformers_are_built(saved: Path, names: Any) -> None:
    edit_config(saved, lambda c: c.update(architectures=names))
    with pytest.raises(ValueError, match="has no model class"):
        load(saved)


def test_a_dense_model_built_from_a_compressed_configuration_carries_no_plan(
    saved: Path,
) -> None:
    dense = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(saved))
    assert plan_of(dense) is None


@pytest.fixture
def quantized(build: dict[str, Callable[[], PreTrainedModel]], tmp_path: Path) -> Path:
    return save_pretrained(quantize(build["bert"]().eval(), "w8a8"), tmp_path / "quantized")


def engines(model: PreTrainedModel) -> list[Any]:
    return [part.engine for part in model.modules() if isinstance(part, QuantizedLinear)]


@pytest.mark.parametrize(("operators", "has_low_rank"), [("linear", False), ("linear", True), ("all", False)])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "gpt2", "llama", "mamba"])
def test_every_family_opens_quantised_with_the_same_bits(
    build: dict[str, Callable[[], PreTrainedModel]],
    compress: Callable[[PreTrainedModel], PreTrainedModel],
    logits: Logits,
    family: str,
    operators: str,
    has_low_rank: bool,
    tmp_path: Path,
) -> None:
    if family == "mamba" and operators == "all":
        pytest.skip("nothing but linears of a Mamba can be quantised")
    model = build[family]().eval()
    quantize(compress(model) if has_low_rank else model, operators=operators)
    loaded = load(save_pretrained(model, tmp_path / "model"))
    assert len(engines(loaded)) == len(engines(model)) > 0
    assert torch.equal(logits(loaded), logits(model))
    heads, tables = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    if family in ("gpt2", "mamba"):
        assert heads.weight is tables.weight, "they are tied"


@pytest.mark.parametrize("exclude", [[], ["*.attn.c_proj"], ["*.mlp.c_proj"]])
def test_a_quantised_gpt2_classifier_opens_whatever_stays_dense(
    build: dict[str, Callable[[], PreTrainedModel]], logits: Logits, exclude: list[str], tmp_path: Path
) -> None:
    config = build["gpt2"]().config
    config.pad_token_id = 0
    model = quantize(GPT2ForSequenceClassification(config).eval(), exclude=exclude)
    assert torch.equal(logits(load(save_pretrained(model, tmp_path / "model"))), logits(model))


def test_a_backend_computes_the_quantised_linears_of_what_is_loaded_and_is_told(
    quantized: Path, logits: Logits, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = load(quantized)
    assert engines(plain) == [None] * 12
    assert capsys.readouterr().out == ""
    fast = load(quantized, backend="fp32", device="cpu")
    assert all(engine is not None for engine in engines(fast))
    assert capsys.readouterr().out == "backends of 12 quantised linears: fp32 for 12\n"
    difference = (logits(fast) - logits(plain)).norm()
    assert 0 < difference < 0.05 * logits(plain).norm(), "inputs are not rounded any more"


def test_the_fastest_backend_is_measured_for_each_shape_while_loading(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(engine is not None for engine in engines(load(quantized, backend="auto")))
    printed = capsys.readouterr().out
    # attention, where what is not packed runs alone; both of the FFN
    for shape in ("32 -> 32", "32 -> 64", "64 -> 32"):
        assert re.search(rf"^  {shape}: (int8|bf16|fp32) \(microseconds at", printed, flags=re.MULTILINE)


def test_choices_of_an_earlier_time_are_taken_again(quantized: Path) -> None:
    choices = use_backend(load(quantized), "bf16", verbose=False).choices
    choices["bert.encoder.layer.0.output.dense"] = "fp32"
    loaded = load(quantized, backend=choices)
    assert all(engine is not None for engine in engines(loaded))


@pytest.mark.parametrize(
    ("name", "backend", "words"),
    [
        ("saved", "auto", r"has no quantised linear.*lightning_compress\.quantize"),
        ("saved", "int5", "'int5' is not one of"),
        ("quantized", "int5", "'int5' is not one of"),
        ("quantized", {"a": "auto"}, "'auto' is not one of"),
    ],
)
def test_a_backend_that_cannot_be_is_refused_before_weights_are_read(
    name: str, backend: Any, words: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=words):
        load(folder, backend=backend)

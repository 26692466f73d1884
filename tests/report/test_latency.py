import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, quantize, save_pretrained
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.report import latency
from lightning_compress.report.latency import measure_latency, run_bench
from lightning_compress.report.latency_table import LatencyTable


def test_every_model_dtype_and_shape_is_timed_in_every_round(models):
    table = measure_latency(models, [1, 2], [4, 8], rounds=3, warmup=1)
    cells = {(t.model, t.dtype, t.batch_size, t.length) for t in table.timings}
    assert len(cells) == len(table.timings) == 16
    assert all(len(t.samples_ms) == 3 and min(t.samples_ms) > 0 for t in table.timings)
    assert table.baselines == ("dense",)
    assert table.machine["cores"] >= 1


def test_each_round_times_all_once_and_begins_with_the_next(models, monkeypatch):
    names = {}
    order = []
    original = latency._cast_copies

    def remember(*args):
        variants = original(*args)
        names.update({id(model): key for key, model in variants.items()})
        return variants

    monkeypatch.setattr(latency, "_cast_copies", remember)
    monkeypatch.setattr(latency, "_time_once", lambda model, *_: order.append(names[id(model)]) or 1.0)
    measure_latency(models, [1], [4], rounds=5, warmup=1)
    keys = [("dense", "fp32"), ("dense", "bf16"), ("small", "fp32"), ("small", "bf16")]
    for index in range(5):
        assert order[4 * index : 4 * index + 4] == keys[index % 4 :] + keys[: index % 4]


def test_samples_stay_with_their_model_when_the_order_rotates(models, monkeypatch):
    monkeypatch.setattr(latency, "_time_once", lambda model, *_: float(model.config.num_hidden_layers))
    table = measure_latency(models, [1], [4], rounds=5, warmup=1)
    assert {(t.model, t.samples_ms) for t in table.timings} == {("dense", (2.0,) * 5), ("small", (1.0,) * 5)}


def test_copies_are_timed_in_their_dtype_and_in_eval_mode_and_the_originals_stay(models, monkeypatch):
    seen = set()

    def look(model, batch, clock, device):
        assert torch.is_inference_mode_enabled()
        assert not gc.isenabled()
        seen.add((model.training, model.classifier.weight.dtype))
        return 1.0

    monkeypatch.setattr(latency, "_time_once", look)
    models["dense"].train()
    measure_latency(models, [1], [4], rounds=1, warmup=1)
    assert seen == {(False, torch.float32), (False, torch.bfloat16)}
    assert models["dense"].training
    assert models["dense"].classifier.weight.dtype == torch.float32
    assert gc.isenabled()


def test_the_setting_of_threads_is_restored(models):
    before = torch.get_num_threads()
    table = measure_latency(models, [1], [4], ["fp32"], rounds=1, warmup=1, threads=before + 1)
    assert table.threads == before + 1
    assert torch.get_num_threads() == before


def test_the_processor_clock_runs_on_one_thread(models):
    table = measure_latency(models, [1], [4], ["fp32"], rounds=2, warmup=1, threads=1, clock="cpu")
    assert table.clock == "cpu"
    assert all(sample > 0 for timing in table.timings for sample in timing.samples_ms)


def test_the_prefill_of_a_decoder_can_be_timed():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, max_position_embeddings=16, **sizes))
    table = measure_latency({"llama": model}, [2], [8], rounds=1, warmup=1)
    assert [timing.dtype for timing in table.timings] == ["fp32", "bf16"]


def test_progress_counts_up_to_all_rounds(models):
    calls = []
    measure_latency(
        models, [1, 2], [4], ["fp32"], rounds=2, warmup=1, progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_outputs_that_are_not_finite_are_refused_before_any_timing(models, monkeypatch):
    monkeypatch.setattr(latency, "_time_once", lambda *_: pytest.fail("timed"))
    torch.nn.init.constant_(models["small"].classifier.bias, float("nan"))
    with pytest.raises(ValueError, match="'small' in fp32 gives outputs that are not finite"):
        measure_latency(models, [1], [4], rounds=1, warmup=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtypes": ["fp32", "int3"]}, r"unknown dtypes \['int3'\]"),
        ({"dtypes": []}, "dtypes is empty"),
        ({"batch_sizes": []}, "batch_sizes is empty"),
        ({"lengths": []}, "lengths is empty"),
        ({"models": {}}, "models is empty"),
        ({"lengths": [4, 4]}, "repeats an entry"),
        ({"lengths": [0]}, "lengths holds 0"),
        ({"lengths": [33]}, "32 positions"),
        ({"rounds": 0}, "rounds holds 0"),
        ({"warmup": 0}, "warmup holds 0"),
        ({"threads": 0}, "threads holds 0"),
        ({"baselines": ["big"]}, r"baselines \['big'\] are not among"),
        ({"clock": "sun"}, "unknown clock"),
        ({"backend": "int5"}, "'int5' is not one of"),
        ({"backend": "auto"}, r"none of the models \['dense', 'small'\] has a quantised linear"),
    ],
)
def test_impossible_requests_are_refused_by_name(models, settings: dict, message: str):
    request = {"models": models, "batch_sizes": [1], "lengths": [4]} | settings
    with pytest.raises(ValueError, match=message):
        measure_latency(**request)


def test_bench_opens_folders_prints_the_table_and_keeps_it(tmp_path: Path, models, capsys):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    kept = tmp_path / "out" / "latency.json"
    table = run_bench(tmp_path / "small", [tmp_path / "dense"], [1], [4], rounds=2, json_path=kept, warmup=1)
    assert table.baselines == ("dense",)
    assert LatencyTable.from_json(kept.read_text(encoding="utf-8")) == table
    assert "small" in capsys.readouterr().out


def test_bench_opens_a_compressed_folder(tmp_path: Path, models):
    models["dense"].save_pretrained(tmp_path / "dense")
    compressor = Compressor(models["dense"], [SoftThresholdRankConfig(target_params=0.5, rank_multiple=1)])
    compressor.prepare()
    attach_plan(models["dense"], compressor.convert())
    save_pretrained(models["dense"], tmp_path / "half")
    table = run_bench(tmp_path / "half", tmp_path / "dense", [1], [4], rounds=1, warmup=1)
    assert {timing.model for timing in table.timings} == {"half", "dense"}


def engines(model) -> list:
    return [part.engine for part in model.modules() if isinstance(part, QuantizedLinear)]


def test_a_backend_computes_the_quantised_linears_of_all_that_have_some(models, monkeypatch, capsys):
    quantize(models["small"])
    seen = {}
    names = {2: "dense", 1: "small"}

    def look(model, *_):
        seen[names[model.config.num_hidden_layers]] = [engine is not None for engine in engines(model)]
        return 1.0

    monkeypatch.setattr(latency, "_time_once", look)
    table = measure_latency(models, [1, 2], [4], rounds=1, warmup=1, backend="bf16")
    assert table.backends == {
        f"small {dtype}": "backends of 6 quantised linears: bf16 for 6" for dtype in ("fp32", "bf16")
    }
    assert LatencyTable.from_json(table.to_json()) == table
    assert seen == {"dense": [], "small": [True] * 6}
    assert capsys.readouterr().out == "".join(
        f"small in {dtype}, backends of 6 quantised linears: bf16 for 6\n" for dtype in ("fp32", "bf16")
    )
    assert engines(models["small"]) == [None] * 6
    plain = measure_latency(models, [1], [4], rounds=1, warmup=1)
    assert seen["small"] == [False] * 6
    assert plain.backends == {} and "backends" not in plain.to_dict()


def test_backends_are_measured_at_the_numbers_of_tokens_that_are_timed(models, capsys):
    quantize(models["small"])
    measure_latency(models, [2, 1], [4, 8], ["fp32"], rounds=1, warmup=1, backend="auto")
    assert "(microseconds at 4/8/16 rows: " in capsys.readouterr().out


def test_bench_without_rivals_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"against=\[\]"):
        run_bench(tmp_path, [])

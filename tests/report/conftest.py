"""One small, complete run, and tiny models, for the tests of the report."""

import copy
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress.report.latency_table import LatencyTable, Timing

RANKS = {
    "bert.encoder.layer.0.attention.self.query": [8, 32, "low_rank"],
    "bert.encoder.layer.0.output.dense": [30, 32, "dense"],
    "bert.encoder.layer.1.attention.self.query": [16, 32, "low_rank"],
    "bert.encoder.layer.1.output.dense": [4, 32, "low_rank"],
}


@pytest.fixture
def table() -> LatencyTable:
    """Dense takes 4 and 2 ms in fp32 and bf16, small 2 and 1.6 ms; the last round takes twice as long."""
    times = {("dense", "fp32"): 4.0, ("dense", "bf16"): 2.0, ("small", "fp32"): 2.0, ("small", "bf16"): 1.6}
    timings = [Timing(*key, 8, 128, (ms, ms, 2 * ms)) for key, ms in times.items()]
    return LatencyTable(
        timings=tuple(timings),
        baselines=("dense",),
        threads=1,
        warmup=3,
        clock="wall",
        device="cpu",
        machine={"cpu": "A <fast> processor", "cores": 2, "flags": ["avx2"]},
        versions={"torch": "2.13.0"},
    )


@pytest.fixture
def run(table: LatencyTable) -> dict[str, Any]:
    """The record of a run as plain data."""
    steps = [
        {
            "step": 10 * index,
            "progress": index / 4,
            "phase": "search" if index < 3 else "recovery",
            "size_ratio": 1 - 0.1 * index,
            "flops_ratio": 1 - 0.08 * index,
            "ranks": {path: row[1] - index for path, row in RANKS.items()},
            "loss": {"task": 1.0 - 0.1 * index},
        }
        for index in range(5)
    ]
    counts = {"linear": 1_000_000, "encoder": 1_100_000, "total": 3_000_000}
    half = {"linear": 500_000, "encoder": 600_000, "total": 2_500_000}
    return {
        "schema": 1,
        "model_type": "bert",
        "methods": [{"method": "soft_threshold_rank", "config": {"target_params": 0.5}}],
        "target": {"target_params": 0.5, "scope": "linear"},
        "steps": steps,
        "final": {
            "parameters": {"dense": counts, "compressed": half},
            "flops": {"dense": 2.0e9, "compressed": 1.2e9},
            "bytes_on_disk": {"dense": 12_000_000, "compressed": 10_000_000},
            "ranks": copy.deepcopy(RANKS),
        },
        "metrics": {"dense": {"accuracy": 0.875}, "compressed": {"accuracy": 0.8625}},
        "latency": table.to_dict(),
        "machine": {"cpu": "A processor", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "warnings": [],
    }


def tiny_bert(layers: int = 2) -> BertForSequenceClassification:
    """A BERT of 32 dimensions with random weights."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
    }
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))


@pytest.fixture
def models() -> dict[str, BertForSequenceClassification]:
    """A dense model of two layers and a smaller one of one."""
    return {"dense": tiny_bert(2), "small": tiny_bert(1)}


@pytest.fixture
def dropping_run(run: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that drops tokens from a model of three layers."""
    for index, step in enumerate(run["steps"]):
        kept = 1.0 - 0.1 * index
        step.update(phase="ramp" if index < 3 else "recovery", size_ratio=1.0, ranks={})
        step.update(tokens_kept=kept, ratio=kept, target=kept - 0.02, threshold=0.25 + 0.1 * index)
    dense, more = run["final"]["parameters"]["dense"], {"encoder": 1_100_000, "total": 3_012_000}
    run["final"].update(parameters={"dense": dense, "compressed": dense | more}, ranks={}, bytes_on_disk=None)
    right = {"tokens": ["[CLS]", "great", "##ly", "."], "layers": [3, 3, 1, 0], "label": "positive"}
    wrong = {"tokens": ["[CLS]", "bad"], "layers": [3, 2], "label": "positive"}
    run["dropping"] = {
        "num_texts": 320,
        "layers": [0.8, 0.5, 0.2],
        "texts": [right | {"prediction": "positive"}, wrong | {"prediction": "negative"}],
        "scale": 1.1,
        "metric": "accuracy",
        "curve": [
            {"scale": 0.0, "score": 0.9, "flops_ratio": 1.01},
            {"scale": 1.1, "score": 0.89, "flops_ratio": 0.5},
            {"scale": 2.2, "score": 0.8, "flops_ratio": 0.3},
        ],
    }
    run["target"] = {"target_flops": 0.5}
    run["methods"] = [{"method": "contribution_token_dropping", "config": {"target_flops": 0.5}}]
    return run


@pytest.fixture
def width_run(run: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that makes two layers narrower, one more than the other."""
    run["final"]["ranks"] = {}
    for step in run["steps"]:
        step["ranks"] = {}
    run["widths"] = {
        "layers": [
            {"heads": [6, 12], "neurons": [1024, 3072], "parameters": [350_000, 550_000]},
            {"heads": [3, 12], "neurons": [512, 3072], "parameters": [250_000, 550_000]},
        ],
        "criterion": "taylor",
        "embedding_rank": [128, 768],
        "hidden": None,
        "calibration_seconds": 12.25,
        "calibration_share": 0.045,
    }
    run["methods"] = [{"method": "width_slimming", "config": {"target_params": 0.5}}]
    return run


@pytest.fixture
def bits_run(run: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that rounds linears to 4 bits, and computes softmax in integers."""
    dense = run["final"]["parameters"]["dense"]
    sizes = {"dense": 12_000_000, "compressed": 1_500_000}
    run["final"].update(parameters={"dense": dense, "compressed": dense}, ranks={}, bytes_on_disk=sizes)
    for step in run["steps"]:
        step.update(size_ratio=1.0, ranks={})
    blocks = {"bits": 4, "block": "32 × 32", "factor": "shift"}
    integers = {"bits": None, "block": None, "factor": None}
    run["bits"] = {
        "operators": [
            {"operator": "linear weights", "places": 1200, **blocks},
            {"operator": "softmax", "places": 6, **integers},
        ]
    }
    run["target"] = {}
    run["methods"] = [{"method": "block_quantization", "config": {"preset": "w4a8"}}]
    return run


@pytest.fixture
def exit_run(run: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that trains exits in a model of four layers, two of which are asked."""
    dense, more = run["final"]["parameters"]["dense"], {"encoder": 1_100_000, "total": 3_002_000}
    run["final"].update(parameters={"dense": dense, "compressed": dense | more}, ranks={}, bytes_on_disk=None)
    for step in run["steps"]:
        step.update(size_ratio=1.0, ranks={})
    run["exits"] = {
        "num_texts": 320,
        "leaves": [0.5, 0.0, 0.25, 0.25],
        "asked": [0, 2],
        "rule": "entropy",
        "threshold": 0.125,
        "metric": "accuracy",
        "curve": [
            {"threshold": None, "score": 0.9, "flops_ratio": 1.0, "mean_depth": 4.0},
            {"threshold": 0.125, "score": 0.89, "flops_ratio": 0.57, "mean_depth": 2.25},
            {"threshold": 0.5, "score": 0.8, "flops_ratio": 0.3, "mean_depth": 1.0},
        ],
    }
    run["target"] = {"target_flops": 0.6}
    run["methods"] = [{"method": "multi_exit", "config": {"target_flops": 0.6}}]
    return run

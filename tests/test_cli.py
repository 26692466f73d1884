"""The command line, from YAML to a saved model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from transformers import AutoModelForSequenceClassification

from lightning_compress import load, plan_of, quantize, save_pretrained
from lightning_compress.cli import CompressionCLI, main
from lightning_compress.deploy.export import EXTRA
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from tests.tiny_pretrained import VOCABULARY, save_tiny_encoder, word_tokenizer
from tests.tiny_texts import save_tiny_reviews
from tests.toys import tiny_bert, toy_loader
from tests.toys_dropping import dropping_bert
from tests.toys_exits import exiting_model

pytestmark = [
    # Lightning's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # what an `optimizer:` section is for
    pytest.mark.filterwarnings("ignore:`TextClassifier.configure_optimizers` will be overridden"),
]


@pytest.fixture(autouse=True)
def no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-compress"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "encoder": save_tiny_encoder(folder / "encoder"),
        "texts": save_tiny_reviews(folder / "texts.tsv"),
    }


def run_config(files: dict[str, str], tmp_path: Path, **sections: Any) -> dict[str, Any]:
    ranks = {"class_path": "SoftThresholdRank", "init_args": {"target_params": 0.5, "rank_multiple": 4}}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = {
        "accelerator": "cpu",
        "max_steps": 6,
        "callbacks": [ranks],
        "default_root_dir": str(tmp_path),
        **quiet,
    }
    data = {"train": files["texts"], "tokenizer": files["encoder"], "max_length": 16, "batch_size": 4}
    return {
        "seed_everything": 0,
        "trainer": trainer,
        "model": {"class_path": "TextClassifier", "init_args": {"model": files["encoder"]}},
        "data": {"class_path": "TextClassificationData", "init_args": data},
        **sections,
    }


def write(config: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


OPTIMIZERS = {
    "the task's own": {},
    "optimizer and scheduler": {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}},
    },
}


@pytest.mark.parametrize("sections", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fit_saves_a_compressed_model_that_opens(
    sections: dict[str, Any], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", write(run_config(files, tmp_path, **sections), tmp_path)])
    assert f"The compressed model is in {tmp_path / 'model'}" in capsys.readouterr().out
    model = load(tmp_path / "model")
    plan = plan_of(model)
    assert plan is not None and plan.methods[0].structure["ranks"]
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_a_yaml_with_an_optimizer_section_trains_the_new_parameters(
    files: dict[str, str], tmp_path: Path
) -> None:
    config = run_config(files, tmp_path, **OPTIMIZERS["optimizer and scheduler"])
    config["trainer"]["callbacks"][0]["init_args"].update(convert=False, warmup=0.9, search_end=1.0)
    factors = []
    for rate in (0.0, 0.1):
        config["optimizer"]["init_args"]["lr"] = rate
        run = {
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "save_config_kwargs": {"overwrite": True},
        }
        cli = CompressionCLI(args=["fit", "--config", write(config, tmp_path)], **run)
        layers = [m for m in cli.model.modules() if isinstance(m, SoftThresholdLinear)]
        held = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
        assert {id(p) for layer in layers for p in (layer.u_OM, layer.sigma_M, layer.v_MI)} <= held
        factors.append(
            [p.detach().clone() for layer in layers for p in (layer.u_OM, layer.sigma_M, layer.v_MI)]
        )
    assert factors[0] and not any(torch.equal(still, moved) for still, moved in zip(*factors, strict=True))


def test_the_output_folder_can_be_chosen(files: dict[str, str], tmp_path: Path) -> None:
    config = write(run_config(files, tmp_path), tmp_path)
    main(["fit", "--config", config, f"--output={tmp_path / 'elsewhere'}"])
    assert plan_of(load(tmp_path / "elsewhere")) is not None


def test_settings_of_a_callback_can_be_overridden_on_the_command_line(
    files: dict[str, str], tmp_path: Path
) -> None:
    config = run_config(files, tmp_path)
    config["trainer"]["callbacks"] = []
    extra = ["--trainer.callbacks+=SoftThresholdRank", "--trainer.callbacks.target_params=0.6"]
    main(["fit", "--config", write(config, tmp_path), *extra, "--trainer.callbacks.rank_multiple=4"])
    plan = plan_of(load(tmp_path / "model"))
    assert plan is not None and plan.methods[0].config["target_params"] == 0.6


@pytest.mark.parametrize(
    ("callbacks", "output", "said"),
    [
        ([], [], ""),
        ([], ["--output=elsewhere"], "Nothing is saved in elsewhere: no compression callback"),
        (["SoftThresholdRank"], [], "the model is in training form"),
    ],
    ids=["dense", "dense with an output", "not converted"],
)
def test_nothing_is_saved_of_a_model_that_is_not_converted(
    callbacks: list[str],
    output: list[str],
    said: str,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_config(files, tmp_path)
    settings = {"rank_multiple": 4, "convert": False}
    config["trainer"]["callbacks"] = [{"class_path": c, "init_args": settings} for c in callbacks]
    main(["fit", "--config", write(config, tmp_path), *output])
    assert not (tmp_path / "model").exists() and not (tmp_path / "elsewhere").exists()
    printed = [line for line in capsys.readouterr().out.splitlines() if "saved" in line]
    assert said in printed[0] if said else not printed


class OtherName(LightningModule):
    """Keeps its transformer where nobody expects it, beside a ``model`` that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.net = torch.nn.Linear(2, 2), tiny_bert()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(**batch).loss + self.model.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class ToyData(LightningDataModule):
    def train_dataloader(self) -> Any:
        return toy_loader()


@pytest.mark.parametrize("compresses", [True, False])
def test_a_module_of_the_users_own_is_saved_wherever_its_transformer_is(
    compresses: bool, files: dict[str, str], tmp_path: Path
) -> None:
    config = run_config(files, tmp_path)
    config["model"], config["data"] = {"class_path": "tests.test_cli.OtherName"}, "tests.test_cli.ToyData"
    if not compresses:
        config["trainer"]["callbacks"] = []
    main(["fit", "--config", write(config, tmp_path)])
    assert (tmp_path / "model").exists() == compresses
    assert not compresses or plan_of(load(tmp_path / "model")) is not None


class NoTransformer(OtherName):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model.weight.sum()


def test_a_module_without_a_transformer_is_trained_and_not_saved(
    files: dict[str, str], tmp_path: Path
) -> None:
    config = run_config(files, tmp_path)
    config["model"], config["data"] = {"class_path": "tests.test_cli.NoTransformer"}, "tests.test_cli.ToyData"
    config["trainer"]["callbacks"] = []
    main(["fit", "--config", write(config, tmp_path)])
    assert not (tmp_path / "model").exists()


def test_bench_and_report_go_on_from_a_run(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(files, tmp_path)
    report = {"class_path": "CompressionReport", "init_args": {"lengths": [8], "every_n_steps": 1}}
    config["trainer"]["callbacks"].append(report)
    main(["fit", "--config", write(config, tmp_path)])
    main(["report", str(tmp_path)])
    assert "report.html" in capsys.readouterr().out
    timed = tmp_path / "bench.json"
    shapes = ["--batch-sizes", "1", "--lengths", "8", "--dtypes", "fp32", "--rounds", "2"]
    main(["bench", str(tmp_path / "model"), "--against", files["encoder"], *shapes, "--json", str(timed)])
    assert json.loads(timed.read_text())["timings"]


def test_bench_takes_a_backend_for_quantised_models(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(files["encoder"])
    save_pretrained(quantize(model), tmp_path / "quantized")
    words = ["bench", str(tmp_path / "quantized"), "--against", files["encoder"], "--backend", "bf16"]
    main([*words, "--batch-sizes", "1", "--lengths", "8", "--dtypes", "fp32", "--rounds", "2"])
    assert "quantized in fp32, backends of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["report", "nowhere"], ["bench", "nowhere", "--against", "nowhere"]], ids=str
)
def test_what_the_user_can_mend_is_said_in_one_line(words: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*nowhere"):
        main(words)


def test_a_number_out_of_range_is_said_before_training(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(files, tmp_path)
    config["trainer"]["callbacks"][0]["init_args"]["target_params"] = 2.0
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", write(config, tmp_path)])
    said = f"{exit_info.value} {capsys.readouterr().err}"
    assert "target_params=2.0 is outside (0, 1]" in said


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_missing_file_is_said_in_one_line(verb: str, files: dict[str, str], tmp_path: Path) -> None:
    config = run_config(files, tmp_path)
    config["data"]["init_args"]["train"] = str(tmp_path / "nowhere.tsv")
    with pytest.raises(SystemExit, match=r"^error: (?!Call to)[^\n]*nowhere"):
        main([verb, "--config", write(config, tmp_path)])


class Breaks(OtherName):
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        raise RuntimeError("a bug")


class BreaksOnReading(ToyData):
    @property
    def num_labels(self) -> int:
        raise KeyError("a bug")


def test_a_bug_keeps_its_traceback(files: dict[str, str], tmp_path: Path) -> None:
    config = run_config(files, tmp_path, model="tests.test_cli.Breaks", data="tests.test_cli.ToyData")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit", "--config", write(config, tmp_path)])
    config = run_config(files, tmp_path, data="tests.test_cli.BreaksOnReading")
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", write(config, tmp_path)])


@pytest.mark.parametrize("words", [[], ["--help"]], ids=["nothing", "help"])
def test_the_overview_is_printed_without_a_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words)
    assert capsys.readouterr().out.startswith("usage: lightning-compress")


def test_the_help_of_fit_explains_the_callbacks_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help=SoftThresholdRank"])
    assert "Share of the parameters of" in capsys.readouterr().out


@pytest.fixture
def dropping_folder(tmp_path: Path) -> str:
    tokenizer = word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    model = dropping_bert(vocab_size=len(VOCABULARY))
    return str(save_pretrained(model, tmp_path / "dropping", tokenizer=tokenizer))


def test_export_counts_on_texts_and_writes_beside_the_model(
    dropping_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in EXTRA:
        pytest.importorskip(name, reason="the extra `onnx` is not installed")
    (tmp_path / "texts.txt").write_text("good film\na b c d\n", encoding="utf-8")
    main(["export", dropping_folder, "--length", "12", "--texts", str(tmp_path / "texts.txt"), "--int8"])
    out = capsys.readouterr().out
    assert re.search(r"^Tokens that enter each layer: \d \d$", out, flags=re.MULTILINE)
    assert str(Path(dropping_folder) / "model.onnx") in out
    assert (Path(dropping_folder) / "model.onnx").stat().st_size > 0


def test_export_says_that_exits_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(exiting_model(tiny_bert(), threshold=0.5), tmp_path)
    monkeypatch.setattr("lightning_compress.cli.export_onnx", lambda model, target, **_: target)
    main(["export", str(tmp_path), "--length", "12"])
    assert capsys.readouterr().out.startswith("Exits are left out")
    main(["export", str(tmp_path), "--length", "12", "--exit", "0"])
    assert capsys.readouterr().out == f"{tmp_path / 'model.onnx'}\n"


def test_export_hands_on_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    tiny_bert().save_pretrained(tmp_path)
    monkeypatch.setattr("lightning_compress.cli.export_onnx", lambda model, target, **form: told.append(form))
    main(["export", str(tmp_path), "--length", "12"])
    main(["export", str(tmp_path), "--exit", "1", "--int8", "--runtime", "openvino"])
    plain = {"counts": None, "exit_layer": None, "int8": False, "runtime": "onnxruntime"}
    chosen = {"exit_layer": 1, "int8": True, "runtime": "openvino"}
    assert told == [{**plain, "length": 12}, {**plain, **chosen, "length": 128}]


def test_export_says_in_one_line_what_it_lacks(dropping_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: --texts and --counts[^\n]*$"):
        main(["export", dropping_folder, "--texts", "x.txt", "--counts", "3", "2"])
    with pytest.raises(SystemExit, match=r"^error: [^\n]*x\.txt[^\n]*$"):
        main(["export", dropping_folder, "--texts", "x.txt"])
    monkeypatch.setattr("lightning_compress.deploy.export.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*lightning-compress\[onnx\][^\n]*$"):
        main(["export", dropping_folder, "--counts", "3", "2"])

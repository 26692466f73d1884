from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from lightning_compress.deploy import disk_bytes, model_card, plan_of, save_pretrained
from lightning_compress.deploy.model_card import read_measurements
from lightning_compress.nn.flops import count_flops, count_parameters

ORIGIN: dict[str, Any] = {
    "command": "make bench",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"torch": "2.8.0"},
}


def card_of(model: PreTrainedModel, measurements: Any = None) -> str:
    plan = plan_of(model)
    assert plan is not None
    return model_card(model, plan, weight_bytes=1000, measurements=read_measurements(measurements))


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_yaml_and_leaves_the_licence_to_the_user(bert: PreTrainedModel) -> None:
    assert front_matter(card_of(bert)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["lightning-compress", "compressed", "soft-threshold-rank"],
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/electra-small", "google/electra-small"),
        ("gpt2", "gpt2"),
        ("no", "no"),
        ("/home/me/model", None),
    ],
)
def test_the_base_model_is_named_when_it_is_a_hub_name(
    bert: PreTrainedModel, name: str, expected: str | None
) -> None:
    bert.config.name_or_path = name
    assert front_matter(card_of(bert)).get("base_model") == expected
    assert "/home/me" not in card_of(bert)


def test_a_local_folder_is_no_base_model(
    bert: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    bert.config.name_or_path = "runs/model"
    assert "base_model" not in front_matter(card_of(bert))


def test_the_card_of_every_family_tells_the_counted_sizes_and_each_rank(
    build: dict[str, Callable[[], PreTrainedModel]], compressed: PreTrainedModel
) -> None:
    card, plan = card_of(compressed), plan_of(compressed)
    assert plan is not None
    dense = build[compressed.config.model_type]()
    for model in (dense, compressed):
        sizes = count_parameters(model)
        for size in (sizes.linear, sizes.encoder, sizes.total):
            assert f" {size:,} " in card
    assert f"{count_flops(compressed, [128]).total:,.0f}" in card
    cells = [cell.strip() for line in card.splitlines() for cell in line.split("|")]
    ranks = [int(cell.split("/")[0]) for cell in cells if "/" in cell and cell.replace("/", "").isdigit()]
    assert sorted(ranks) == sorted(plan.methods[0].structure["ranks"].values())


def test_an_unknown_structure_is_shown_as_json(bert: PreTrainedModel) -> None:
    from lightning_compress.deploy.model_card import _structure
    from lightning_compress.plan import MethodRecord

    shown = _structure(bert, MethodRecord("new_method", "converted", {"bits": 4}, {"heads": [1, 2]}))
    assert "`bits=4`" in shown
    assert '"heads"' in shown


def test_measured_rows_are_printed_with_their_origin(bert: PreTrainedModel) -> None:
    rows = [
        {"model": "dense", "accuracy": 0.91234},
        {"model": "a|b", "accuracy": 0.9, "command": "make demo"},
    ]
    card = card_of(bert, {**ORIGIN, "rows": rows})
    assert "| dense | 0.9123 |" in card
    assert "| a\\|b | 0.9 |" in card
    assert "Measured by `make bench` on cpu Some CPU, cores 2, with torch 2.8.0." in card
    assert "Measured by `make demo` on" in card


def test_without_measurements_there_is_no_such_section(bert: PreTrainedModel) -> None:
    assert "## Measured" not in card_of(bert)


@pytest.mark.parametrize("missing", sorted(ORIGIN))
def test_a_row_without_its_origin_is_refused(missing: str) -> None:
    origin = {name: value for name, value in ORIGIN.items() if name != missing}
    with pytest.raises(ValueError, match=missing):
        read_measurements({**origin, "rows": [{"accuracy": 0.9}]})


@pytest.mark.parametrize("rows", [None, [], 3])
def test_measurements_without_rows_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="'rows'"):
        read_measurements({**ORIGIN, "rows": rows})


def test_bytes_on_disk_are_those_of_all_weight_files(bert: PreTrainedModel, tmp_path: Path) -> None:
    folder = save_pretrained(bert, tmp_path / "model")
    assert disk_bytes(folder) == (folder / "model.safetensors").stat().st_size
    assert f"{disk_bytes(folder):,}" in (folder / "README.md").read_text()
    bert.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert disk_bytes(tmp_path / "shards") > disk_bytes(folder)


def test_a_folder_without_weights_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        disk_bytes(tmp_path)

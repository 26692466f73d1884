import dataclasses
import io
import json

import pytest
from rich.console import Console

from lightning_compress.report.latency_table import LatencyTable, Spread, Timing


def speedup(table: LatencyTable, model: str, dtype: str, against: str):
    found = [s for s in table.speedups() if (s.model, s.dtype, s.against) == (model, dtype, against)]
    assert len(found) == 1
    return found[0]


def test_percentiles_are_interpolated_between_samples():
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert (spread.p10, spread.median, spread.p90) == (2.0, 6.0, 10.0)


def test_same_dtype_is_held_against_the_baseline_in_that_dtype(table: LatencyTable):
    assert speedup(table, "small", "fp32", "same_dtype").ratio.median == pytest.approx(2.0)
    assert speedup(table, "small", "bf16", "same_dtype").ratio.median == pytest.approx(1.25)


def test_best_dtype_is_held_against_the_fastest_baseline(table: LatencyTable):
    best = speedup(table, "small", "fp32", "best_dtype")
    assert best.baseline_dtype == "bf16"
    assert best.ratio.median == pytest.approx(1.0)


def test_a_slow_moment_of_the_machine_cancels_out_of_the_ratio(table: LatencyTable):
    ratio = speedup(table, "small", "fp32", "same_dtype").ratio
    assert ratio.p10 == ratio.p90 == pytest.approx(2.0)


def test_the_ratio_is_the_median_of_paired_ratios_not_the_ratio_of_medians(table: LatencyTable):
    timings = (
        Timing("dense", "fp32", 1, 8, (1.0, 10.0, 3.0)),
        Timing("small", "fp32", 1, 8, (1.0, 2.0, 2.0)),
    )
    paired = dataclasses.replace(table, timings=timings)
    assert speedup(paired, "small", "fp32", "same_dtype").ratio.median == pytest.approx(1.5)
    assert timings[0].milliseconds.median / timings[1].milliseconds.median == pytest.approx(1.5)
    moved = dataclasses.replace(timings[0], samples_ms=(3.0, 10.0, 1.0))
    paired = dataclasses.replace(table, timings=(moved, timings[1]))
    assert speedup(paired, "small", "fp32", "same_dtype").ratio.median == pytest.approx(3.0)


def test_a_baseline_is_held_against_its_own_best_dtype_but_never_against_itself(table: LatencyTable):
    own = [s for s in table.speedups() if s.model == "dense"]
    assert [(s.dtype, s.baseline_dtype, s.ratio.median) for s in own] == [
        ("fp32", "bf16", pytest.approx(0.5))
    ]


def test_ratios_stay_within_one_shape(table: LatencyTable):
    other = tuple(dataclasses.replace(t, batch_size=1, samples_ms=(9.0, 9.0, 9.0)) for t in table.timings)
    both = dataclasses.replace(table, timings=table.timings + other)
    ratios = {s.ratio.median for s in both.speedups() if s.batch_size == 1}
    assert ratios == {1.0}


def test_json_there_and_back_is_the_same_table(table: LatencyTable):
    assert LatencyTable.from_json(table.to_json()) == table


def test_json_also_tells_the_computed_numbers(table: LatencyTable):
    data = json.loads(table.to_json())
    assert data["rounds"] == 3
    assert data["timings"][0]["milliseconds"]["median"] == 4.0
    assert {"model", "against", "ratio"} <= set(data["speedups"][0])


def test_an_unknown_schema_is_refused(table: LatencyTable):
    with pytest.raises(ValueError, match="schema 2"):
        LatencyTable.from_dict(table.to_dict() | {"schema": 2})


def test_a_missing_field_is_named(table: LatencyTable):
    data = table.to_dict()
    del data["timings"]
    with pytest.raises(ValueError, match="timings"):
        LatencyTable.from_dict(data)


def test_the_terminal_table_shows_every_timing_and_takes_names_literally(table: LatencyTable):
    renamed = tuple(
        dataclasses.replace(t, model="[red]small") if t.model == "small" else t for t in table.timings
    )
    console = Console(file=io.StringIO(), width=160)
    console.print(dataclasses.replace(table, timings=renamed).to_rich())
    text = console.file.getvalue()
    assert text.count("[red]small") == 2
    assert "8 × 128" in text
    assert text.count("× dense") == 2


def test_rows_for_a_model_card_name_their_origin(table: LatencyTable):
    found = table.to_measurements("make bench")
    assert found["command"] == "make bench"
    assert found["rows"][2]["× dense, same dtype"] == "2.00"
    assert "A <fast> processor" in found["machine"]

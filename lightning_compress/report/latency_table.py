"""What a latency measurement found: paired samples, and the medians, spreads and speed-ups read off them.

The samples are all that is stored; every other number is computed from them, here. `latency` fills the table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_compress.report.machine import describe_machine, describe_versions

__all__ = ["LATENCY_SCHEMA", "LatencyTable", "Spread", "Speedup", "Timing"]

LATENCY_SCHEMA = 1

Against = Literal["same_dtype", "best_dtype"]


@dataclass(frozen=True)
class Spread:
    """The middle and the width of a set of samples: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise samples; percentiles are interpolated linearly."""
        p10, median, p90 = np.percentile(np.asarray(samples, dtype=np.float64), [10, 50, 90]).tolist()
        return cls(median=median, p10=p10, p90=p90)


@dataclass(frozen=True)
class Timing:
    """One model in one dtype on one shape of batch; sample `i` is round `i`'s, in milliseconds a batch."""

    model: str
    dtype: str
    batch_size: int
    length: int
    samples_ms: tuple[float, ...]

    @property
    def milliseconds(self) -> Spread:
        """Median and spread of one forward pass of the whole batch."""
        return Spread.of(self.samples_ms)


@dataclass(frozen=True)
class Speedup:
    """How many times faster than a baseline (above 1: faster): spread of the ratios of paired rounds.

    `against` tells which of the baseline's dtypes it was held against: the same, or the fastest.
    """

    model: str
    dtype: str
    batch_size: int
    length: int
    baseline: str
    baseline_dtype: str
    against: Against
    ratio: Spread


@dataclass(frozen=True)
class LatencyTable:
    """Timings of several models, dtypes and shapes, taken in turns in one process.

    Args:
        timings: One per shape, model and dtype.
        baselines: Names of the models that the others are held against.
        threads: Threads torch used inside an operator.
        warmup: Untimed passes of each model before the first round.
        clock: `"wall"`, or `"cpu"` for the processor time of a single thread.
        device: Where it ran, such as `"cpu"`.
        machine: See `describe_machine`.
        versions: See `describe_versions`.
        backends: By model and dtype, as in `"small bf16"`, what computed the quantised linears; empty where the
            reference did.
    """

    timings: tuple[Timing, ...]
    baselines: tuple[str, ...]
    threads: int
    warmup: int
    clock: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    backends: dict[str, str] = field(default_factory=dict)

    @classmethod
    def taken_here(
        cls, timings: Sequence[Timing], baselines: Sequence[str], **settings: Any
    ) -> "LatencyTable":
        """Make a table that names this machine and these versions."""
        here = {"machine": describe_machine(), "versions": describe_versions()}
        return cls(timings=tuple(timings), baselines=tuple(baselines), **settings, **here)

    @property
    def rounds(self) -> int:
        """Number of paired samples behind each entry."""
        return len(self.timings[0].samples_ms) if self.timings else 0

    def speedups(self) -> tuple[Speedup, ...]:
        """Hold every timing against every baseline: in the same dtype, and in the baseline's best one.

        A model is not held against itself in one dtype: that ratio is 1 by definition.
        """
        found = []
        for timing in self.timings:
            for baseline in self.baselines:
                rivals = [rival for rival in self._same_shape(timing) if rival.model == baseline]
                best = min(rivals, key=lambda rival: rival.milliseconds.median)
                found += [
                    _held_against(timing, rival, "same_dtype")
                    for rival in rivals
                    if rival.dtype == timing.dtype
                ]
                found.append(_held_against(timing, best, "best_dtype"))
        return tuple(s for s in found if (s.model, s.dtype) != (s.baseline, s.baseline_dtype))

    def _same_shape(self, timing: Timing) -> list[Timing]:
        shape = (timing.batch_size, timing.length)
        return [other for other in self.timings if (other.batch_size, other.length) == shape]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data: the samples, and beside them the numbers computed from them."""
        timings = [
            asdict(timing)
            | {"samples_ms": list(timing.samples_ms), "milliseconds": asdict(timing.milliseconds)}
            for timing in self.timings
        ]
        data = {
            name: getattr(self, name)
            for name in ("threads", "warmup", "clock", "device", "machine", "versions")
        }
        speedups = [asdict(speedup) for speedup in self.speedups()]
        return {
            "schema": LATENCY_SCHEMA,
            "baselines": list(self.baselines),
            "rounds": self.rounds,
            **data,
            **({"backends": dict(self.backends)} if self.backends else {}),
            "timings": timings,
            "speedups": speedups,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LatencyTable":
        """Rebuild a table from `to_dict`'s data; computed numbers are computed anew.

        Raises:
            ValueError: If the schema is not the one this version writes, or a field is missing.
        """
        if data.get("schema") != LATENCY_SCHEMA:
            raise ValueError(
                f"latency table has schema {data.get('schema')!r}, this version reads {LATENCY_SCHEMA}: "
                "measure again with `lightning-compress bench`, or use the version that wrote it"
            )
        fields = ("baselines", "threads", "warmup", "clock", "device", "machine", "versions", "timings")
        missing = [name for name in fields if name not in data]
        if missing:
            raise ValueError(f"latency table lacks {missing}: it is not what LatencyTable.to_dict wrote")
        timings = tuple(
            Timing(
                model=str(row["model"]),
                dtype=str(row["dtype"]),
                batch_size=int(row["batch_size"]),
                length=int(row["length"]),
                samples_ms=tuple(float(sample) for sample in row["samples_ms"]),
            )
            for row in data["timings"]
        )
        plain = {name: data[name] for name in ("threads", "warmup", "clock", "device", "machine", "versions")}
        backends = dict(data.get("backends", {}))
        return cls(timings=timings, baselines=tuple(data["baselines"]), backends=backends, **plain)

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """Rebuild a table from `to_json`'s text."""
        return cls.from_dict(json.loads(text))

    def to_rich(self) -> Table:
        """Return a terminal table: a row per timing, a section per shape, two ratio columns per baseline."""
        table = Table(title="Latency", caption=self.caption(), box=box.SIMPLE, caption_justify="left")
        for heading in self.headings():
            words = escape(heading).replace(", ", "\n").replace(" × ", "\n× ")
            table.add_column(words, justify="left" if heading in ("model", "dtype") else "right")
        speedups = self.speedups()
        for index, timing in enumerate(self.timings):
            following = self.timings[index + 1 : index + 2]
            ends = any((t.batch_size, t.length) != (timing.batch_size, timing.length) for t in following)
            table.add_row(*map(escape, self.row(timing, speedups)), end_section=ends)
        return table

    def headings(self) -> list[str]:
        """Return the column headings that go with `row`."""
        ratios = [f"× {name}, {which} dtype" for name in self.baselines for which in ("same", "best")]
        return ["batch × length", "model", "dtype", "ms", "p10–p90", *ratios]

    def row(self, timing: Timing, speedups: Sequence[Speedup]) -> list[str]:
        """Return one timing's cells as text, in the order of `headings`."""
        spread = timing.milliseconds
        cells = [f"{timing.batch_size} × {timing.length}", timing.model, timing.dtype, _ms(spread.median)]
        cells.append(f"{_ms(spread.p10)}–{_ms(spread.p90)}")
        key = (timing.model, timing.dtype, timing.batch_size, timing.length)
        own = [speedup for speedup in speedups if _key(speedup) == key]
        for baseline in self.baselines:
            for against in ("same_dtype", "best_dtype"):
                match = [s.ratio for s in own if (s.baseline, s.against) == (baseline, against)]
                cells.append(f"{match[0].median:.2f}" if match else "–")
        return cells

    def to_measurements(self, command: str) -> dict[str, Any]:
        """Return the rows of `to_rich` as the `measurements` that `save_pretrained` writes into a model card.

        Args:
            command: The command that measured them.
        """
        speedups = self.speedups()
        rows = [dict(zip(self.headings(), self.row(t, speedups), strict=True)) for t in self.timings]
        return {"command": command, "machine": self.caption(), "versions": self.versions, "rows": rows}

    def caption(self) -> str:
        """Return one line that names the machine, the threads and the number of rounds."""
        flags = " ".join(self.machine.get("flags", []))
        where = self.machine.get("gpu") if self.device.startswith("cuda") else self.machine.get("cpu")
        return (
            f"{where} ({self.machine.get('cores')} cores; {flags}), {self.threads} thread(s), "
            f"torch {self.versions.get('torch', '?')}, {self.clock} clock, "
            f"median of {self.rounds} paired rounds"
        )


def _key(speedup: Speedup) -> tuple[str, str, int, int]:
    return speedup.model, speedup.dtype, speedup.batch_size, speedup.length


def _ms(value: float) -> str:
    """Milliseconds to three figures or so, without ever an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _held_against(timing: Timing, rival: Timing, against: Against) -> Speedup:
    """Spread of the per-round ratios: a slow moment of the machine slows both of a pair and cancels."""
    ratios = [theirs / ours for theirs, ours in zip(rival.samples_ms, timing.samples_ms, strict=True)]
    return Speedup(
        model=timing.model,
        dtype=timing.dtype,
        batch_size=timing.batch_size,
        length=timing.length,
        baseline=rival.model,
        baseline_dtype=rival.dtype,
        against=against,
        ratio=Spread.of(ratios),
    )

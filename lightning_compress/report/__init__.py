"""What a run came to, for people: latency tables and one self-contained page.

Read `record` for what a run leaves behind, then `page`, `sections` and `figures`; `latency` measures.
"""

from lightning_compress.report.bits_record import BitsRecord, OperatorBits
from lightning_compress.report.dropping_measurement import DroppingMeasurement, measure_dropping
from lightning_compress.report.dropping_record import DialRecord, DroppingRecord, TokenText
from lightning_compress.report.exit_record import ExitPointRecord, ExitsRecord
from lightning_compress.report.latency import measure_latency, run_bench
from lightning_compress.report.latency_table import LatencyTable
from lightning_compress.report.machine import describe_machine, describe_versions
from lightning_compress.report.model_counts import DenseCounts, ranks_of
from lightning_compress.report.page import render_run, write_report
from lightning_compress.report.record import FinalRecord, LayerRank, RunRecord, ScopeCounts, StepRecord
from lightning_compress.report.width_record import KeptOf, LayerWidth, WidthsRecord

__all__ = [
    "BitsRecord",
    "DenseCounts",
    "DialRecord",
    "DroppingMeasurement",
    "DroppingRecord",
    "ExitPointRecord",
    "ExitsRecord",
    "FinalRecord",
    "KeptOf",
    "LatencyTable",
    "LayerRank",
    "LayerWidth",
    "OperatorBits",
    "RunRecord",
    "ScopeCounts",
    "StepRecord",
    "TokenText",
    "WidthsRecord",
    "describe_machine",
    "describe_versions",
    "measure_dropping",
    "measure_latency",
    "ranks_of",
    "render_run",
    "run_bench",
    "write_report",
]

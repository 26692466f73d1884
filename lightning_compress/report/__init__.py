"""What a run came to, for people: latency tables and one self-contained page.

Read `record` for what a run leaves behind, then `page` and `figures`; `latency` measures.
"""

from lightning_compress.report.latency import measure_latency, run_bench
from lightning_compress.report.latency_table import LatencyTable
from lightning_compress.report.machine import describe_machine, describe_versions

__all__ = ["LatencyTable", "describe_machine", "describe_versions", "measure_latency", "run_bench"]

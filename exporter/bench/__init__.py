"""stm bench: latency, throughput, memory and per-node time, against rivals in the same interleaved rounds.

`bench(...)` measures and returns a `BenchResult`; `read_json` reads earlier ones back. Nothing heavy is imported before it runs.
"""

from .report import read_json, update_document
from .results import BenchResult, Case, Comparison, Measurement, Skipped
from .runner import bench
from .timing import Method

__all__ = ["BenchResult", "Case", "Comparison", "Measurement", "Method", "Skipped", "bench", "read_json", "update_document"]

"""
Normalization beside PyTorch, forward and backward, at the shapes of the comparison: `make bench`.

``GB/s`` in extra_info counts the fewest bytes that the call must move.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import compare_norm
import fastopt
from interleave import OURS, Row


@pytest.mark.parametrize("library", [OURS, "torch"])
@pytest.mark.parametrize("row", list(compare_norm.rows()), ids=lambda row: row.name)
def test_norm(benchmark: BenchmarkFixture, row: Row, library: str) -> None:
    benchmark.group = row.name
    candidates = row.build(fastopt.get_config()["num_threads"])  # which compares their results
    if library not in candidates:
        pytest.skip(f"{library} has no part in this row")
    benchmark(candidates[library].call)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(row.moved / benchmark.stats.stats.median / 1e9, 1)

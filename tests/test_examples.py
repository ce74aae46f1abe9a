"""
The quick examples run and draw their pictures; in a copy, so that none is overwritten.

Those that train on the digits take minutes: `make demo` and `make pictures` run them.
"""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

import fastopt

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = [
    "batch_sizes",
    "draw_schedules",
    "escape_saddle",
    "fit_parabola",
    "loss_surface",
    "mse_vs_cross_entropy",
    "optimizer_paths",
    "temperatures",
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("run") / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return copy


@pytest.mark.parametrize("name", QUICK)
def test_draws(name: str, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    monkeypatch.syspath_prepend(examples)
    with fastopt.config_context(num_threads=1):  # the arrays are tiny
        runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    plt.close("all")
    assert (examples / "output" / f"{name}.png").stat().st_size > 10_000

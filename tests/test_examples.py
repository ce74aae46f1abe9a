"""The examples run and draw their pictures; in a copy, so that none is overwritten."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

import fastopt

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMANDS = [
    "batch_sizes",
    "draw_schedules",
    "escape_saddle",
    "fit_parabola",
    "loss_surface",
    "mse_vs_cross_entropy",
    "optimizer_paths",
    "storage --steps 60 --epochs 1",
    "temperatures",
    "train_digits --epochs 2",
    pytest.param("train_torch --epochs 1", marks=pytest.mark.torch),
    "tune_digits --trials 2",
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("run") / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return copy


@pytest.mark.parametrize("command", COMMANDS)
def test_draws(command: str, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = command.split()
    matplotlib.use("agg")
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with fastopt.config_context(num_threads=1):  # the arrays are tiny
        runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    plt.close("all")
    assert (examples / "output" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.skipif(not find_spec("mpi4py"), reason="`make test-mpi` installs mpi4py")
@pytest.mark.parametrize("ranks", [1, 2])
def test_distributed(ranks: int, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("MPIEXEC_TIMEOUT", "100")
    picture = examples / "output" / "train_distributed.png"
    picture.unlink(missing_ok=True)
    mpiexec = Path(sys.executable).with_name("mpiexec")
    script = [sys.executable, str(examples / "train_distributed.py"), "--epochs", "2"]
    subprocess.run([str(mpiexec), "-n", str(ranks), *script], check=True)
    assert picture.stat().st_size > 10_000


def test_the_paths_of_every_optimizer_are_drawn() -> None:
    drawn = (EXAMPLES / "optimizer_paths.py").read_text()
    needs_matrices, like_adam_without_decay = "Muon", "AdamW"
    missing = {name for name in fastopt.Optimizer.registry if f"fastopt.{name}(" not in drawn}
    assert missing == {needs_matrices, like_adam_without_decay}

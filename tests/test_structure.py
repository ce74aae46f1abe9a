"""The rooms of the C++ code: arrows run from bindings to core to kernels, never back."""

from __future__ import annotations

from pathlib import Path

import pytest

CPP = Path(__file__).parents[1] / "cpp"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("core", "pybind11"), ("core", "bindings/"), ("kernels", "#include <"), ("kernels", "core/")],
)
def test_no_arrow_runs_back(room: str, forbidden: str) -> None:
    files = sorted((CPP / room).glob("*.[hc]*"))
    assert files
    assert [file.name for file in files if forbidden in file.read_text()] == []

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


def test_files_are_short() -> None:
    """Blank lines and comments do not count."""

    def lines_of_code(file: Path) -> int:
        lines = [line.strip() for line in file.read_text().splitlines()]
        return sum(line != "" and not line.startswith("//") for line in lines)

    lengths = {file.name: lines_of_code(file) for file in CPP.glob("*/*.[hc]*")}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 450} == {}

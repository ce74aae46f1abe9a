"""The rooms of the C++ code: arrows run from bindings to core to kernels, never back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CPP = Path(__file__).parents[1] / "cpp"
FILES = sorted(CPP.glob("*/*.[hc]*"))


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("core", "pybind11"), ("core", "bindings/"), ("kernels", "#include <"), ("kernels", "core/")],
)
def test_no_arrow_runs_back(room: str, forbidden: str) -> None:
    files = sorted((CPP / room).glob("*.[hc]*"))
    assert files
    assert [file.name for file in files if forbidden in file.read_text()] == []


def test_only_arrays_knows_numpy() -> None:
    numpy = re.compile(
        r"numpy|npy|py::array|py::dtype|array_proxy|c_style|\.flags\(\)|\.dtype\(\)\."
    )
    knowing = [file.name for file in FILES if numpy.search(file.read_text())]
    assert knowing == ["arrays.cpp", "arrays.h"]


def lines_of_code(lines: list[str]) -> int:
    """Blank lines and comments do not count."""
    stripped = [line.strip() for line in lines]
    return sum(line != "" and not line.startswith("//") for line in stripped)


def functions(file: Path) -> Iterator[list[str]]:
    """Without their last line: as clang-format lays code out, both ends are indented alike."""
    lines = file.read_text().splitlines()
    for end, line in enumerate(lines):
        if line.strip() == "}":
            indent = line.index("}")
            begin = end - 1
            while not lines[begin][: indent + 1].strip(" #"):
                begin -= 1
            if not re.match(r" *(if|for|while|switch|[{}])", lines[begin]):
                yield lines[begin:end]


def parameter_count(function: list[str]) -> int:
    parameters = " ".join(function).replace("operator()", "operator").partition("(")[2]
    depth = commas = 0
    for character in parameters:
        depth += (character in "([{<") - (character in ")]}>")
        if depth < 0:
            break
        commas += depth == 0 and character == ","
    return 1 + commas


def test_files_are_short() -> None:
    lengths = {file.name: lines_of_code(file.read_text().splitlines()) for file in FILES}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_functions_are_short() -> None:
    found = [function for file in FILES for function in functions(file)]
    assert len(found) > 300
    assert [function[0] for function in found if lines_of_code(function) > 60] == []
    assert [function[0] for function in found if parameter_count(function) > 8] == []

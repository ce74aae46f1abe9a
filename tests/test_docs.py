"""The code of the README and of every page of the documentation runs, and prints what it says."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import runpy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import fastopt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.M | re.S)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]
BESIDE = re.compile(r"^import (jax|torch)$", re.M)  # what `make test-torch` installs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")


def run(page: Path, beside: bool) -> None:
    """Blocks share their page's names; a text block right after one is its output."""
    text = page.read_text()
    if "mpi4py" in text:
        pytest.importorskip("mpi4py", reason="`make test-mpi` installs mpi4py")
    names: dict[str, Any] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        if BESIDE.search(block[1]) and not beside:
            continue
        line = text.count("\n", 0, block.start(1))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
        if block[2] is not None:
            assert printed.getvalue() == block[2], f"{page.name}, line {line + 1}"


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_runs(page: Path) -> None:
    run(page, beside=False)


@pytest.mark.torch
@pytest.mark.parametrize(
    "page", [page for page in WITH_CODE if BESIDE.search(page.read_text())], ids=lambda p: p.name
)
def test_code_beside_other_libraries_runs(page: Path) -> None:
    run(page, beside=True)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_there_is_no_block_of_code_that_does_not_run(page: Path) -> None:
    rest = BLOCK.sub("", page.read_text())
    others = set(re.findall(r"^\W*(?:```|~~~)`*([^`\s].*)", rest, re.M))
    assert {other for other in others if not other.startswith("{")} <= {"sh"}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)) <= set(targets)
    extras = ",".join(re.findall(r"pip install '?\.\[([\w,]+)\]", text)).split(",")
    assert set(extras) - {""} <= set(metadata.metadata("fastopt").get_all("Provides-Extra") or ())


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_lists_every_optimizer() -> None:
    row = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "| Optimizers |" in line
    )
    assert [name for name in fastopt.Optimizer.registry if f"`{name}`" not in row] == []


@pytest.mark.parametrize("optimizer", fastopt.Optimizer.registry.values(), ids=lambda o: o.__name__)
def test_docstrings_say_what_an_optimizer_is_for_and_explain_its_options(optimizer: Any) -> None:
    doc = inspect.getdoc(optimizer) or ""
    assert doc.split("\n\n")[1].startswith("For ")
    alone = r"^(\w+) : (?!.*bool).*\n    (?:At least|Above|In|From) [^ ]+$"
    assert re.findall(alone, doc, re.M) == []


@pytest.mark.parametrize(
    ("formula", "tex"),
    [
        ("p = p - lr g / |g| u", r"p \leftarrow p - \frac{\text{lr}\ g}{\left| g \right|} u"),
        ("m_hat = m / (1 - beta1^t)", r"\hat{m} = \frac{m}{1 - \beta_{1}^{t}}"),
        ("sqrt(v) * g_old", r"\sqrt{v} \cdot g_{\text{old}}"),
        ("0 in the first step", r"0\ \text{in the first step}"),
    ],
)
def test_formulas_of_docstrings_become_tex(formula: str, tex: str) -> None:
    assert runpy.run_path(str(ROOT / "docs" / "formulas.py"))["tex"](formula) == tex

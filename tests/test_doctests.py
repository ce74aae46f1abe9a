"""The examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import fastopt

OPENMP = "fastopt.libfogomp"  # a library beside _core, no module
MODULES = [
    "fastopt",
    *(
        m.name
        for m in pkgutil.walk_packages(fastopt.__path__, "fastopt.", onerror=lambda name: None)
        if m.name != OPENMP and not m.name.startswith(("fastopt.torch", "fastopt.distributed"))
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, restored_config: None) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    examples = [e for test in doctest.DocTestFinder().find(module) for e in test.examples]
    assert not any(doctest.SKIP in example.options for example in examples)


PUBLIC = [name for name in fastopt.__all__ if not inspect.ismodule(getattr(fastopt, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name: str) -> None:
    """With an example, in its own docstring or in those of its methods."""
    documented = getattr(fastopt, name)
    assert inspect.getdoc(documented)
    assert any(test.examples for test in doctest.DocTestFinder().find(documented, name))

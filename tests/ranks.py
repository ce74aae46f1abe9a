"""What the tests of `fastopt.distributed` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

import fastopt

on_ranks = pytest.mark.parallel(nprocs=[1, 2, 3, 4])

COMM = MPI.COMM_WORLD
Arrays = dict[str, NDArray[Any]]
NAMES = list(fastopt.Optimizer.registry)
SHAPES: dict[str, tuple[int, ...]] = {
    "W": (70, 33),
    "b": (5,),
    "E": (3000, 2),
    "s": (),
    "z": (0, 3),
}
MATRICES: dict[str, tuple[int, ...]] = {"W": (70, 33), "small": (2, 2), "E": (300, 2)}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return MATRICES if name == "Muon" else SHAPES


def drawn(
    rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float64
) -> Arrays:
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def copied(tree: Arrays) -> Arrays:
    return {name: array.copy("K") for name, array in tree.items()}


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert a[name].tobytes() == b[name].tobytes(), name

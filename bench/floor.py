"""The floor of a job: the fastest of several kernels that move its bytes and hardly compute."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interleave import Candidate

# Elements ahead, or not prefetched; and on one thread, because waking others takes microseconds.
VARIANTS = {"floor": 0, "floor 512 ahead": 512, "floor 1024 ahead": 1024, "floor serial": 0}
LINE, PAGE = 64, 4096  # bytes


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "floor.so"
        source = Path(__file__).with_suffix(".cpp")
        flags = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", path], check=True)
        return ctypes.CDLL(str(path))


def address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def stream(count: int, dtype: str, number: int) -> NDArray[Any]:
    """Ones that begin at a cache line, and no two streams at the same place of a page."""
    real = np.dtype(dtype)
    memory = np.ones(count + PAGE // real.itemsize, real)
    place = (17 * number * LINE - memory.ctypes.data) % PAGE
    return memory[place // real.itemsize :][:count]


def update(
    gradient: NDArray[Any], streams: Sequence[NDArray[Any]], threads: int
) -> dict[str, Candidate]:
    """Candidates that read a gradient and change the streams in place."""
    step = library().floor_step
    pointers = (ctypes.c_void_p * len(streams))(*(array.ctypes.data for array in streams))

    def candidate(name: str, ahead: int) -> Candidate:
        distance = ctypes.c_ssize_t(ahead)
        team = 1 if name == "floor serial" else threads
        size = ctypes.c_ssize_t(gradient.size)
        shape = (size, len(streams), gradient.itemsize)
        arguments = (*shape, address(gradient), pointers, distance, team)
        # The arrays live as long as the candidate.
        return Candidate(lambda _=(gradient, streams): step(*arguments))  # type: ignore[misc]

    candidates = {name: candidate(name, ahead) for name, ahead in VARIANTS.items()}
    for each in candidates.values():
        expected = [a + b for a, b in zip(streams, (gradient, *(1,) * len(streams)), strict=False)]
        each.call()
        for array, value in zip(streams, expected, strict=True):
            assert np.array_equal(array, value), "the floor did something else"
    return candidates


def write(inputs: Sequence[NDArray[Any]], threads: int) -> dict[str, Candidate]:
    """Candidates that read one or two float32 arrays and write one, which is mapped already."""
    move = library().floor_write
    x, dy = inputs[0], inputs[1] if len(inputs) > 1 else None
    y = np.zeros_like(x)
    second = None if dy is None else address(dy)

    def candidate(streaming: int) -> Candidate:
        arguments = (ctypes.c_ssize_t(x.size), address(x), second, address(y), streaming, threads)
        return Candidate(lambda _=(x, dy, y): move(*arguments))  # type: ignore[misc]

    candidates = {f"floor {name}": candidate(k) for k, name in enumerate(("stored", "streamed"))}
    for each in candidates.values():
        y[...] = 0
        each.call()
        assert np.array_equal(y, x + (1 if dy is None else dy)), "the floor did something else"
    return candidates

"""The caller's floating-point environment, changed for a test."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

FLUSH_TO_ZERO, DENORMALS_ARE_ZERO, ROUND_UP = 0x8000, 0x0040, 0x4000
TRAPS = 0x0F80  # masks of all exceptions but that of an inexact result
needs_mxcsr = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="reads the control register of SSE out of glibc's fenv_t",
)


@contextmanager
def control_register(flags: int, clear: int = 0) -> Iterator[ctypes.Array[ctypes.c_uint32]]:
    """Sets and clears flags in MXCSR; afterwards the yielded environment is what the body left."""
    libm = ctypes.CDLL("libm.so.6")
    before, inside, after = ((ctypes.c_uint32 * 8)() for _ in range(3))
    libm.fegetenv(before)
    ctypes.memmove(inside, before, ctypes.sizeof(before))
    inside[7] = inside[7] & ~clear | flags
    libm.fesetenv(inside)
    try:
        yield after
    finally:
        libm.fegetenv(after)
        libm.fesetenv(before)

"""
The kernels' float32 exp on all 2**32 inputs, and log on all positive ones, against float64.

Not a part of the quick tests: `make test-exhaustive` runs it in a few minutes. Prints the largest
errors, in units of the last place of the exact result where that is a normal number; fails where
one is above 2, or a special value or the order of magnitude is wrong.
"""

from __future__ import annotations

import sys

import numpy as np

import fastopt
from fastopt import _core

CHUNK = 1 << 24
NORMAL = np.finfo(np.float32).tiny


def largest_error(name: str) -> float:
    ours, exact = getattr(_core, name), getattr(np, name)
    worst = 0.0
    for start in range(0, 1 << 32, CHUNK):
        x = np.arange(start, start + CHUNK, dtype=np.uint64).astype(np.uint32).view(np.float32)
        result = ours(x)
        expected = exact(x.astype(np.float64))
        rounded = expected.astype(np.float32)
        normal = np.isfinite(rounded) & (np.abs(expected) >= NORMAL)
        # What is no normal number: NaN, infinity and zero agree; below normal, exp may give zero.
        special = ~normal & ~(np.abs(expected) < NORMAL)
        np.testing.assert_array_equal(result[special], rounded[special])
        small = np.abs(expected) < NORMAL
        assert (np.abs(result[small]) <= NORMAL).all()
        unit = np.spacing(np.abs(rounded[normal])).astype(np.float64)
        error = np.abs(result[normal] - expected[normal]) / unit
        assert np.isfinite(error).all()
        worst = max(worst, float(error.max(initial=0)))
    return worst


def main() -> None:
    failed = False
    with np.errstate(all="ignore"), fastopt.config_context(denormals="preserve"):
        for name in ("exp", "log"):
            error = largest_error(name)
            failed |= error > 2
            print(f"{name}: {error:.4f} units in the last place at most")
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""
Loads the kernels, and with them OpenMP, whose idle threads are to sleep soon.

By default they spin for milliseconds after their work, on the processors that NumPy's BLAS wants
next: a training loop on two cores took ten times as long. The runtimes read how long only once,
when they are loaded, and only from the environment, which is as before afterwards. What the user
has set there stays.
"""

from __future__ import annotations

import os

_SPINNING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}  # of GCC's runtime, of LLVM's
_ours = {
    name: value
    for name, value in _SPINNING.items()
    if name not in os.environ and "OMP_WAIT_POLICY" not in os.environ
}
os.environ.update(_ours)
try:
    from fastopt import _core
finally:
    for _name in _ours:
        del os.environ[_name]

__all__ = ["_core"]

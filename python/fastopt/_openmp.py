"""
Loads the kernels, and with them an OpenMP runtime of their own, whose idle threads sleep soon.

By default they spin for milliseconds after their work, on the processors that NumPy's BLAS wants
next: a training loop on two cores took ten times as long. The runtime reads how long only once,
when it is loaded, and only from the environment, which is as before afterwards. What the user has
set there stays.
"""

from __future__ import annotations

import os

_spin = "GOMP_SPINCOUNT"
_ours = _spin not in os.environ and "OMP_WAIT_POLICY" not in os.environ
if _ours:
    os.environ[_spin] = "3000"
try:
    from fastopt import _core
finally:
    if _ours:
        del os.environ[_spin]

__all__ = ["_core"]

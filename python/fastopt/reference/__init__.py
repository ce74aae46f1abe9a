"""
Every formula of the library in plain NumPy.

These functions are what the kernels are tested against. They change nothing in place, take
and return arrays, and are written to be read beside the paper. The optimizers' rules equal
the kernels bit for bit when subnormals are preserved
(``fastopt.set_config(denormals="preserve")``).
"""

import sys
from typing import TYPE_CHECKING, Any

from fastopt.averages import ema
from fastopt.optimizers import Optimizer
from fastopt.reference.losses import log_softmax, mse, softmax, softmax_cross_entropy
from fastopt.reference.norm import (
    batch_norm,
    batch_norm_backward,
    batch_renorm,
    batch_renorm_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    running_average,
    spectral_norm,
    weight_norm,
)

# The function of an optimizer stands beside its class, and has its name in snake case.
OPTIMIZERS = {
    cls.__name__: function
    for cls in Optimizer.registry.values()
    for name, function in vars(sys.modules[cls.__module__]).items()
    if name.replace("_", "") == cls.__name__.lower() and not name.startswith("_")
}
_functions = {function.__name__: function for function in OPTIMIZERS.values()}
globals().update(_functions)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__all__ = [
    *_functions,
    "batch_norm",
    "batch_norm_backward",
    "batch_renorm",
    "batch_renorm_backward",
    "ema",
    "group_norm",
    "group_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "log_softmax",
    "mse",
    "rms_norm",
    "rms_norm_backward",
    "running_average",
    "softmax",
    "softmax_cross_entropy",
    "spectral_norm",
    "weight_norm",
]

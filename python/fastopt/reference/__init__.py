"""
Every formula of the library in plain NumPy.

These functions are what the kernels are tested against. They change nothing in place, take
and return arrays, and are written to be read beside the paper. The optimizers' rules equal
the kernels bit for bit when subnormals are preserved
(``fastopt.set_config(denormals="preserve")``).
"""

from fastopt.reference.losses import log_softmax, mse, softmax, softmax_cross_entropy
from fastopt.reference.optimizers import adadelta, adagrad, adam, adamw, ema, rmsprop, sgd

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "ema",
    "log_softmax",
    "mse",
    "rmsprop",
    "sgd",
    "softmax",
    "softmax_cross_entropy",
]

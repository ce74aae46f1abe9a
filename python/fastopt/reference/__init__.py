"""
Every formula of the library in plain NumPy.

These functions are what the kernels are tested against. They change nothing in place, take
and return arrays, and are written to be read beside the paper. The optimizers' rules equal
the kernels bit for bit when subnormals are preserved
(``fastopt.set_config(denormals="preserve")``).
"""

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
from fastopt.reference.optimizers import adadelta, adagrad, adam, adamw, ema, rmsprop, sgd

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
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
    "rmsprop",
    "running_average",
    "sgd",
    "softmax",
    "softmax_cross_entropy",
    "spectral_norm",
    "weight_norm",
]

"""Training with NumPy arrays, as fast as the memory allows."""

from fastopt import _openmp as _openmp  # first: it decides how OpenMP is loaded
from fastopt import codecs, curvature, data, gradcheck, init, losses, reference, schedules, tune
from fastopt._config import config_context, get_config, set_config, show_config
from fastopt.averages import ExponentialMovingAverage, exponential_moving_average
from fastopt.norm import *
from fastopt.optimizers import *

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "ExponentialMovingAverage",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "averages",
    "batch_norm",
    "batch_norm_backward",
    "batch_renorm",
    "batch_renorm_backward",
    "codecs",
    "config_context",
    "curvature",
    "data",
    "empty_cache",
    "exponential_moving_average",
    "get_config",
    "gradcheck",
    "group_norm",
    "group_norm_backward",
    "init",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "losses",
    "norm",
    "optimizers",
    "reference",
    "rms_norm",
    "rms_norm_backward",
    "schedules",
    "set_config",
    "show_config",
    "spectral_norm",
    "spectral_norm_backward",
    "tune",
    "weight_norm",
    "weight_norm_backward",
]
__all__ += ["Optimizer", *Optimizer.registry]

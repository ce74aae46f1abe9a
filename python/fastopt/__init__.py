"""Training with NumPy arrays, as fast as the memory allows."""

from fastopt import curvature, data, gradcheck, init, losses, reference, schedules, tune
from fastopt._config import config_context, get_config, set_config, show_config
from fastopt.averages import ExponentialMovingAverage, exponential_moving_average
from fastopt.optimizer import Optimizer
from fastopt.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "ExponentialMovingAverage",
    "Optimizer",
    "RMSprop",
    "config_context",
    "curvature",
    "data",
    "exponential_moving_average",
    "get_config",
    "gradcheck",
    "init",
    "losses",
    "reference",
    "schedules",
    "set_config",
    "show_config",
    "tune",
]

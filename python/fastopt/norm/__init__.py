"""
Normalization of activations: forward and backward, as functions.

Every forward function returns ``(y, saved)``; its ``*_backward(dy, saved)`` gives the gradients.
``saved`` refers to the arrays of the forward call: x, gamma and beta (and y, where a residual was
added before ``activation="relu"``) must not change before the backward call. An array that a call
writes may share no memory with another one of the call, except where ``out`` says so.

Statistics are computed without cancellation and kept in float64; the mean of 1e6 values of mean
1e4 and standard deviation 1 is good to the last bit of float32, and so is their variance. Results
have the same bits on every instruction set and for every number of threads.
"""

from __future__ import annotations

from fastopt import _core
from fastopt.norm.batch import batch_norm, batch_norm_backward, batch_renorm, batch_renorm_backward
from fastopt.norm.group import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
)
from fastopt.norm.layer import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from fastopt.norm.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from fastopt.norm.weights import (
    spectral_norm,
    spectral_norm_backward,
    weight_norm,
    weight_norm_backward,
)

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "batch_norm",
    "batch_norm_backward",
    "batch_renorm",
    "batch_renorm_backward",
    "empty_cache",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "spectral_norm",
    "spectral_norm_backward",
    "weight_norm",
    "weight_norm_backward",
]


def empty_cache() -> None:
    """
    Return the memory that is kept for coming calls to the system.

    The memory of a large output that was dropped, and of a large scratch array, is used again for
    the next one of its size; up to 1 GiB is kept. Arrays in use are not touched.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.empty_cache()
    """
    _core.empty_cache()

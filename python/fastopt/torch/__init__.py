"""
The optimizers over PyTorch's tensors: `fastopt.torch.AdamW` takes the place of torch.optim.AdamW.

Every optimizer of the library is here, generated from `fastopt.Optimizer.registry`; and torch's
normalization layers, with this library's forward and backward passes.
"""

from __future__ import annotations

from typing import Any

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("fastopt.torch needs PyTorch: pip install 'fastopt[torch]'") from error
if not hasattr(_torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"fastopt.torch needs PyTorch 2.10 or later, and this is {_torch.__version__}: "
        "pip install 'fastopt[torch]'"
    )

from fastopt import Optimizer as _Optimizer
from fastopt.torch import norm as _norm
from fastopt.torch.norm import *
from fastopt.torch.optimizers import door as _door

__all__ = [*_Optimizer.registry, *_norm.__all__]


def __getattr__(name: str) -> Any:
    if name not in _Optimizer.registry:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _door(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

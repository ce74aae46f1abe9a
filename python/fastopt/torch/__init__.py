"""
The optimizers over PyTorch's tensors: `fastopt.torch.AdamW` takes the place of torch.optim.AdamW.

Every optimizer of the library is here, generated from `fastopt.Optimizer.registry`.
"""

from __future__ import annotations

from functools import cache

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
from fastopt.torch.optimizers import door as _door

__all__ = [*_Optimizer.registry]


@cache
def __getattr__(name: str) -> type[_torch.optim.Optimizer]:
    if name not in _Optimizer.registry:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _door(_Optimizer.registry[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

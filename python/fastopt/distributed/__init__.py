"""
Data-parallel training over MPI: every rank has a part of each batch, and all have one model.

`DistributedOptimizer` averages the ranks' gradients and divides states and step among them,
`SyncBatchNorm` takes its statistics over all ranks, and ``shard=`` of `fastopt.data.minibatches`
gives every rank its part. ``mpiexec -n 4 python train.py`` starts 4 ranks of a script.
"""

try:
    import mpi4py as _mpi4py  # noqa: F401
except ImportError as error:
    raise ImportError("fastopt.distributed needs mpi4py: pip install 'fastopt[mpi]'") from error

from fastopt.distributed.norm import *
from fastopt.distributed.optimizer import *
from fastopt.distributed.trees import *

__all__ = ["DistributedOptimizer", "SyncBatchNorm", "broadcast", "flatten"]

"""Trees of arrays on one array, and from one rank to all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from mpi4py import MPI

from fastopt._tree import Array, Tree, named_arrays, rebuild
from fastopt.distributed._together import check_same, communicator, together
from fastopt.distributed.optimizer import DistributedOptimizer
from fastopt.norm.layers import Layer
from fastopt.optimizers.base import Optimizer

__all__ = ["broadcast", "flatten"]


def flatten(params: Tree) -> Any:
    """
    Return the tree with copies of its arrays that are views of one flat array for each dtype.

    Parameters
    ----------
    params : array or tree of arrays

    Returns
    -------
    tree
        Of the same structure: mappings as dicts, other sequences than tuples as lists. Every array
        is in C order, and they follow each other in the order of the tree.

    Raises
    ------
    TypeError, ValueError
        If params is not a tree of floating-point arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.distributed import flatten
    >>> params = flatten({"W": np.ones((2, 2)), "b": np.zeros(2)})
    >>> params["W"].base is params["b"].base
    True
    >>> params["b"].base
    array([1., 1., 1., 1., 0., 0.])
    """
    arrays = list(named_arrays(params, "flatten: params").values())
    views: dict[int, Array] = {}
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        members = [i for i, array in enumerate(arrays) if array.dtype == dtype]
        ends = list(accumulate(arrays[i].size for i in members))
        flat = np.empty(ends[-1], dtype)
        for i, end in zip(members, ends, strict=True):
            views[i] = flat[end - arrays[i].size : end].reshape(arrays[i].shape)
            views[i][...] = arrays[i]
    return rebuild(params, (views[i] for i in range(len(arrays))))


def broadcast(what: Any, comm: MPI.Intracomm | None = None, root: int = 0) -> None:
    """
    Make arrays on all ranks what they are on one of them: before training, all have one model.

    Parameters
    ----------
    what : tree of arrays, layer, optimizer, or a list or dict of those
        Changed in place: arrays; a layer's parameters and running statistics; an optimizer's
        states, hyper-parameters and counts, not its parameters. A `DistributedOptimizer`, of the
        same ranks, keeps its states, which are divided, and takes the rest.
    comm : mpi4py.MPI.Intracomm, optional
        By default ``MPI.COMM_WORLD``.
    root : int, default 0
        The rank whose arrays are taken.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if names, shapes or dtypes are not the same on all, or an array is read-only.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from fastopt.distributed import broadcast
    >>> params = {"W": np.full(2, float(MPI.COMM_WORLD.rank))}
    >>> broadcast(params)
    >>> params["W"]
    array([0., 0.])
    """
    comm = communicator("broadcast: comm", comm)
    with together(comm):
        if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < comm.size:
            raise ValueError(f"broadcast: root is {root!r}, expected a rank below {comm.size}")
        parts = list(_parts(what, ""))
        arrays = {name: part for name, part in parts if isinstance(part, np.ndarray)}
        for name, array in arrays.items():
            if not array.flags.writeable:
                raise ValueError(f"broadcast: {name or 'the array'} is read-only")
        for name, part in parts:
            if isinstance(part, DistributedOptimizer) and part._comm.Compare(comm) > MPI.CONGRUENT:
                raise ValueError(f"broadcast: {name or 'the optimizer'} is of other ranks")
    kinds = {name: type(part).__name__ for name, part in parts}
    about = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    check_same(comm, "broadcast", {"root": root, **kinds, **about})
    for array in arrays.values():
        message = np.array(array, order="C")
        comm.Bcast(message.reshape(-1).view(np.uint8), root)
        array[...] = message
    for _, part in parts:
        if not isinstance(part, np.ndarray):
            is_needed = comm.rank == root or isinstance(part, DistributedOptimizer)
            state = comm.bcast(part.state_dict() if is_needed else None, root)
            with together(comm):
                part.load_state_dict(state)


def _parts(what: Any, path: str) -> Iterator[tuple[str, Array | Optimizer | DistributedOptimizer]]:
    """The arrays and optimizers in it, by dotted name."""
    if isinstance(what, (np.ndarray, Optimizer, DistributedOptimizer)):
        yield path, what
        return
    if isinstance(what, Layer):
        items: Any = what._arrays().items()
    elif isinstance(what, Mapping):
        items = what.items()
    elif isinstance(what, Sequence) and not isinstance(what, (str, bytes)):
        items = enumerate(what)
    else:
        raise TypeError(
            f"broadcast: {path or 'what'} is of type {type(what).__name__}, expected arrays, "
            "layers, optimizers, or lists or dicts of those"
        )
    for key, value in items:
        yield from _parts(value, f"{path}.{key}" if path else str(key))

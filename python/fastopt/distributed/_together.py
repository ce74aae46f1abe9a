"""Errors of one rank are errors of all: nobody waits for a rank that does not come."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from fastopt import _config


def communicator(where: str, comm: Any) -> MPI.Intracomm:
    """Return a communicator, by default that of all ranks."""
    if comm is None:
        return MPI.COMM_WORLD
    if isinstance(comm, MPI.Intracomm) and comm != MPI.COMM_NULL:
        return comm
    raise TypeError(f"{where} is {comm!r}, expected an mpi4py.MPI.Intracomm")


def agree(comm: MPI.Intracomm, error: Exception | None = None) -> None:
    """Return if no rank has an error; else raise that of the first one on all."""
    said = None if error is None else (type(error).__name__, str(error))
    for rank, other in enumerate(comm.allgather(said)):
        if other is None:
            continue
        if rank == comm.rank and error is not None:
            raise error
        name, message = other
        kind = getattr(builtins, name, RuntimeError)
        try:
            raised = kind(f"rank {rank}: {message}")
        except TypeError:  # one that is not made of a message alone
            raised = RuntimeError(f"rank {rank}: {name}: {message}")
        raise raised from error


@contextmanager
def together(comm: MPI.Intracomm) -> Iterator[None]:
    """What fails in here on one rank fails on all."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(comm, error)


def check_same(comm: MPI.Intracomm, caller: str, own: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks where they say different things, all of which have a repr."""
    texts = {name: repr(value) for name, value in own.items()}
    first, *others = comm.allgather(texts)
    for rank, other in enumerate(others, 1):
        for name in [*first, *other]:
            here, there = (said.get(name, "not there") for said in (first, other))
            if here != there:
                raise ValueError(
                    f"{caller}: {name} is {here} on rank 0, and {there} on rank {rank}"
                )


class Peers:
    """What a step asks of the other ranks."""

    def __init__(self, comm: MPI.Intracomm, blocks: tuple[int, list[slice]] | None) -> None:
        self._comm, self._blocks = comm, blocks
        self.met = self.agreed = False

    def agree(self) -> None:
        """Return where all ranks are ready to step; else raise."""
        self.met = True
        agree(self._comm)
        self.agreed = True

    def add(self, sums: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Return the sums of all blocks for those of the pieces: so many numbers a block."""
        if self._blocks is None:
            return sums
        blocks, own = self._blocks
        everyone = np.zeros((blocks, count))
        at = 0
        for place in own:
            n = place.stop - place.start
            everyone[place] = sums.reshape(-1, count)[at : at + n]
            at += n
        self._comm.Allreduce(MPI.IN_PLACE, everyone)
        return everyone.reshape(-1)


def share_of_threads(comm: MPI.Intracomm) -> int:
    """Return those of this rank: the ranks that may use the same processors divide them."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    beside = sum(bool(own & other) or own == other for other in node.allgather(own))
    node.Free()
    return int(max(1, _config.get_config()["num_threads"] // beside))

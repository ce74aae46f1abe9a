"""The time in MPI's calls, the waiting for other ranks in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI


class Wire(MPI.Intracomm):  # type: ignore[misc]
    """A communicator that counts the seconds in its calls, since they were last set to 0."""

    seconds = 0.0


def _counted(name: str) -> Callable[..., Any]:
    method = getattr(MPI.Intracomm, name)

    def call(self: Wire, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = method(self, *arguments)
        self.seconds += time.perf_counter() - start
        return result

    return call


for _name in (
    "allgather",
    "Allgather",
    "Allreduce",
    "Reduce_scatter",
    "Reduce_scatter_block",
    "Sendrecv",
):
    setattr(Wire, _name, _counted(_name))

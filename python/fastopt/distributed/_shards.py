"""Which elements of the arrays every rank steps, and how they get there and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from mpi4py import MPI

from fastopt._tree import Array, compute_dtype

BLOCK = 1024  # elements: sums, scales and tiles do not reach over a multiple of it

Piece = tuple[int, int]  # the first element of an array, and the end, in C order


def cut(sizes: Sequence[int], divisible: Sequence[bool], ranks: int) -> list[list[Piece]]:
    """Return every rank's piece of every array: nothing or all where that is not divisible."""
    pieces = [[(0, 0)] * len(sizes) for _ in range(ranks)]
    loads = [0] * ranks
    whole = [i for i in range(len(sizes)) if not divisible[i]]
    for i in sorted(whole, key=lambda i: -sizes[i]):
        rank = loads.index(min(loads))
        pieces[rank][i] = (0, sizes[i])
        loads[rank] += sizes[i]
    cuttable = [i for i in range(len(sizes)) if divisible[i]]
    ends = list(accumulate(-(-sizes[i] // BLOCK) for i in cuttable))
    for rank in range(ranks):
        first, last = (ends[-1] * r // ranks if ends else 0 for r in (rank, rank + 1))
        for i, end in zip(cuttable, ends, strict=True):
            begin = end - -(-sizes[i] // BLOCK)
            low, high = (min(max(x - begin, 0) * BLOCK, sizes[i]) for x in (first, last))
            pieces[rank][i] = (low, high) if low < high else (0, 0)
    return pieces


def piece_of(array: Array, piece: Piece, divisible: bool) -> Array:
    """Return the view of an array that a rank steps."""
    begin, end = piece
    if divisible:
        return array.reshape(-1)[begin:end]
    return array if end > begin else array[:0]


def _elements(array: Array, begin: int, end: int) -> Array:
    return array.reshape(-1)[begin:end] if array.flags.c_contiguous else array.flat[begin:end]


def _set_elements(array: Array, begin: int, end: int, values: Array) -> None:
    if array.flags.c_contiguous:
        array.reshape(-1)[begin:end] = values
    else:
        array.flat[begin:end] = values


class Exchange:
    """
    Sums and copies of arrays of one dtype, a bucket at a time: a row of it for every rank.

    The elements that a rank steps follow each other; so many of every rank are a bucket.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        members: Sequence[int],
        pieces: Sequence[Sequence[Piece]],
        dtype: np.dtype[Any],
        bucket_bytes: int,
        reproducible: bool,
    ) -> None:
        self._comm, self._reproducible = comm, reproducible
        self._first, self._sum_dtype = members[0], compute_dtype(dtype)
        self._pieces = [{i: own[i] for i in members if own[i][0] < own[i][1]} for own in pieces]
        self._lengths = [sum(end - begin for begin, end in p.values()) for p in self._pieces]
        row = bucket_bytes // (self._sum_dtype.itemsize * comm.size)
        self._row = max(BLOCK, -(-row // BLOCK) * BLOCK)

    def _buckets(self) -> Iterator[tuple[int, int]]:
        longest = max(self._lengths)
        for low in range(0, longest, self._row):
            yield low, min(self._row, longest - low)

    def _parts(self, rank: int, low: int, n: int) -> Iterator[tuple[int, int, int, int]]:
        """Of a rank's row in a bucket: array, its first element and end, and where in the row."""
        before = 0
        for i, (begin, end) in self._pieces[rank].items():
            first, last = max(low, before), min(low + n, before + end - begin)
            if first < last:
                yield i, begin + first - before, begin + last - before, first - low
            before += end - begin

    def sum_up(self, grads: Sequence[Array | None], weight: float) -> dict[int, Array]:
        """Return the sums of all ranks' arrays, times their weights, of this rank's pieces."""
        comm = self._comm
        rows = np.zeros((comm.size, min(self._row, max(self._lengths))), self._sum_dtype)
        own = np.empty(self._lengths[comm.rank], self._sum_dtype)
        for low, n in self._buckets():
            bucket = rows.reshape(-1)[: comm.size * n].reshape(comm.size, n)
            for rank in range(comm.size):
                for i, begin, end, at in self._parts(rank, low, n):
                    grad, place = grads[i], bucket[rank, at : at + end - begin]
                    if grad is None or weight == 0:
                        place[...] = 0
                    else:
                        place[...] = _elements(grad, begin, end)
                        if weight != 1:
                            place *= weight
            total = self._sum_rows(bucket)
            own[low : low + n] = total[: max(0, len(own) - low)]
        sums, at = {}, 0
        for i, (begin, end) in self._pieces[comm.rank].items():
            sums[i] = own[at : at + end - begin]
            at += end - begin
        return sums

    def _sum_rows(self, bucket: Array) -> Array:
        if not self._reproducible:
            total = np.empty(bucket.shape[1], bucket.dtype)
            self._comm.Reduce_scatter_block(bucket, total)
            return total
        received = np.empty_like(bucket)
        self._comm.Alltoall(bucket, received)
        for row in received[1:]:
            received[0] += row
        first: Array = received[0]
        return first

    def share(self, arrays: Sequence[Array]) -> None:
        """Give every rank the pieces of the others."""
        comm = self._comm
        dtype = arrays[self._first].dtype
        rows = np.zeros((comm.size, min(self._row, max(self._lengths))), dtype)
        for low, n in self._buckets():
            bucket = rows.reshape(-1)[: comm.size * n].reshape(comm.size, n)
            for i, begin, end, at in self._parts(comm.rank, low, n):
                bucket[comm.rank, at : at + end - begin] = _elements(arrays[i], begin, end)
            comm.Allgather(MPI.IN_PLACE, bucket.reshape(-1).view(np.uint8))
            for rank in range(comm.size):
                if rank == comm.rank:
                    continue
                for i, begin, end, at in self._parts(rank, low, n):
                    _set_elements(arrays[i], begin, end, bucket[rank, at : at + end - begin])

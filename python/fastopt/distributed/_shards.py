"""Which elements of the arrays every rank steps, and how they get there and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from fastopt._tree import Array, compute_dtype

TAG = 16_161  # of messages that are not to be taken for the caller's own

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
    return array if end > begin or not array.size else array[:0]


def elements(array: Array, begin: int, end: int) -> Array:
    """Return some elements in C order: a view where the array lies so, else a copy."""
    return array.reshape(-1)[begin:end] if array.flags.c_contiguous else array.flat[begin:end]


def _set_elements(array: Array, begin: int, end: int, values: Array) -> None:
    if array.flags.c_contiguous:
        array.reshape(-1)[begin:end] = values
    else:
        array.flat[begin:end] = values


def _flat_view(arrays: Sequence[Array | None]) -> Array | None:
    """Return the one array that these are in memory, each behind the one before it, if they are."""
    found: list[Array] = []
    for array in arrays:
        if array is None or not array.flags.c_contiguous:
            return None
        if array.size:
            if found and _address(array) != _address(found[-1]) + found[-1].nbytes:
                return None
            found.append(array)
    if not found:
        return None
    size = sum(array.size for array in found)
    return np.lib.stride_tricks.as_strided(found[0].reshape(-1), (size,), (found[0].itemsize,))


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class Place(NamedTuple):
    """Elements of a rank's piece of an array, and where in a bucket they are."""

    rank: int
    array: int
    begin: int
    end: int
    place: slice


class Exchange:
    """
    Sums and copies of arrays of one dtype.

    The elements that a rank steps follow each other. They go over the wire as they lie, where the
    arrays are one in memory, and else through a buffer: a bucket of so many of every rank.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        members: Sequence[int],
        pieces: Sequence[Sequence[Piece]],
        dtype: np.dtype[Any],
        bucket_bytes: int,
        reproducible: bool,
        everywhere: bool,
    ) -> None:
        self._comm, self._reproducible, self._everywhere = comm, reproducible, everywhere
        self._members, self._dtype, self._sum_dtype = members, dtype, compute_dtype(dtype)
        self._pieces = [{i: own[i] for i in members if own[i][0] < own[i][1]} for own in pieces]
        self._lengths = [sum(end - begin for begin, end in p.values()) for p in self._pieces]
        row = bucket_bytes // (self._sum_dtype.itemsize * comm.size)
        self._row = min(max(BLOCK, -(-row // BLOCK) * BLOCK), max(self._lengths))
        in_turn = [(i, begin) for own in self._pieces for i, (begin, _) in own.items()]
        self._in_order = in_turn == sorted(in_turn)

    # Memory that is kept: to get it anew may take longer than what is done in it.

    @cached_property
    def _total(self) -> Array:
        lengths = self._lengths
        size = sum(lengths) if self._everywhere else lengths[self._comm.rank]
        return np.empty(size, self._sum_dtype)

    @cached_property
    def _buffer(self) -> Array:
        return np.empty(self._row * self._comm.size, self._sum_dtype)

    @cached_property
    def _received(self) -> Array:
        return np.empty(self._row * self._comm.size, self._sum_dtype)

    def flat_params(self, arrays: Sequence[Array]) -> Array | None:
        """Return the arrays as one, if they are, and the ranks' elements are in turn in it."""
        return _flat_view([arrays[i] for i in self._members]) if self._in_order else None

    def flat_grads(self, grads: Sequence[Array | None]) -> Array | None:
        """Return the gradients as one that can be added up as it is, if they are."""
        in_order = self._in_order and self._dtype == self._sum_dtype
        return _flat_view([grads[i] for i in self._members]) if in_order else None

    @cached_property
    def _buckets(self) -> list[tuple[int, list[int], list[Place]]]:
        """Of the ranks' elements: the first ones, how many of each, and which these are."""
        row, buckets = max(self._row, 1), []
        for low in range(0, max(self._lengths), row):
            counts = [min(max(length - low, 0), row) for length in self._lengths]
            buckets.append((low, counts, _starts(counts), list[Place]()))
        for rank, pieces in enumerate(self._pieces):
            at = 0
            for i, (begin, end) in pieces.items():
                while begin < end:
                    _, _, starts, places = buckets[at // row]
                    n, start = min(end - begin, row - at % row), starts[rank] + at % row
                    places.append(Place(rank, i, begin, begin + n, slice(start, start + n)))
                    begin, at = begin + n, at + n
        return [(low, counts, places) for low, counts, _, places in buckets]

    def sum_up(
        self, grads: Sequence[Array | None], weight: float, flat: Array | None
    ) -> dict[int, Array]:
        """
        Return the sums of all ranks' arrays, times their weights: of all, or of this rank's pieces.

        `flat` is `flat_grads`, where all ranks have such ones, and all weigh 1. The sums are valid
        until the next ones.
        """
        rank, starts, total = self._comm.rank, _starts(self._lengths), self._total
        pieces = self._pieces if self._everywhere else [self._pieces[rank]]
        own = total[starts[rank] if self._everywhere else 0 :][: self._lengths[rank]]
        for low, counts, places in self._buckets:
            out = own[low : low + self._row]
            if flat is not None:
                self._add_up(flat, counts, [start + low for start in starts], out)
                continue
            self._pack(grads, weight, places)
            if self._reproducible:
                self._add_up(self._buffer, counts, _starts(counts), out)
            else:
                self._comm.Reduce_scatter(self._buffer[: sum(counts)], out, counts)
        if self._everywhere:
            self._gather(total, self._lengths)
        sums, at = {}, 0
        for i in self._members:
            size = sum(end - begin for begin, end in (p.get(i, (0, 0)) for p in pieces))
            sums[i] = total[at : at + size]
            at += size
        return sums

    def _pack(self, grads: Sequence[Array | None], weight: float, places: Sequence[Place]) -> None:
        buffer = self._buffer
        for _, i, begin, end, place in places:
            grad = grads[i]
            if grad is None or weight == 0:
                buffer[place] = 0
            else:
                buffer[place] = elements(grad, begin, end)
                if weight != 1:
                    buffer[place] *= weight

    def _add_up(
        self, source: Array, counts: Sequence[int], starts: Sequence[int], out: Array
    ) -> None:
        """Adds, in their order, what the ranks have for this one: so many from a start on."""
        comm = self._comm
        received = self._received[: comm.size * out.size].reshape(comm.size, out.size)
        same = [out.size] * comm.size
        comm.Alltoallv([source, (counts, starts)], [received, (same, _starts(same))])
        np.add(received[0], received[1], out=out)
        for row in received[2:]:
            out += row

    def _gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """
        Gives all ranks the elements of each, so many, one behind the other.

        Allgatherv takes 3 to 10 times as long in mpich 5.0, and as long in Open MPI 5.0.
        """
        comm, rank, size = self._comm, self._comm.rank, self._comm.size
        places = zip(_starts(counts), counts, strict=True)
        parts = [buffer[start : start + n].view(np.uint8) for start, n in places]
        for distance in range(1, size):
            to, source = (rank + distance) % size, (rank - distance) % size
            comm.Sendrecv(parts[rank], to, TAG, parts[source], source, TAG)

    def share(self, arrays: Sequence[Array], flat: Array | None) -> None:
        """Give every rank the pieces of the others; `flat` is `flat_params` where all have such."""
        if flat is not None:
            self._gather(flat, self._lengths)
            return
        own = self._comm.rank
        buffer = self._buffer.view(self._dtype)
        for _, counts, places in self._buckets:
            for rank, i, begin, end, place in places:
                if rank == own:
                    buffer[place] = elements(arrays[i], begin, end)
            self._gather(buffer, counts)
            for rank, i, begin, end, place in places:
                if rank != own:
                    _set_elements(arrays[i], begin, end, buffer[place])


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts[:-1])]

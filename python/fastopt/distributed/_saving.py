"""The states of all ranks as one state_dict, piece by piece, and this rank's part of one."""

from __future__ import annotations

import math
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from fastopt import _state
from fastopt._tree import Array
from fastopt.codecs import BLOCK as SCALE_BLOCK
from fastopt.distributed._shards import BLOCK, TAG, Piece, elements
from fastopt.optimizers import storage
from fastopt.optimizers.base import Optimizer


class Entry(NamedTuple):
    """An array of the state_dict: what this rank has of it, and who has which part."""

    own: NDArray[Any]
    shape: tuple[int, ...]
    parts: list[tuple[int, int]]  # ranks, and how many elements of theirs follow in C order
    is_everywhere: bool  # all ranks have all of it

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield all elements in C order: the rank that has them, the first one there, the end."""
        step = max(BLOCK, chunk_bytes // self.own.itemsize)
        for rank, size in self.parts:
            for begin in range(0, size, step):
                yield rank, begin, min(begin + step, size)


class Shards:
    """How the states of a plain optimizer, bound to this rank's pieces, make up those of all."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        optimizer: Optimizer,
        params: Sequence[Array],
        pieces: Sequence[Sequence[Piece]],
        divisible: Sequence[bool],
        is_sharded: bool,
    ) -> None:
        self._comm, self._optimizer, self._params = comm, optimizer, params
        self._pieces, self._divisible, self._is_sharded = pieces, divisible, is_sharded
        names = optimizer._bound.names if optimizer._bound else []
        self._index_of = {f"state.{name}": i for i, name in enumerate(names)}

    def _index(self, key: str) -> int | None:
        """Of the array, for an entry that the ranks have parts of."""
        prefix, _, state = key.rpartition(".")
        is_number = state == "step" or self._optimizer._declared(state).number
        return None if is_number else self._index_of.get(prefix)

    def entries(self) -> dict[str, Entry]:
        """Return those of the state_dict: all ranks call it."""
        live = {key: np.asarray(value) for key, value in self._optimizer._to_save().items()}
        entries = {
            key: Entry(array, array.shape, [(self._comm.rank, array.size)], True)
            for key, array in live.items()
            if not self._is_sharded or self._index(key) is None
        }
        if not self._is_sharded:
            return entries
        states: dict[str, NDArray[Any]] = {}
        for prefix, i in self._index_of.items():
            own = {**self._optimizer._states[i], storage.ORDER: np.empty(0, np.int64)}
            states |= {f"{prefix}.{state}": array for state, array in own.items()}
        is_saved = np.array([key in live for key in states], np.bool_)
        self._comm.Allreduce(MPI.IN_PLACE, is_saved, MPI.LOR)
        for (key, array), saved in zip(states.items(), is_saved.tolist(), strict=True):
            i_of_key = self._index(key)
            if saved and i_of_key is not None:
                entries[key] = self._entry(i_of_key, key, live.get(key, array))
        return entries

    def _entry(self, i: int, key: str, own: NDArray[Any]) -> Entry:
        param, state, unit = self._params[i], key.rpartition(".")[2], 1
        shape = self._optimizer._declared(state).like(param).shape
        if storage.is_scale(state):
            unit = SCALE_BLOCK
            shape = (-(-param.size // unit),)
        elif state == storage.ORDER:
            shape = (param.ndim,)
        pieces = [of_rank[i] for of_rank in self._pieces]
        parts = [
            (rank, -(-(end - begin) // unit) if self._divisible[i] else math.prod(shape))
            for rank, (begin, end) in enumerate(pieces)
            if begin < end
        ]
        return Entry(own, shape, parts, is_everywhere=not param.size)

    def whole(self, entry: Entry, chunk_bytes: int) -> NDArray[Any]:
        """Return the array on all ranks, which all call it."""
        if entry.is_everywhere:
            return np.array(entry.own, order="C").reshape(entry.shape)
        array = np.empty(entry.shape, entry.own.dtype)
        flat, at = array.reshape(-1), 0
        for rank, begin, end in entry.chunks(chunk_bytes):
            place = flat[at : at + end - begin]
            if rank == self._comm.rank:
                place[...] = elements(entry.own, begin, end)
            self._comm.Bcast(place, rank)
            at += end - begin
        return array

    def part(self, caller: str, state_dict: Mapping[str, Any], convert: bool) -> dict[str, Array]:
        """Return what a state_dict has of this rank's pieces: one whole array at a time is here."""
        _state.check_mapping(caller, state_dict)
        keys_of: dict[int | None, list[str]] = defaultdict(list)
        for key in state_dict:
            keys_of[self._index(key)].append(key)
        given = _state.read(caller, {key: state_dict[key] for key in keys_of.pop(None, [])}, [])
        optimizer, bound = self._optimizer, self._optimizer._bound
        assert bound is not None
        all_options = optimizer._options_in(caller, given) if convert else []
        all_names: dict[int, list[str]] = {}
        for group, options in zip(optimizer._groups, all_options, strict=False):
            all_names |= optimizer._names_in(group, options, state_dict)
        pieces, owners = bound.params, bound.groups
        for i, prefix in enumerate(self._index_of):
            step = {key: given[key] for key in [f"{prefix}.step"] if key in given}
            for keys in [keys_of[i]] if convert else [[key] for key in keys_of[i]]:
                wholes = _state.read(caller, {key: state_dict[key] for key in keys}, [])
                if convert:
                    wholes |= step
                    param, options = self._params[i], all_options[owners[i]]
                    order = list(range(param.ndim))
                    if not self._divisible[i]:
                        order = storage.order_of(storage.model_of(optimizer._states[i], pieces[i]))
                    optimizer._convert(
                        i, param, f"{prefix}.", all_names[i], options, wholes, caller, order
                    )
                while wholes:  # none outlives its turn
                    given |= self._cut(caller, i, *wholes.popitem())
        return given

    def _cut(self, caller: str, i: int, key: str, value: Array) -> dict[str, Array]:
        """What is here of an entry, if it is, in memory of its own."""
        (begin, end), param = self._pieces[self._comm.rank][i], self._params[i]
        prefix, _, state = key.rpartition(".")
        if self._index(key) is None:
            return {key: value}
        if not self._divisible[i]:
            if begin < end or not param.size:
                return {key: value}
            return {} if state == storage.ORDER else {key: value[:0].copy()}
        if state == storage.ORDER:
            raise TypeError(
                f"{caller}: {prefix} lies in another order of memory than here: "
                "load_state_dict(state, convert=True) converts it"
            )
        unit = SCALE_BLOCK if storage.is_scale(state) else 1
        shape = (-(-param.size // unit),) if unit > 1 else param.shape
        if value.shape != shape:
            raise ValueError(f"{caller}: {key} has shape {value.shape}, expected {shape}")
        return {key: value.reshape(-1)[begin // unit : -(-end // unit)].copy()}


def save(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    comm: MPI.Intracomm,
    chunk_bytes: int,
) -> None:
    """
    Write an .npz file from rank 0, which asks the others for their parts, one after another.

    It has its name once it is whole. To be called by all ranks, within `together`.
    """
    if comm.rank > 0:
        while (wanted := comm.recv(source=0, tag=TAG)) is not None:
            key, begin, end = wanted
            comm.Send(np.array(elements(entries[key].own, begin, end)), 0, TAG)
        return
    try:
        part = os.fspath(path) + ".part"
        try:
            with zipfile.ZipFile(part, "w") as file:
                for key, entry in entries.items():
                    with file.open(f"{key}.npy", "w", force_zip64=True) as member:
                        _write(member, key, entry, comm, chunk_bytes)
            os.replace(part, path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(part)
    finally:
        for rank in range(1, comm.size):
            comm.send(None, rank, TAG)


def _write(
    member: IO[bytes], key: str, entry: Entry, comm: MPI.Intracomm, chunk_bytes: int
) -> None:
    dtype = entry.own.dtype
    header = {"descr": dtype.str, "fortran_order": False, "shape": entry.shape}
    np.lib.format.write_array_header_1_0(member, header)
    for rank, begin, end in entry.chunks(chunk_bytes):
        if rank == 0:
            chunk = np.array(elements(entry.own, begin, end))
        else:
            chunk = np.empty(end - begin, dtype)
            comm.send((key, begin, end), rank, TAG)
            comm.Recv(chunk, rank, TAG)
        member.write(chunk.data)

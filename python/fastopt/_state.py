"""Loading a state_dict: all is checked, with one set of messages, before anything is taken."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from fastopt._checks import shown

MOST_STEPS = 1 << 62  # a count has room for more

Entry: TypeAlias = tuple[tuple[int, ...], np.dtype[Any] | Literal["count"] | None]
"""The shape and the dtype of an entry; "count" is an integer from 0 on, None any dtype."""


def encoded(value: Any) -> Any:
    """Return what an array can have: a string as bytes of UTF-8, for None among numbers NaN."""
    if isinstance(value, str):
        return np.array(bytearray(value.encode()))
    return tuple(math.nan if x is None else x for x in value) if isinstance(value, tuple) else value


def decoded(array: NDArray[Any], text: bool) -> Any:
    """Return the hyper-parameter; where it is known as text, from integers of any dtype."""
    if array.ndim == 1 and (array.dtype == np.uint8 or (text and array.dtype.kind in "iu")):
        return array.astype(np.uint8).tobytes().decode(errors="replace")
    value = array.tolist()
    return tuple(None if x != x else x for x in value) if isinstance(value, list) else value


def check_mapping(caller: str, state_dict: Any) -> None:
    """Raise TypeError if it is none, or has another key than a string."""
    if not isinstance(state_dict, Mapping):
        name = type(state_dict).__name__
        raise TypeError(f"{caller}: state_dict is of type {name}, expected a mapping")
    for key in state_dict:
        if not isinstance(key, str):
            raise TypeError(f"{caller}: state_dict has the key {shown(key)}, expected str")


def read(caller: str, state_dict: Any, own: Iterable[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the entries as arrays: copies of those that may lie in the loader's `own` arrays."""
    check_mapping(caller, state_dict)
    extents = sorted(byte_bounds(array) for array in own)
    begins, reach = (
        [begin for begin, _ in extents],
        list(accumulate((end for _, end in extents), max)),
    )
    arrays = {}
    for key, value in state_dict.items():
        try:
            array = np.asarray(value)
        except Exception as error:
            raise TypeError(f"{caller}: {key} cannot be made an array: {error}") from error
        begin, end = byte_bounds(array)
        before = bisect_left(begins, end)  # so many begin before its end
        arrays[key] = array.copy() if before > 0 and reach[before - 1] > begin else array
    return arrays


def check_keys(
    caller: str, given: Collection[str], wanted: Collection[str], optional: Collection[str] = ()
) -> None:
    """Raise ValueError with what is missing, and what is unexpected."""
    known = {"missing": {*wanted} - {*given}, "unexpected": {*given} - {*wanted} - {*optional}}
    parts = [
        f"{what} {', '.join(sorted(keys)[:5])}" + (", ..." if len(keys) > 5 else "")
        for what, keys in known.items()
        if keys
    ]
    if parts:
        raise ValueError(f"{caller}: the state is of another model: {'; '.join(parts)}")


def check_entries(
    caller: str, given: Mapping[str, NDArray[Any]], wanted: Mapping[str, Entry]
) -> None:
    """Raise TypeError or ValueError for an entry of another shape or dtype than is wanted."""
    for key, (shape, dtype) in wanted.items():
        array = given[key]
        if array.shape != shape:
            raise ValueError(f"{caller}: {key} has shape {array.shape}, expected {shape}")
        if dtype == "count":
            if array.dtype.kind not in "iu" or not 0 <= array <= MOST_STEPS:
                raise ValueError(f"{caller}: {key} is {shown(array.tolist())}, expected a count")
        elif dtype is not None and array.dtype != dtype:
            raise TypeError(f"{caller}: {key} has dtype {array.dtype}, expected {dtype}")

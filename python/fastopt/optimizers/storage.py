"""How states and parameters are stored: options that every optimizer has, and what follows."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fastopt import _core, codecs
from fastopt._tree import compute_dtype
from fastopt.optimizers.options import Maybe, OneOf, OnOff, Range, Whole

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
elif sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:

    class Unpack:
        """What `Storage` stands in, for a Python that has it not."""

        def __class_getitem__(cls, item: Any) -> Any:
            return item


MASTER = "master_param"
_SCALE, ORDER = "_scale", "order"
_SMALLEST_8BIT = 4096  # elements

Entry: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]
State: TypeAlias = dict[str, NDArray[Any]]
"""The arrays of a parameter, by name."""


class Storage(TypedDict, total=False):
    """
    How an optimizer stores its states and rounds its parameters: options of all of them.

    Parameters
    ----------
    state_dtype : {None, "bfloat16", "8bit"}, default None
        What the states of the gradients are stored as: None, as they are computed, in float32 or
        float64; in bfloat16, rounded at random; or in 8 bits with a scale per 256 elements, where
        an array has at least 4096. `fastopt.codecs` has the formats. Not of float64 arrays.
    master_weights : bool, default False
        Arrays of two bytes have a float32 copy, the state ``master_param``: that is stepped, and
        the array is the copy, rounded to nearest. It begins as the array is at its first step.
    rounding : {"nearest", "stochastic"}, default "nearest"
        How bfloat16 arrays without a master are rounded: at random, small steps are not lost.
    seed : int, default 0
        What is rounded at random depends on it, on the step, the array and the element: nothing
        else.
    """

    state_dtype: Annotated[Literal["bfloat16", "8bit"] | None, Maybe(OneOf(("bfloat16", "8bit")))]
    master_weights: Annotated[bool, OnOff()]
    rounding: Annotated[Literal["nearest", "stochastic"], OneOf(("nearest", "stochastic"))]
    seed: Annotated[int, Whole(0, 2**63 - 1)]


DEFAULTS: Mapping[str, Any] = {
    "state_dtype": None,
    "master_weights": False,
    "rounding": "nearest",
    "seed": 0,
}
FIXED = DEFAULTS.keys() - {"seed"}  # for the life of an optimizer
RANGES: Mapping[str, Range] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Storage, include_extras=True).items()
}


def of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of storage among others, which have those alone that are not usual."""
    return {name: options.get(name, usual) for name, usual in DEFAULTS.items()}


@functools.cache
def bfloat16() -> np.dtype[Any]:
    """Return the dtype that shows bfloat16; uint16 where ml_dtypes is not there."""
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(np.uint16)
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


class Format:
    """
    What the states of one parameter are stored as; `options` are those of storage.

    `size` is that of the whole array, where the parameter is a part of one.
    """

    def __init__(
        self, options: Mapping[str, Any], param: NDArray[Any], size: int | None = None
    ) -> None:
        dtype = options["state_dtype"]
        is_small = dtype == "8bit" and (param.size if size is None else size) < _SMALLEST_8BIT
        self.state_dtype = None if is_small else dtype
        self.has_master = options["master_weights"] and param.itemsize == 2
        self._param = param

    @property
    def computed(self) -> np.dtype[Any]:
        """What it is without a code."""
        return compute_dtype(self._param.dtype)

    @property
    def blocks(self) -> int:
        """The number of scales."""
        return -(-self._param.size // codecs.BLOCK)

    def name(self, coding: str) -> str:
        """Return what a message calls it."""
        return str(self.computed) if coding == "none" else self.state_dtype or str(self.computed)

    def entries(self, name: str, coding: str) -> dict[str, Entry]:
        """Return the shape and the dtype of the arrays that a state is, by name."""
        codes: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype("u2"), "8bit": np.dtype("u1")}
        stored = codes.get(self.name(coding), self.computed)
        entries: dict[str, Entry] = {name: (self._param.shape, stored)}
        if self.name(coding) == "8bit":
            entries[name + _SCALE] = ((self.blocks,), np.dtype(np.float32))
        return entries

    def encoded(self, name: str, coding: str, x: NDArray[Any], key: Sequence[int]) -> State:
        """Return the arrays that a state of these numbers is."""
        if self.name(coding) == "bfloat16":
            x = x.astype(np.float32)
            return {name: codecs.to_bfloat16(x, rounding="stochastic", key=key)}
        if self.name(coding) == "8bit":
            codes, scales = codecs.encode(x.astype(np.float32), signed=coding == "signed")
            return {name: codes, name + _SCALE: scales}
        return {name: x.astype(self.computed)}


def check(
    caller: str, options: Mapping[str, Any], codings: Collection[str], params: Mapping[str, Any]
) -> None:
    """Raise ValueError where a rule or an array cannot be stored as the options say."""
    state_dtype = options["state_dtype"]
    if state_dtype is not None and set(codings) == {"none"}:
        raise ValueError(
            f"{caller}: state_dtype is {state_dtype!r}, but the states stay as they compute"
        )
    is_random = options["rounding"] == "stochastic" and not options["master_weights"]
    for name, param in params.items() if is_random or state_dtype is not None else ():
        if state_dtype is not None and param.dtype == np.float64:
            option = f"state_dtype is {state_dtype!r}, for arrays of at most 4 bytes"
        elif is_random and param.dtype == np.float16:
            option = "rounding is 'stochastic', for bfloat16"
        else:
            continue
        raise ValueError(f"{caller}: {option}, but params[{name!r}] has dtype {param.dtype}")


def new_states(
    name: str,
    coding: str,
    value: float,
    number: int,
    formats: Sequence[Format],
    models: Sequence[NDArray[Any]],
) -> list[State]:
    """Return state `number` of every parameter, of one value, as each model lies in memory."""
    new: list[State] = [{} for _ in models]
    stored = [format.state_dtype if coding != "none" else None for format in formats]
    for state_dtype in dict.fromkeys(stored):
        members = [i for i, own in enumerate(stored) if own == state_dtype]
        dtype, code, scales = "", value, None
        if state_dtype == "bfloat16":
            dtype, code = "bfloat16", int(codecs.to_bfloat16(np.array([value], np.float32))[0])
        elif state_dtype == "8bit":
            x = np.array([value], np.float32)
            codes, scales = codecs.encode(x, signed=coding == "signed")
            dtype, code = "uint8", int(codes[0])
        arrays = _core.new_states([models[i] for i in members], dtype, code, number)
        for i, array in zip(members, arrays, strict=True):
            new[i][name] = array
            if scales is not None:
                new[i][name + _SCALE] = np.full(formats[i].blocks, scales[0])
    return new


def new_master(param: NDArray[Any], number: int) -> NDArray[np.float32]:
    """Return the float32 copy of a parameter."""
    master = _core.new_states([param], "", 0.0, number)[0]
    master[...] = param.astype(np.float32)
    return master


def scales_of(state: State) -> dict[str, NDArray[np.float32]]:
    """Return the scales by the names of the states."""
    return {name: state[name + _SCALE] for name in state if name + _SCALE in state}


def is_scale(name: str) -> bool:
    """Return whether the array of this name is the scales of a state."""
    return name.endswith(_SCALE)


def part_of(state: State, name: str) -> State:
    """Return the arrays that a state of this name is."""
    return {key: state[key] for key in (name, name + _SCALE) if key in state}


def names_in(state: State) -> list[str]:
    """Return the names of the states that these arrays are."""
    scales = {name + _SCALE for name in scales_of(state)}
    return [name for name in state if name not in scales and name != MASTER]


def model_of(state: State, param: NDArray[Any]) -> NDArray[Any]:
    """Return the array whose order of memory a new state has: blocks go by one order."""
    coded = scales_of(state) if state else {}
    return state[next(iter(coded))] if coded else param


def order_of(array: NDArray[Any]) -> list[int]:
    """Return the axes as they lie in memory, outer to inner."""
    strides = [] if array.flags.c_contiguous else [-abs(stride) for stride in array.strides]
    order: list[int] = np.argsort(strides, kind="stable").tolist()
    return order or list(range(array.ndim))


def saved(state: State) -> State:
    """Return the arrays of a state_dict: codes that do not lie in C order come with theirs."""
    orders = [order_of(state[name]) for name in scales_of(state)]
    if orders and orders[0] != sorted(orders[0]):
        return {**state, ORDER: np.array(orders[0])}
    return state


def check_same(
    caller: str,
    prefix: str,
    format: Format,
    codings: Mapping[str, str],
    given: Mapping[str, NDArray[Any]],
    order: list[int],
) -> None:
    """Raise TypeError where the states of a parameter are stored otherwise in a state_dict."""
    convert = "load_state_dict(state, convert=True) converts it"
    for name, coding in codings.items():
        key = prefix + name
        if key not in given:
            continue
        there, here = _stored_as(key, given), format.name(coding)
        if there != here and {there, here} & {"bfloat16", "8bit"}:
            raise TypeError(f"{caller}: {key} is stored as {there}, here as {here}: {convert}")
        if there == "8bit" and _order_in(prefix, given, order) != order:
            raise TypeError(f"{caller}: {key} lies in another order of memory than here: {convert}")
    if (prefix + MASTER in given) != format.has_master:
        there, here = ("no", "one") if format.has_master else ("a", "none")
        raise TypeError(f"{caller}: there is {there} {prefix}{MASTER}, here {here}: {convert}")


def convert(
    prefix: str,
    format: Format,
    codings: Mapping[str, str],
    given: State,
    param: NDArray[Any],
    order: list[int],
    key: tuple[int, int],
) -> None:
    """Change the states of a parameter in a state_dict to what `format` says; key: seed, number."""
    order_there = _order_in(prefix, given, list(range(param.ndim)))
    given.pop(prefix + ORDER, None)
    for stream, (name, coding) in enumerate(codings.items(), 2):
        entry = prefix + name
        if entry not in given or given[entry].shape != param.shape:
            continue
        x = given.pop(entry)
        if entry + _SCALE in given:
            codes = np.asarray(x.transpose(order_there), order="C")
            scales = given.pop(entry + _SCALE)
            x = codecs.decode(codes, scales, signed=coding == "signed")
            x = x.transpose(np.argsort(order_there))
        elif x.dtype == np.uint16:
            x = codecs.from_bfloat16(x)
        seed, number = key
        of_step = (seed, int(given[prefix + "step"]), number, stream)
        new = format.encoded(name, coding, np.asarray(x.transpose(order), order="C"), of_step)
        new[name] = new[name].transpose(np.argsort(order))
        given.update({prefix + each: array for each, array in new.items()})
        if format.name(coding) == "8bit" and order != sorted(order):
            given[prefix + ORDER] = np.array(order)
    master = given.pop(prefix + MASTER, param)
    if format.has_master:
        given[prefix + MASTER] = master.astype(np.float32)


def _stored_as(key: str, given: Mapping[str, NDArray[Any]]) -> str:
    if key + _SCALE in given:
        return "8bit"
    dtype = given[key].dtype
    return "bfloat16" if dtype == np.uint16 else str(dtype)


def _order_in(prefix: str, given: Mapping[str, NDArray[Any]], usual: list[int]) -> list[int]:
    order = given.get(prefix + ORDER)
    return sorted(usual) if order is None else [int(axis) for axis in order.ravel()]

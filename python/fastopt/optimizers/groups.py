"""Groups of parameters: their hyper-parameters as a mapping, and the states that are shown."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastopt import _core
from fastopt._checks import shown
from fastopt.optimizers.storage import bfloat16

if TYPE_CHECKING:
    from fastopt.optimizers.base import ArrayTree, Optimizer


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a hint at the known name that is closest, or at all, for the end of a message."""
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def writable(tree: Any) -> Any:
    """Return the tree with copies of its read-only arrays, in the same containers if that goes."""
    if isinstance(tree, np.ndarray):
        return tree if tree.flags.writeable else np.array(tree, order="K")
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    new = {key: writable(child) for key, child in items}
    if all(new[key] is tree[key] for key in new):
        return tree
    if isinstance(tree, (MutableMapping, MutableSequence)):
        for key, child in new.items():
            tree[key] = child
        return tree
    if isinstance(tree, Mapping):
        return new
    return tree._make(new.values()) if hasattr(tree, "_make") else tuple(new.values())


class States(Mapping[str, Mapping[str, NDArray[Any]]]):
    """The states of every parameter, in views made at each look: their shape is not the state's."""

    def __init__(
        self, bound: _core.BoundOptimizer, states: Sequence[Mapping[str, NDArray[Any]]]
    ) -> None:
        self._counts, self._states = bound.counts, states
        self._positions = {name: i for i, name in enumerate(bound.names)}

    def __getitem__(self, parameter: str) -> Mapping[str, NDArray[Any]]:
        i = self._positions[parameter]
        views = {
            name: array.view(bfloat16() if array.dtype == np.uint16 else array.dtype)
            for name, array in self._states[i].items()
        }
        return MappingProxyType({"step": self._counts[i : i + 1].reshape(()), **views})

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return repr(dict(self))


class ParamGroup(MutableMapping[str, Any]):
    """
    The hyper-parameters of one group: a mapping that checks what is set, plus ``params``.

    It does not keep its optimizer alive; copied or pickled alone it is a plain dict.
    """

    __slots__ = ("_arrays", "_index", "_numbers", "_optimizer", "_options", "_params", "_rule")

    def __init__(
        self,
        optimizer: Optimizer,
        index: int,
        arrays: range,
        params: ArrayTree,
        options: dict[str, Any],
        numbers: dict[str, NDArray[np.float64]],
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._index = index
        self._arrays = arrays
        self._params = params
        self._options = options
        self._numbers = numbers
        self._rule = ""

    def __getitem__(self, name: str) -> Any:
        return self._params if name == "params" else self._options[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *args: Any, **options: Any) -> None:
        """Set several hyper-parameters, given as to ``dict.update``: all of them, or none."""
        self._owner()._change({self._index: dict(*args, **options)})

    def _owner(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer of this group is gone: nothing can be set")
        return optimizer

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__slots__:
            raise AttributeError(f"a group is a mapping: set group[{name!r}] = {shown(value)}")
        super().__setattr__(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{type(self._owner()).__name__}: {name!r} can be set, not deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *self._options))

    def __len__(self) -> int:
        return 1 + len(self._options)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())

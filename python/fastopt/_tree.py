"""Parameter trees in plain Python: their dotted names, and one float64 vector and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt._checks import shown

Array: TypeAlias = NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]
Tree: TypeAlias = Array | Mapping[str, Any] | Sequence[Any]


_MAX_DEPTH = 100  # deeper trees are taken for one that contains itself


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return what arrays of a dtype are computed in."""
    is_small = dtype.itemsize == 2 and str(dtype) in ("bfloat16", "float16")
    return np.dtype(np.float32) if is_small else dtype


def named_arrays(tree: Tree, what: str = "params") -> dict[str, Array]:
    """
    Return the arrays of `tree` by dotted name; `what` names the argument in errors.

    Containers, keys and arrays are those that an optimizer takes, of any floating dtype.
    """
    arrays: dict[str, Array] = {}

    def walk(node: object, path: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"{what} is nested deeper than {_MAX_DEPTH} levels")
        where = f"{what}[{path!r}]" if path else what
        if isinstance(node, Mapping):
            children = list(node.items())
            for item in children:
                if not (isinstance(item, tuple | list) and len(item) == 2):
                    raise TypeError(
                        f"{where} has {shown(item)} among its items, expected pairs of a key and "
                        "a value"
                    )
        elif isinstance(node, Sequence) and not isinstance(node, str | bytes | bytearray):
            children = list(enumerate(node))
        else:
            name = path or "param"
            if name in arrays:
                raise ValueError(f"{what} has two arrays with the name {name!r}")
            arrays[name] = _as_array(node, f"{what}[{name!r}]")
            return
        for key, child in children:
            if not isinstance(key, str | int):
                raise TypeError(
                    f"{where} has the key {shown(key)} of type {type(key).__name__}, "
                    "expected str or int"
                )
            name = str(key)
            try:
                name.encode()
            except UnicodeEncodeError:  # a lone surrogate
                raise ValueError(f"{where} has the key {shown(key)}, which has no UTF-8") from None
            walk(child, f"{path}.{name}" if path else name, depth + 1)

    walk(tree, "", 0)
    return arrays


def _as_array(node: object, where: str) -> Array:
    if isinstance(node, np.floating):  # what arithmetic makes of an array of shape ()
        node = np.asarray(node)
        node.flags.writeable = False
    kind = type(node).__name__
    if not isinstance(node, np.ndarray):
        hint = instead_of(node)
        leaf = not hint or hasattr(node, "__array__")
        expected = "numpy.ndarray" if leaf else "an array, a mapping or a sequence"
        raise TypeError(f"{where} is of type {kind}, expected {expected}{hint}")
    for arithmetic in ("__add__", "__array_ufunc__"):
        if getattr(type(node), arithmetic) is not getattr(np.ndarray, arithmetic):
            raise TypeError(
                f"{where} is of type {kind}, which has an arithmetic of its own, "
                "expected numpy.ndarray"
            )
    if compute_dtype(node.dtype).kind != "f":
        raise TypeError(f"{where} is {node.dtype}, expected a floating dtype")
    return node


def instead_of(node: object) -> str:
    """Return what to do about a node that is no array or container, for the end of a message."""
    if hasattr(node, "detach"):
        return ": use tensor.detach().numpy()"
    if is_dataclass(node):
        return ": use vars(...)"
    if isinstance(node, list | tuple):
        return ": use numpy.asarray(...)"
    if isinstance(node, str | bytes | bytearray | Mapping) or hasattr(node, "__array__"):
        return ""
    return ": use list(...)" if isinstance(node, Iterable) else ""


def flatten(tree: Tree, what: str = "params") -> Vector:
    """Return the entries of all arrays as one new float64 vector, each array in C order."""
    arrays = [array.ravel() for array in named_arrays(tree, what).values()]
    if sum(array.size for array in arrays) == 0:
        raise ValueError(f"{what} is empty")
    return np.concatenate(arrays, dtype=np.float64)


def flatten_like(tree: Tree, params: Tree, what: str = "grads") -> Vector:
    """Flatten `tree` in the order of `params`, which must have the same names and shapes."""
    arrays, expected = named_arrays(tree, what), named_arrays(params)
    if arrays.keys() != expected.keys():
        name = min(arrays.keys() ^ expected.keys())
        raise ValueError(
            f"{what} has no array {name!r}, but params has"
            if name in expected
            else f"{what} has an array {name!r}, but params has not"
        )
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            raise ValueError(
                f"{what}[{name!r}] has shape {array.shape}, "
                f"its parameter has {expected[name].shape}"
            )
    return flatten({name: arrays[name] for name in expected}, what)


def rebuild(like: Tree, arrays: Iterable[Array]) -> Any:
    """Return a tree of the shape of `like` with these arrays in it, in the order of its own.

    Mappings become dicts, named tuples such of their class, other tuples tuples, and other
    sequences lists.
    """
    pieces = iter(arrays)

    def walk(node: Tree) -> Any:
        if isinstance(node, np.ndarray | np.floating):
            return next(pieces)
        if isinstance(node, Mapping):
            return {key: walk(child) for key, child in node.items()}
        children = [walk(child) for child in node]
        if isinstance(node, tuple):
            return getattr(type(node), "_make", tuple)(children)
        return children

    return walk(like)


def unflatten(vector: Vector, like: Tree) -> Any:
    """Return `rebuild` of `like` with arrays of its shapes that are views of `vector`."""
    arrays = list(named_arrays(like).values())
    ends = accumulate(array.size for array in arrays)
    return rebuild(
        like,
        (
            vector[end - array.size : end].reshape(array.shape)
            for array, end in zip(arrays, ends, strict=True)
        ),
    )


def evaluate(name: str, function: Callable[[Any], Any], vector: Vector, like: Tree) -> Any:
    """Return `function` of `unflatten`, which it may not change; `name` is its name in errors."""
    argument = vector.copy()
    result = function(unflatten(argument, like))
    if not np.array_equal(argument, vector, equal_nan=True):
        raise ValueError(
            f"{name} changed the parameters that it was given: let it work on a copy of them"
        )
    return result


@np.errstate(all="ignore")
def norm(vector: Vector) -> float:
    """Return the Euclidean norm: the squares neither overflow nor vanish."""
    largest = np.max(np.abs(vector), initial=0.0)
    if largest == 0 or not np.isfinite(largest):
        return float(largest)
    return float(largest * np.linalg.norm(vector / largest))

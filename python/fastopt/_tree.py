"""Parameter trees in plain Python: their dotted names, and one float64 vector and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]
Tree: TypeAlias = Array | Mapping[str, Any] | Sequence[Any]


def named_arrays(tree: Tree, what: str = "params") -> dict[str, Array]:
    """Return the arrays of `tree` by dotted name; `what` names the argument in errors."""
    arrays: dict[str, Array] = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, Mapping):
            children = list(node.items())
        elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
            children = list(enumerate(node))
        else:
            name = path or "param"
            if isinstance(node, np.floating):  # what arithmetic makes of an array of shape ()
                node = np.asarray(node)
                node.flags.writeable = False
            if not isinstance(node, np.ndarray):
                raise TypeError(
                    f"{what}[{name!r}] is {type(node).__name__}, expected an array, "
                    "a mapping or a sequence"
                )
            if not np.issubdtype(node.dtype, np.floating):
                raise TypeError(f"{what}[{name!r}] is {node.dtype}, expected a floating dtype")
            if name in arrays:
                raise ValueError(f"{what} has two arrays with the name {name!r}")
            arrays[name] = node
            return
        for key, child in children:
            walk(child, f"{path}.{key}" if path else str(key))

    walk(tree, "")
    return arrays


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

    Mappings become dicts, tuples tuples, and other sequences lists.
    """
    pieces = iter(arrays)

    def walk(node: Tree) -> Any:
        if isinstance(node, np.ndarray | np.floating):
            return next(pieces)
        if isinstance(node, Mapping):
            return {key: walk(child) for key, child in node.items()}
        return (tuple if isinstance(node, tuple) else list)(walk(child) for child in node)

    return walk(like)


def unflatten(vector: Vector, like: Tree) -> Any:
    """Return `rebuild` of `like` with arrays of its shapes that are views of `vector`."""
    arrays = list(named_arrays(like).values())
    pieces = np.split(vector, np.cumsum([array.size for array in arrays])[:-1])
    return rebuild(
        like, (piece.reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True))
    )

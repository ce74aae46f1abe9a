"""Trees of arrays: an array, a mapping or a sequence of them, or any nesting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias


ArrayTree: TypeAlias = Any
"""An array, a mapping or a sequence of arrays, or any nesting of them."""


def map_arrays(
    function: Callable[..., Any], tree: ArrayTree, *others: ArrayTree, path: str = ""
) -> ArrayTree:
    """
    Return the tree of ``function(path, array, ...)`` of every array, and of those of ``others``.

    Mappings become dicts; sequences become lists, or tuples where they were. A path is dotted, and
    ``param`` for a bare array.
    """

    def child(key: Any) -> ArrayTree:
        return map_arrays(
            function,
            tree[key],
            *(other[key] for other in others),
            path=f"{path}.{key}" if path else str(key),
        )

    if isinstance(tree, Mapping):
        return {key: child(key) for key in tree}
    if isinstance(tree, Sequence) and not isinstance(tree, (str, bytes, bytearray)):
        children = [child(i) for i in range(len(tree))]
        return tuple(children) if isinstance(tree, tuple) else children
    return function(path or "param", tree, *others)

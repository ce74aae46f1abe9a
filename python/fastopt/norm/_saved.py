"""The arrays of a normalization, and what its forward pass leaves for the backward."""

from __future__ import annotations

from typing import Any, TypeAlias

from numpy.typing import NDArray

from fastopt._core import Saved as Saved
from fastopt._tree import Array as Array

MaybeArray: TypeAlias = "NDArray[Any] | None"

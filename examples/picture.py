"""What the examples' pictures share: loss surfaces, and where they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

OUTPUT = Path(__file__).parent / "output"


def grid(xlim: tuple[float, float], ylim: tuple[float, float], n: int = 201) -> NDArray[Any]:
    """Points of a rectangle, of shape (2, n, n): what a loss of two parameters takes."""
    return np.array(np.meshgrid(np.linspace(*xlim, n), np.linspace(*ylim, n)))


def contours(ax: Axes, points: NDArray[Any], loss: NDArray[Any], levels: Any) -> Any:
    """Draw a loss over its two parameters, the darker the higher; return it for a color bar."""
    colors = plt.get_cmap("Blues")(np.linspace(0, 0.75, len(levels)))
    filled = ax.contourf(*points, loss, levels=levels, colors=colors, extend="max")
    ax.contour(*points, loss, levels=levels, colors="white", linewidths=0.5)
    return filled


def save(figure: Figure, name: str) -> None:
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / f"{name}.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")

"""
A loss surface with all its critical points, told apart by the Hessian's eigenvalues.

Himmelblau's function has four minima, four saddle points and a maximum. Newton's method finds
them, and gradient descent goes from each saddle point, along the eigenvector of its negative
eigenvalue, down to the minima on both sides.

Draws examples/output/loss_surface.png.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from picture import contours, grid, save

import fastopt
from fastopt.curvature import critical_point, hessian

Array = NDArray[np.float64]
MARKERS = {"minimum": ("o", "tab:green"), "saddle": ("X", "tab:orange"), "maximum": ("^", "black")}


def loss(w: Array) -> Any:
    x, y = w
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def gradient(w: Array) -> Array:
    x, y = w
    a, b = x**2 + y - 11, x + y**2 - 7
    return np.array([4 * x * a + 2 * b, 2 * a + 4 * y * b])


def newton(w: Array) -> Array:
    """The critical point that Newton's method reaches from w."""
    for _ in range(20):
        w = w - np.linalg.solve(hessian(gradient, w), gradient(w))
    return w


def descend(w: Array) -> Array:
    optimizer = fastopt.SGD(w, lr=0.003)
    path = [w.copy()]
    for _ in range(400):
        optimizer.step(gradient(w))
        path.append(w.copy())
    return np.array(path).T


def main() -> None:
    starts = grid((-5, 5), (-5, 5), n=12).reshape(2, -1).T
    found = np.array([newton(start) for start in starts])
    places = np.unique(found[np.abs(found).max(axis=1) < 5].round(6), axis=0)
    critical = [(w, critical_point(gradient, w)) for w in places]
    for w, point in sorted(critical, key=lambda item: float(loss(item[0]))):
        x, y = w
        print(
            f"{point.kind:8} at ({x:6.3f}, {y:6.3f}), loss {loss(w):7.2f}, "
            f"eigenvalues {point.eigenvalues.round(1)}, minimum ratio {point.minimum_ratio}"
        )

    figure = plt.figure(figsize=(10, 5), layout="constrained")
    space = figure.add_subplot(1, 2, 1, projection="3d")
    ax = figure.add_subplot(1, 2, 2)
    points = grid((-5, 5), (-5, 5), n=101)
    # The root, because the walls are 900 high.
    space.plot_surface(
        *points, np.sqrt(loss(points)), cmap="Blues", rcount=50, ccount=50, alpha=0.7
    )
    space.set(xlabel="x", ylabel="y", zlabel="√loss")
    space.view_init(elev=55, azim=-100)
    contours(ax, points, loss(points), [0, 5, 20, 50, 80, 110, 150, 200, 300, 500, 900])
    for w, point in critical:
        marker, color = MARKERS[point.kind]
        space.plot(*w, np.sqrt(loss(w)), marker, color=color, markersize=8, zorder=10)
        ax.plot(*w, marker, color=color, markersize=10, zorder=3)
        if point.kind == "saddle":
            for side in (-0.1, 0.1):
                ax.plot(*descend(w + side * point.escape_direction), color="tab:red")
    for kind, (marker, color) in MARKERS.items():
        ax.plot([], [], marker, color=color, markersize=8, label=kind)
    ax.plot([], [], color="tab:red", label="out of a saddle by its eigenvector, then SGD")
    ax.set(xlabel="x", ylabel="y", aspect="equal")
    figure.suptitle("Himmelblau's function and its critical points")
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, "loss_surface")


if __name__ == "__main__":
    main()

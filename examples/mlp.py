"""The multilayer network of the examples: plain NumPy, forward and backward written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import fastopt

Array = NDArray[np.float32]


class Split(NamedTuple):
    """Images, standardized, and their labels."""

    x: Array
    y: NDArray[np.int64]


class MLP:
    """
    Hidden layers of ``x @ W``, batch normalization (or a bias) and ReLU; an affine output layer.

    ``widths`` are the numbers of units from the input to the logits. ``params`` and the result of
    `backward` are trees that go straight into an optimizer.
    """

    def __init__(
        self,
        widths: list[int],
        *,
        rng: np.random.Generator,
        batch_norm: bool = True,
        norm_class: Callable[..., fastopt.BatchNorm] = fastopt.BatchNorm,
    ) -> None:
        self.layers: list[dict[str, Any]] = []
        self.norms: list[fastopt.BatchNorm | None] = []
        for n_in, n_out in pairwise(widths):
            hidden = len(self.layers) < len(widths) - 2
            normalized = hidden and batch_norm
            norm = norm_class(n_out, activation="relu") if normalized else None
            layer: dict[str, Any] = {"W": fastopt.init.he_normal((n_in, n_out), rng=rng)}
            if norm is not None:
                layer["norm"] = norm.params  # its shift is the bias
            else:
                layer["b"] = np.zeros(n_out, dtype=np.float32)
            self.layers.append(layer)
            self.norms.append(norm)
        self.params = self.layers

    def forward(self, x: Array, *, training: bool = False) -> Array:
        self.inputs = [x]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x @ layer["W"]
            if norm is not None:
                norm.training = training
                x = norm.forward(x)
            else:
                x += layer["b"]
                if layer is not self.layers[-1]:
                    np.maximum(x, 0, out=x)
            self.inputs.append(x)
        return x

    def backward(self, dlogits: Array) -> list[dict[str, Any]]:
        """The gradients of all parameters, from the gradient of the logits of the last forward."""
        grads: list[dict[str, Any]] = []
        d = dlogits
        for i in reversed(range(len(self.layers))):
            grad: dict[str, Any] = {}
            norm = self.norms[i]
            if norm is not None:
                d = norm.backward(d)
                grad["norm"] = norm.grads
            else:
                if i < len(self.layers) - 1:
                    d = d * (self.inputs[i + 1] > 0)
                grad["b"] = d.sum(axis=0)
            grads.append({"W": self.inputs[i].T @ d, **grad})
            if i > 0:
                d = d @ self.layers[i]["W"].T
        return grads[::-1]

    def evaluate(self, data: Split) -> tuple[float, float]:
        """Mean cross-entropy and accuracy at test time."""
        logits = self.forward(data.x)
        loss, _ = fastopt.losses.softmax_cross_entropy(logits, data.y)
        return float(loss), float((logits.argmax(axis=1) == data.y).mean())


def digits(seed: int = 0) -> tuple[Split, Split, Split]:
    """
    Real handwritten digits, 8 by 8 pixels: 1,257 to train, 180 to validate, 360 to test.

    Inputs are standardized with the training set's mean and standard deviation.
    """
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    train, validation, test = np.split(order, [len(x) * 7 // 10, len(x) * 8 // 10])
    x_train, mean, std = fastopt.data.standardize(x[train].astype(np.float32))
    splits = [Split(x_train, y[train])]
    for part in (validation, test):
        z, _, _ = fastopt.data.standardize(x[part].astype(np.float32), mean=mean, std=std)
        splits.append(Split(z, y[part]))
    return splits[0], splits[1], splits[2]

"""Batch normalization with the statistics of all ranks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from fastopt import _core
from fastopt._tree import Array
from fastopt.distributed._together import check_same, communicator, together
from fastopt.norm import BatchNorm, batch
from fastopt.norm._saved import MaybeArray

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(BatchNorm):
    """
    Batch normalization over the batches of all ranks: `fastopt.BatchNorm` of the whole batch.

    Batches may differ in length from rank to rank, and be empty. In training every rank must call
    `forward` and `backward`; an error on one is one on all. The gradients of weight and bias are
    of the rank's own batch, as those of other parameters, and averaged with them. `backward` adds
    up what all ranks give it: where their batches differ in length, that must be the gradients of
    the sums of their losses, not of the means.

    Parameters
    ----------
    num_features, eps, momentum, affine, axis, activation, unbiased, dtype
        As for `fastopt.BatchNorm`, and the same on all ranks.
    comm : mpi4py.MPI.Intracomm, optional
        By default ``MPI.COMM_WORLD``.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if a parameter is out of its range on one.

    Notes
    -----
    ::

        d = mean_i - mean;  T = N + n_i
        mean += d n_i / T;  M2 += M2_i + d^2 N n_i / T;  N = T

    in double, in the order of the ranks; the variance is M2 / N, that of the running statistics
    M2 / (N - 1). Numbers count positions, and the gradients' sums go the same way back.

    References
    ----------
    Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1979.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.distributed import SyncBatchNorm
    >>> layer = SyncBatchNorm(2)
    >>> y = layer(np.array([[1, 10], [3, 30]], np.float32))
    >>> layer.buffers["running_mean"]
    array([0.2, 2. ], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        axis: int = 1,
        activation: Literal["relu"] | None = None,
        unbiased: bool = True,
        dtype: DTypeLike = np.float32,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        self._comm = communicator("SyncBatchNorm: comm", comm)
        with together(self._comm):
            super().__init__(
                num_features,
                eps,
                momentum,
                affine,
                axis=axis,
                activation=activation,
                unbiased=unbiased,
                dtype=dtype,
            )
        names = (*self._options, "axis", "activation", "unbiased", "dtype")
        check_same(self._comm, "SyncBatchNorm", {name: getattr(self, name) for name in names})

    def forward(self, x: Array, residual: MaybeArray = None, *, out: MaybeArray = None) -> Array:
        """
        Normalize x with the statistics of all ranks' x; in evaluation with the running ones.

        Parameters
        ----------
        x, residual, out
            As for `fastopt.BatchNorm.forward`; in training x may be empty.

        Returns
        -------
        y : array like x

        Raises
        ------
        TypeError, ValueError
            On all ranks in training, as `fastopt.batch_norm`.
        """
        if not self.training:
            return super().forward(x, residual, out=out)
        with together(self._comm):
            self._check(x, out)
            own = self._statistics(x)
        count, mean, square = self._merged(own)
        with together(self._comm):
            if count < 1:
                raise ValueError("SyncBatchNorm: x has no samples on any rank")
            var = square / count
            y, saved = batch.batch_norm(
                x,
                gamma=self.params.get("weight", np.ones(self.num_features, self.dtype)),
                beta=self.params.get("bias", np.zeros(self.num_features, self.dtype)),
                running_mean=mean.astype(self.dtype),
                running_var=var.astype(self.dtype),
                training=False,
                eps=self.eps or 0.0,
                axis=self.axis,
                residual=residual,
                activation=self.activation,
                out=out,
            )
        self._saved[True] = saved
        self._whole = count, mean.astype(self.dtype), var.astype(self.dtype)
        self._move_running(mean, square / max(count - 1, 1) if self.unbiased else var)
        return y

    def _check(self, x: Array, out: MaybeArray) -> None:
        """What `fastopt.batch_norm` does not look at in evaluation, or sees too late."""
        if not isinstance(x, np.ndarray):
            raise TypeError(
                f"SyncBatchNorm: x is of type {type(x).__name__}, expected numpy.ndarray"
            )
        self._check_dtype(x)
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm: x has shape {x.shape}, expected {self.num_features} channels at "
                f"axis {self.axis}"
            )
        if not self.eps:
            raise ValueError(f"SyncBatchNorm: eps is {self.eps}, expected > 0 in training")
        if out is not None and np.may_share_memory(out, x):
            raise ValueError("SyncBatchNorm: out shares memory with x, which backward needs")
        for name, buffer in self.buffers.items():
            if not buffer.flags.writeable:
                raise ValueError(f"SyncBatchNorm: {name} is read-only")

    def _statistics(self, x: Array) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """Of every channel: the number of samples, their mean, and the squares about it."""
        n = x.size // self.num_features
        if n < 2:
            mean = x.reshape(-1).astype(np.float64) if n else np.zeros(self.num_features)
            return n, mean, np.zeros(self.num_features)
        mean, var = _core.batch_statistics(x, self.axis, self.eps or 0.0)
        return n, mean, n * var

    def _merged(
        self, own: tuple[int, NDArray[np.float64], NDArray[np.float64]]
    ) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """Count, mean and sum of squares about it, of all ranks' samples."""
        everyone = np.empty((self._comm.size, 2 * self.num_features + 1))
        self._comm.Allgather(np.concatenate([[own[0]], *own[1:]], dtype=np.float64), everyone)
        count, mean, square = 0, np.zeros(self.num_features), np.zeros(self.num_features)
        for row in everyone[everyone[:, 0] > 0]:
            n = int(row[0])
            other_mean, other_square = row[1:].reshape(2, -1)
            if count == 0:
                count, mean, square = n, other_mean, other_square
                continue
            d, total = other_mean - mean, count + n
            mean = mean + d * (n / total)
            square = square + other_square + d * d * (count * n / total)
            count = total
        return count, mean, square

    def _move_running(self, mean: NDArray[np.float64], var: NDArray[np.float64]) -> None:
        tracked = self.buffers["num_batches_tracked"]
        momentum = 1 / (int(tracked) + 1) if self.momentum is None else self.momentum
        for name, new in (("running_mean", mean), ("running_var", var)):
            running = self.buffers[name]
            running[...] = (1 - momentum) * running.astype(np.float64) + momentum * new
        tracked += 1

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Any:
        """
        Return the gradient of x, and set ``grads``: zeros where x was empty.

        Parameters
        ----------
        dy, out
            As for `fastopt.BatchNorm.backward`.

        Returns
        -------
        dx : array like x
        dresidual : array like x
            Only if there was a residual.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            On all ranks in training, as `fastopt.BatchNorm.backward`.
        """
        if not self.training:
            return super().backward(dy, out=out)
        with together(self._comm):
            saved = self._for_backward()
            # Of constant statistics; what they depend on x by comes from all ranks' sums.
            gradients: Any = batch.batch_norm_backward(dy, saved, out=out)
        dx, dgamma, dbeta, *dresidual = gradients
        count, mean, var = self._whole
        everyone = np.empty((self._comm.size, 2, self.num_features))
        self._comm.Allgather(np.stack([dgamma, dbeta]).astype(np.float64), everyone)
        sums = np.zeros_like(everyone[0])
        for row in everyone:
            sums += row
        eps = self.eps or 0.0
        by_xhat, constant = -self.params.get("weight", 1.0) / np.sqrt(var + eps) * sums / count
        dx, _ = batch.batch_norm(  # an affine function of x is added
            saved.x,
            gamma=by_xhat.astype(self.dtype),
            beta=constant.astype(self.dtype),
            running_mean=mean,
            running_var=var,
            training=False,
            eps=eps,
            axis=self.axis,
            residual=dx,
            out=dx,
        )
        self._finish_backward(dgamma, dbeta)
        return (dx, *dresidual) if dresidual else dx

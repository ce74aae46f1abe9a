"""
Normalization layers: parameters, gradients and running statistics around `fastopt.norm`.

``layer.params`` and ``layer.grads`` go straight into an optimizer::

    opt = fastopt.Adam(layer.params)
    y = layer(x)
    dx = layer.backward(dy)
    opt.step(layer.grads)

Names are torch's, and so is the state: ``layer.load_state_dict(torch_layer.state_dict())``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from fastopt import _state
from fastopt._checks import integer, number, switch
from fastopt.norm import batch, group, layer
from fastopt.norm._saved import Array, MaybeArray, Saved

AnyLayer = TypeVar("AnyLayer", bound="Layer")


class Layer:
    """
    What the layers have in common.

    Attributes
    ----------
    params : dict of arrays
        ``weight`` and ``bias``, or less.
    grads : dict of arrays
        The same names; None before the first `backward`, which binds new arrays.
    training : bool
        True at first; `train` and `eval` set it.

    Notes
    -----
    A `backward` goes back through the last forward call in the same mode, and uses it up: a call in
    evaluation between a training step's two calls does not disturb them, and a second `backward`
    is an error. Whoever calls a layer several times before the first backward takes the function
    (`fastopt.batch_norm`), whose ``saved`` is one for each call. A copied or unpickled layer has no
    forward call behind it.
    """

    _function: ClassVar[str]
    _options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, shape: tuple[int, ...], learned: tuple[str, ...], eps: float | None, dtype: DTypeLike
    ) -> None:
        if eps is not None:
            number(f"{type(self).__name__}: eps", eps, 0.0)
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(
                f"{type(self).__name__}: dtype is {np.dtype(dtype)}, expected float32 or float64"
            )
        self.eps = eps
        self.dtype = np.dtype(dtype)
        self.training = True
        self.params: dict[str, Array] = {}
        if "weight" in learned:
            self.params["weight"] = np.ones(shape, dtype)
        if "bias" in learned:
            self.params["bias"] = np.zeros(shape, dtype)
        self.grads: dict[str, MaybeArray] = dict.fromkeys(self.params)
        self.buffers: dict[str, Array] = {}
        self._saved: dict[bool, Saved] = {}  # by `training`

    def __call__(self, x: Array) -> Array:
        return self.forward(x)

    def forward(self, x: Array, *, out: MaybeArray = None) -> Array:
        """
        Normalize x, and keep what `backward` needs; calling the layer is the same.

        Parameters
        ----------
        x : array
            Of the layer's dtype, and of a shape that the layer's function takes.
        out : array like x, optional
            Receives y.

        Returns
        -------
        y : array like x

        Raises
        ------
        TypeError, ValueError
            As the layer's function.
        """
        raise NotImplementedError

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Any:
        """
        Return the gradient of x, and set ``grads``.

        Parameters
        ----------
        dy : array like x
            The gradient of y.
        out : array like x, optional
            Receives dx; it may be ``dy``.

        Returns
        -------
        dx : array like x

        Raises
        ------
        RuntimeError
            If there was no forward call, or a backward has used it up.
        TypeError, ValueError
            If dy or out is not like x.
        """
        raise NotImplementedError

    def train(self: AnyLayer, training: bool = True) -> AnyLayer:
        """
        Set ``training``.

        Parameters
        ----------
        training : bool, default True
            False for evaluation.

        Returns
        -------
        Layer
            This one.
        """
        self.training = switch(f"{type(self).__name__}.train: training", training)
        return self

    def eval(self: AnyLayer) -> AnyLayer:
        """
        Set ``training`` to False, for evaluation.

        Returns
        -------
        Layer
            This one.
        """
        return self.train(False)

    def _check_dtype(self, x: Array) -> None:
        if isinstance(x, np.ndarray) and x.dtype != self.dtype:
            raise TypeError(
                f"{type(self).__name__}: x has dtype {x.dtype}, expected {self.dtype}, with which "
                f"the layer was made (its option dtype)"
            )

    def _for_backward(self) -> Saved:
        if self.training not in self._saved:
            raise RuntimeError(
                f"{type(self).__name__}.backward: no forward call in "
                f"{'training' if self.training else 'evaluation'} is left to go back through; a "
                f"backward uses up the last one. For several, use the function, whose `saved` is "
                f"one for each call: fastopt.{self._function} and fastopt.{self._function}_backward"
            )
        return self._saved[self.training]

    def _finish_backward(self, dgamma: MaybeArray, dbeta: MaybeArray = None) -> None:
        del self._saved[self.training]
        for name, gradient in (("weight", dgamma), ("bias", dbeta)):
            if name in self.params:
                self.grads[name] = gradient

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_saved": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for arrays in (self.params, self.grads, self.buffers):
            for name, array in arrays.items():
                # Loaded out of a file or a message that is only to be read.
                if array is not None and not array.flags.writeable:
                    arrays[name] = np.array(array)

    def state_dict(self) -> dict[str, Array]:
        """
        Return the parameters and running statistics.

        Returns
        -------
        dict of str to array
            Copies, under torch's names.
        """
        return {name: array.copy() for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, Array]:
        return {**self.params, **self.buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Copy a state, torch's or another layer's, into the arrays of this one.

        Parameters
        ----------
        state : mapping of str to array
            The names of `state_dict`; ``num_batches_tracked`` may be missing.

        Raises
        ------
        TypeError, ValueError
            If a name, shape or dtype differs, or an array of the layer is read-only; then nothing
            has changed.
        """
        own, where = self._arrays(), f"{type(self).__name__}.load_state_dict"
        arrays = _state.read(where, state, own.values())
        optional = {"num_batches_tracked"}
        _state.check_keys(where, arrays, own.keys() - optional, optional & own.keys())
        _state.check_entries(where, arrays, {n: (own[n].shape, own[n].dtype) for n in arrays})
        for name in arrays:
            if not own[name].flags.writeable:
                raise ValueError(f"{where}: the layer's {name!r} is read-only")
        for name, array in arrays.items():
            own[name][...] = array

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options[1:])
        return f"{type(self).__name__}({getattr(self, self._options[0])}, {options})"


def _learned(where: str, affine: bool) -> tuple[str, ...]:
    return ("weight", "bias") if switch(where, affine) else ()


class BatchNorm(Layer):
    """
    Batch normalization of the channels at ``axis``: see `fastopt.batch_norm`.

    ::

        y = weight (x - mean) / sqrt(var + eps) + bias    [+ residual]    [relu]

    with the batch's mean and var in training, the running ones in evaluation.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float, default 1e-5
    momentum : float or None, default 0.1
        Weight of the new value in the running statistics; None: they are the plain average over
        all batches so far.
    affine : bool, default True
        Learn ``weight`` (gamma) and ``bias`` (beta).
    axis : int, default 1
        Where the channels are; -1 for channels-last.
    activation : {None, "relu"}, default None
        Applied to the output, in the same pass.
    unbiased : bool, default True
        Average the unbiased variance.
    dtype : float32 or float64, default float32
        Of the parameters, and of x.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of its range.

    References
    ----------
    Ioffe, Szegedy, Batch normalization: accelerating deep network training by reducing internal
    covariate shift, 2015.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> layer = fastopt.BatchNorm(2)
    >>> y = layer(np.array([[1, 10], [3, 30]], np.float32))
    >>> layer.buffers["running_mean"]
    array([0.2, 2. ], dtype=float32)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.grads["bias"]
    array([2., 2.], dtype=float32)
    >>> layer
    BatchNorm(2, eps=1e-05, momentum=0.1, affine=True)
    """

    _function = "batch_norm"
    _options = ("num_features", "eps", "momentum", "affine")

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
    ) -> None:
        self.num_features = integer("BatchNorm: num_features", num_features, 1)
        if momentum is not None:
            number("BatchNorm: momentum", momentum, 0.0, 1.0)
        batch._relu("BatchNorm", activation)
        super().__init__((self.num_features,), _learned("BatchNorm: affine", affine), eps, dtype)
        self.momentum = momentum
        self.affine = affine
        self.axis = integer("BatchNorm: axis", axis)
        self.activation = activation
        self.unbiased = switch("BatchNorm: unbiased", unbiased)
        self.buffers = {
            "running_mean": np.zeros(num_features, dtype),
            "running_var": np.ones(num_features, dtype),
            "num_batches_tracked": np.zeros((), np.int64),
        }

    def __call__(self, x: Array, residual: MaybeArray = None) -> Array:
        return self.forward(x, residual)

    def forward(self, x: Array, residual: MaybeArray = None, *, out: MaybeArray = None) -> Array:
        """
        Normalize x, and keep what `backward` needs; in training the running statistics move.

        Parameters
        ----------
        x : array
            Of the layer's dtype, ``num_features`` long at ``axis``.
        residual : array like x, optional
            Added before the activation.
        out : array like x, optional
            Receives y. It may be ``residual`` and, in evaluation, x itself; then x is lost, and
            there is no backward.

        Returns
        -------
        y : array like x

        Raises
        ------
        TypeError, ValueError
            As `fastopt.batch_norm`.
        """
        tracked = self.buffers["num_batches_tracked"]
        if self.training and not tracked.flags.writeable:
            raise ValueError("BatchNorm: num_batches_tracked is read-only")
        momentum = 1 / (int(tracked) + 1) if self.momentum is None else self.momentum
        self._check_dtype(x)
        y, self._saved[self.training] = batch.batch_norm(
            x,
            gamma=self.params.get("weight"),
            beta=self.params.get("bias"),
            running_mean=self.buffers["running_mean"],
            running_var=self.buffers["running_var"],
            training=self.training,
            momentum=momentum,
            eps=self.eps or 0.0,
            axis=self.axis,
            residual=residual,
            activation=self.activation,
            unbiased=self.unbiased,
            out=out,
        )
        if self.training:
            tracked += 1
        return y

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Any:
        """
        Return the gradient of x, and set ``grads``.

        Parameters
        ----------
        dy : array like x
            The gradient of y.
        out : array like x, optional
            Receives dx; it may be ``dy``.

        Returns
        -------
        dx : array like x
        dresidual : array like x
            Only if there was a residual.

        Raises
        ------
        RuntimeError
            If there was no forward call, or a backward has used it up.
        TypeError, ValueError
            If dy or out is not like x.
        """
        gradients = batch.batch_norm_backward(dy, self._for_backward(), out=out)
        self._finish_backward(gradients[1], gradients[2])
        return (gradients[0], gradients[3]) if len(gradients) == 4 else gradients[0]


class LayerNorm(Layer):
    """
    Layer normalization over the last axes: see `fastopt.layer_norm`.

    ::

        y = weight (x - mean) / sqrt(var + eps) + bias

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The last axes of x.
    eps : float, default 1e-5
    elementwise_affine : bool, default True
        Learn ``weight`` (gamma) and, with ``bias``, ``bias`` (beta).
    bias : bool, default True
        False: learn ``weight`` alone.
    dtype : float32 or float64, default float32
        Of the parameters, and of x.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of its range.

    References
    ----------
    Ba, Kiros, Hinton, Layer normalization, 2016.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> layer = fastopt.LayerNorm(2)
    >>> y = layer(np.array([[1, 3]], np.float32))
    >>> y.round(3)
    array([[-1.,  1.]], dtype=float32)
    >>> layer
    LayerNorm((2,), eps=1e-05, elementwise_affine=True)
    """

    _function = "layer_norm"
    _options = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _shape("LayerNorm", normalized_shape)
        learned = _learned("LayerNorm: elementwise_affine", elementwise_affine)
        super().__init__(
            self.normalized_shape,
            learned if switch("LayerNorm: bias", bias) else learned[:1],
            eps,
            dtype,
        )
        self.elementwise_affine = elementwise_affine

    def forward(self, x: Array, *, out: MaybeArray = None) -> Array:
        gamma, beta = self.params.get("weight"), self.params.get("bias")
        self._check_dtype(x)
        y, self._saved[self.training] = layer.layer_norm(
            x, self.normalized_shape, gamma=gamma, beta=beta, eps=self.eps or 0.0, out=out
        )
        return y

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Array:
        dx, dgamma, dbeta = layer.layer_norm_backward(dy, self._for_backward(), out=out)
        self._finish_backward(dgamma, dbeta)
        return dx


class RMSNorm(Layer):
    """
    Root mean square normalization over the last axes: see `fastopt.rms_norm`.

    ::

        y = weight x / sqrt(mean(x^2) + eps)

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The last axes of x.
    eps : float, optional
        By default the distance from 1 to the next number of the dtype.
    elementwise_affine : bool, default True
        Learn ``weight`` (gamma).
    dtype : float32 or float64, default float32
        Of the parameters, and of x.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of its range.

    References
    ----------
    Zhang, Sennrich, Root mean square layer normalization, 2019.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> layer = fastopt.RMSNorm(2)
    >>> layer(np.array([[1, 7]], np.float32)).round(3)
    array([[0.2, 1.4]], dtype=float32)
    >>> layer
    RMSNorm((2,), eps=None, elementwise_affine=True)
    """

    _function = "rms_norm"
    _options = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _shape("RMSNorm", normalized_shape)
        learned = _learned("RMSNorm: elementwise_affine", elementwise_affine)[:1]
        super().__init__(self.normalized_shape, learned, eps, dtype)
        self.elementwise_affine = elementwise_affine

    def forward(self, x: Array, *, out: MaybeArray = None) -> Array:
        self._check_dtype(x)
        y, self._saved[self.training] = layer.rms_norm(
            x, self.normalized_shape, gamma=self.params.get("weight"), eps=self.eps, out=out
        )
        return y

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Array:
        dx, dgamma = layer.rms_norm_backward(dy, self._for_backward(), out=out)
        self._finish_backward(dgamma)
        return dx


class GroupNorm(Layer):
    """
    Group normalization of (N, C, ...): see `fastopt.group_norm`.

    ::

        y = weight (x - mean) / sqrt(var + eps) + bias

    Parameters
    ----------
    num_groups : int
        Divides ``num_channels``.
    num_channels : int
        C of x.
    eps : float, default 1e-5
    affine : bool, default True
        Learn ``weight`` (gamma) and ``bias`` (beta).
    dtype : float32 or float64, default float32
        Of the parameters, and of x.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of its range.

    References
    ----------
    Wu, He, Group normalization, 2018.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> layer = fastopt.GroupNorm(2, 4)
    >>> layer(np.array([[1, 3, 10, 30]], np.float32)).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    >>> layer
    GroupNorm(2, num_channels=4, eps=1e-05, affine=True)
    """

    _function = "group_norm"
    _options = ("num_groups", "num_channels", "eps", "affine")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_groups = integer("GroupNorm: num_groups", num_groups, 1)
        self.num_channels = integer("GroupNorm: num_channels", num_channels, 1)
        if num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_channels is {num_channels}, not a multiple of "
                f"num_groups={num_groups}"
            )
        super().__init__((self.num_channels,), _learned("GroupNorm: affine", affine), eps, dtype)
        self.affine = affine

    def forward(self, x: Array, *, out: MaybeArray = None) -> Array:
        gamma, beta = self.params.get("weight"), self.params.get("bias")
        self._check_dtype(x)
        y, self._saved[self.training] = group.group_norm(
            x, self.num_groups, gamma=gamma, beta=beta, eps=self.eps or 0.0, out=out
        )
        return y

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Array:
        dx, dgamma, dbeta = group.group_norm_backward(dy, self._for_backward(), out=out)
        self._finish_backward(dgamma, dbeta)
        return dx


class InstanceNorm(Layer):
    """
    Instance normalization of (N, C, ...): see `fastopt.instance_norm`.

    ::

        y = weight (x - mean) / sqrt(var + eps) + bias

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float, default 1e-5
    affine : bool, default False
        Learn ``weight`` (gamma) and ``bias`` (beta).
    dtype : float32 or float64, default float32
        Of the parameters, and of x.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of its range.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, Instance normalization: the missing ingredient for fast
    stylization, 2016.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> layer = fastopt.InstanceNorm(1)
    >>> layer(np.array([[[1, 3]]], np.float32)).round(3)
    array([[[-1.,  1.]]], dtype=float32)
    >>> layer
    InstanceNorm(1, eps=1e-05, affine=False)
    """

    _function = "instance_norm"
    _options = ("num_features", "eps", "affine")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = integer("InstanceNorm: num_features", num_features, 1)
        super().__init__((self.num_features,), _learned("InstanceNorm: affine", affine), eps, dtype)
        self.affine = affine

    def forward(self, x: Array, *, out: MaybeArray = None) -> Array:
        if isinstance(x, np.ndarray) and x.ndim > 1 and x.shape[1] != self.num_features:
            raise ValueError(
                f"InstanceNorm: x has shape {x.shape}, expected {self.num_features} channels"
            )
        gamma, beta = self.params.get("weight"), self.params.get("bias")
        self._check_dtype(x)
        y, self._saved[self.training] = group.instance_norm(
            x, gamma=gamma, beta=beta, eps=self.eps or 0.0, out=out
        )
        return y

    def backward(self, dy: Array, *, out: MaybeArray = None) -> Array:
        dx, dgamma, dbeta = group.instance_norm_backward(dy, self._for_backward(), out=out)
        self._finish_backward(dgamma, dbeta)
        return dx


def _shape(layer: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    return tuple(integer(f"{layer}: normalized_shape", size, 1) for size in sizes)

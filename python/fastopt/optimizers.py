"""
The optimizers: names, defaults and options are torch's.

Below, g is the gradient of a parameter p (negated with ``maximize``), t the number of the step
from 1 on, and all operations are elementwise. But for AdamW's, weight decay is L2
regularization: g = g + weight_decay p comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastopt.optimizer import ArrayTree, Optimizer, Schedule


def _common(options: Mapping[str, Any]) -> dict[str, float]:
    return {
        "grad_scale": -1.0 if options["maximize"] else 1.0,
        "weight_decay": options["weight_decay"],
    }


class SGD(Optimizer):
    """
    Stochastic gradient descent, with momentum or Nesterov's accelerated gradient.

    ::

        p = p - lr g                                                      momentum = 0
        v = momentum v + (1 - dampening) g;  p = p - lr v                 momentum > 0
        v = momentum v + (1 - dampening) g;  p = p - lr (g + momentum v)  nesterov

    As in torch, the velocity v of an array starts as the first gradient that meets a momentum,
    undamped, and stays as it is while the momentum is 0. With ``zero_start`` it starts at zero;
    ``SGD(lr=..., momentum=b, dampening=b, zero_start=True)`` is then the exponentially weighted
    average of the gradients, v = b v + (1 - b) g from v = 0.

    Some texts keep the learning rate inside the velocity, v = momentum v + lr g and p = p - v.
    For a constant ``lr`` that is the same; under a schedule it is not, because old gradients
    then keep the rate at which they came in.

    Nesterov's look-ahead, grad f(p + momentum v), is written here as in torch and in Sutskever's
    paper, for the gradient at p and with the velocity that already contains it. Code that steps
    by momentum v_old + (1 + momentum)(v - v_old), or that looks ahead with the velocity of before
    this gradient, is a different method from the one in its own derivation.

    Parameters
    ----------
    params : array or tree of arrays, optional
        float32 or float64, changed in place by `step`; a list of groups
        ``[{"params": ..., "lr": ...}, ...]`` gives each its own hyper-parameters. Without it,
        the first call of `update` binds the parameters.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule: ``lr(opt.steps)`` is the rate of a step.
    momentum : float, default 0.0
        At least 0.
    dampening : float, default 0.0
    weight_decay : float, default 0.0
        At least 0.
    nesterov : bool, default False
        Needs a momentum and no dampening.
    maximize : bool, default False
        Ascend.
    zero_start : bool, default False
        Dampen the first gradient, too.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
    Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep
    learning, 2013.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> params = {"W": np.array([1.0, -1.0])}
    >>> opt = fastopt.SGD(params, lr=0.1, momentum=0.9)
    >>> for _ in range(100):
    ...     opt.step({"W": 2 * params["W"]})
    >>> bool(np.abs(params["W"]).max() < 0.05)
    True
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: float | Schedule = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        zero_start: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            zero_start=zero_start,
        )

    def _check_together(self, options: Mapping[str, Any]) -> None:
        if options["nesterov"] and (options["momentum"] == 0.0 or options["dampening"] != 0.0):
            raise ValueError(
                f"{type(self).__name__}: nesterov needs momentum > 0 and dampening = 0, got "
                f"momentum={options['momentum']!r}, dampening={options['dampening']!r}"
            )

    _optional_states = ("momentum_buffer",)

    def _initial(self, state: str, options: Mapping[str, Any]) -> None:
        """The first step with momentum makes the velocity."""

    def _rule(self, options: Mapping[str, Any]) -> str:
        if options["momentum"] == 0.0:
            return "sgd"
        return "sgd_nesterov" if options["nesterov"] else "sgd_momentum"

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        constants = _common(options)
        if options["momentum"] != 0.0:
            constants["momentum"] = options["momentum"]
        return constants

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        if options["momentum"] == 0.0:
            return {"lr": lr}
        undamped = not started and not options["zero_start"]
        return {"lr": lr, "one_minus_dampening": 1.0 if undamped else 1 - options["dampening"]}


class Adagrad(Optimizer):
    """
    Adagrad: every element's rate falls with the sum of its squared gradients.

    ::

        s = s + g^2
        p = p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    With ``root_mean_square``, sigma = sqrt(s / t), the root of the mean of all squares so far,
    takes the place of sqrt(s): with lr = eta / sqrt(t) that is the same method again.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a schedule.
    lr_decay : float, default 0.0
        At least 0.
    weight_decay : float, default 0.0
        At least 0.
    initial_accumulator_value : float, default 0.0
        What s starts at, at least 0.
    eps : float, default 1e-10
        At least 0.
    maximize : bool, default False
        Ascend.
    root_mean_square : bool, default False
        Divide by the root mean square.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Duchi, Hazan, Singer, Adaptive subgradient methods for online learning and stochastic
    optimization, 2011.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0])
    >>> fastopt.Adagrad(w, lr=0.1).step(np.array([100.0, 0.01]))
    >>> w.round(6)
    array([0.9, 0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: float | Schedule = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        root_mean_square: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
            root_mean_square=root_mean_square,
        )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adagrad"

    def _initial(self, state: str, options: Mapping[str, Any]) -> float:
        return float(options["initial_accumulator_value"])

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        return {**_common(options), "eps": options["eps"]}

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {
            "lr": lr / (1 + (t - 1) * options["lr_decay"]),
            "mean_factor": 1 / t if options["root_mean_square"] else 1.0,
        }


class RMSprop(Optimizer):
    """
    RMSprop: the rate follows a moving average of the squared gradients.

    ::

        v = alpha v + (1 - alpha) g^2
        p = p - lr g / (sqrt(v) + eps)

    ``centered`` takes the estimated variance v - mean^2 for v, where
    mean = alpha mean + (1 - alpha) g. With ``momentum`` the step is
    b = momentum b + g / (sqrt(v) + eps), and p = p - lr b.

    The average starts at zero, as in torch: the first steps are longer by 1 / sqrt(1 - alpha). A
    text that starts with sigma_0 = abs(g_0) has its first gradient as the first average; set the
    state so before the first step::

        opt.state["W"]["square_avg"][...] = g0**2

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a schedule.
    alpha : float, default 0.99
        Decay of the averages, in [0, 1].
    eps : float, default 1e-8
        At least 0.
    weight_decay : float, default 0.0
        At least 0.
    momentum : float, default 0.0
        At least 0.
    centered : bool, default False
    maximize : bool, default False
        Ascend.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Tieleman, Hinton, Lecture 6.5, Neural networks for machine learning, 2012; centered: Graves,
    Generating sequences with recurrent neural networks, 2013.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w, g = np.array([1.0]), np.array([4.0])
    >>> opt = fastopt.RMSprop(w, lr=0.1, alpha=0.9)
    >>> opt.state["param"]["square_avg"][...] = g**2
    >>> opt.step(g)
    >>> w.round(6)
    array([0.9])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: float | Schedule = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
        )

    _optional_states = ("grad_avg", "momentum_buffer")

    def _rule(self, options: Mapping[str, Any]) -> str:
        centered = "_centered" if options["centered"] else ""
        return f"rmsprop{centered}" + ("_momentum" if options["momentum"] != 0.0 else "")

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        return {
            **_common(options),
            "alpha": options["alpha"],
            "one_minus_alpha": 1 - options["alpha"],
            "eps": options["eps"],
            "momentum": options["momentum"],
        }

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {"lr": lr}


class Adadelta(Optimizer):
    """
    Adadelta: steps in the units of the parameter, without a rate to tune.

    ::

        v = rho v + (1 - rho) g^2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho u + (1 - rho) d^2
        p = p - lr d

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1.0
        Factor of the step, at least 0, or a schedule.
    rho : float, default 0.9
        Decay of the averages, in [0, 1].
    eps : float, default 1e-6
        At least 0. It also sets the length of the first steps, sqrt(eps).
    weight_decay : float, default 0.0
        At least 0.
    maximize : bool, default False
        Ascend.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Zeiler, ADADELTA: an adaptive learning rate method, 2012.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0])
    >>> opt = fastopt.Adadelta(w)
    >>> for _ in range(2000):
    ...     opt.step(2 * w)
    >>> bool(abs(w[0]) < 0.1)
    True
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: float | Schedule = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize
        )

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adadelta"

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        return {
            **_common(options),
            "rho": options["rho"],
            "one_minus_rho": 1 - options["rho"],
            "eps": options["eps"],
        }

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        return {"lr": lr}


class Adam(Optimizer):
    """
    Adam: momentum and RMSprop, both corrected for their start at zero.

    ::

        m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)

    With ``amsgrad``, the largest v so far takes the place of v.

    Parameters
    ----------
    params : array or tree of arrays, optional
        As for `SGD`.
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a schedule.
    betas : tuple of two floats, default (0.9, 0.999)
        Decay of the two averages, each in [0, 1).
    eps : float, default 1e-8
        At least 0.
    weight_decay : float, default 0.0
        L2 regularization, at least 0.
    amsgrad : bool, default False
    maximize : bool, default False
        Ascend.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Kingma, Ba, Adam: a method for stochastic optimization, 2015; amsgrad: Reddi, Kale, Kumar, On
    the convergence of Adam and beyond, 2018.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 1.0], dtype=np.float32)
    >>> opt = fastopt.Adam(w, lr=0.1)
    >>> opt.step(np.array([100.0, 0.01], dtype=np.float32))
    >>> w.round(4)
    array([0.9, 0.9], dtype=float32)
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
        )

    _optional_states = ("max_exp_avg_sq",)

    def _rule(self, options: Mapping[str, Any]) -> str:
        return "adam_amsgrad" if options["amsgrad"] else "adam"

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        return {
            **_common(options),
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "eps": options["eps"],
        }

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        return {
            "decay": 1.0,
            "step_size": lr / (1 - beta1**t),
            "root_correction": 1 / math.sqrt(1 - beta2**t),
        }


class AdamW(Adam):
    """
    Adam with decoupled weight decay: p = (1 - lr weight_decay) p before Adam's step.

    The decay does not pass through the averages, and so is not divided by sqrt(v).

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize
        As for `Adam`.
    weight_decay : float, default 1e-2
        At least 0.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter is out of its range or an array cannot be changed in place.

    References
    ----------
    Loshchilov, Hutter, Decoupled weight decay regularization, 2019.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, 2.0])
    >>> fastopt.AdamW(w, lr=0.1, weight_decay=0.5).step(np.zeros(2))
    >>> w
    array([0.95, 1.9 ])
    """

    def __init__(
        self,
        params: ArrayTree | None = None,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        return {**super()._constants(options), "weight_decay": 0.0}

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        coefficients = super()._coefficients(options, lr, t, started)
        coefficients["decay"] = 1 - lr * options["weight_decay"]
        return coefficients

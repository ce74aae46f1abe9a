"""What all optimizers share: binding parameters, stepping, groups, state, saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt import _core

ArrayTree: TypeAlias = Any
"""An array, a mapping or a sequence of arrays, or any nesting of them."""

Schedule: TypeAlias = Callable[[int], float]
"""The learning rate after so many completed steps."""

_RULES = _core.rules()


def _number(low: float, high: float = math.inf, *, below: bool = False) -> Callable[[Any], float]:
    """A check: a finite number from low to high, or below high."""
    if below:
        expected = f"a number in [{low:g}, {high:g})"
    elif high < math.inf:
        expected = f"a number in [{low:g}, {high:g}]"
    elif low > -math.inf:
        expected = f"a finite number >= {low:g}"
    else:
        expected = "a finite number"

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(expected)
        number = float(value)
        if not (low <= number <= high and math.isfinite(number)) or (below and number == high):
            raise ValueError(expected)
        return number

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError("a bool")
    return bool(value)


def _rate(value: Any) -> float | Schedule:
    if callable(value):
        schedule: Schedule = value
        return schedule
    return _number(0.0)(value)


def _betas(value: Any) -> tuple[float, float]:
    check = _number(0.0, 1.0, below=True)
    expected = "two numbers in [0, 1)"
    if not isinstance(value, (tuple, list)):
        raise TypeError(expected)
    if len(value) != 2:
        raise ValueError(expected)
    return check(value[0]), check(value[1])


# The range of every hyper-parameter; a check raises with what it expects.
_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "alpha": _number(0.0, 1.0),
    "amsgrad": _flag,
    "betas": _betas,
    "centered": _flag,
    "dampening": _number(-math.inf),
    "eps": _number(0.0),
    "initial_accumulator_value": _number(0.0),
    "lr": _rate,
    "lr_decay": _number(0.0),
    "maximize": _flag,
    "momentum": _number(0.0),
    "nesterov": _flag,
    "rho": _number(0.0, 1.0),
    "root_mean_square": _flag,
    "weight_decay": _number(0.0),
    "zero_start": _flag,
}


# A processor takes a load for the reload of a store before it that is a multiple of a page away,
# and waits: a step over 64 K elements whose arrays began at the same place of a page took up to 2.7
# times as long. So states begin elsewhere than their parameters: each so many lines further on.
_LINE_BYTES, _PAGE_BYTES = 64, 4096
_LINES_APART = 17
_PLACED_FROM_BYTES = 4 * _PAGE_BYTES  # smaller ones would leave too much room between them

# Memory of a power of two in size would lie a power of two apart, and then share the banks of the
# memory: a step over 16 M elements took 1.25 times as long. Room behind large ones keeps them off.
_PADDED_FROM_BYTES = 1 << 24
_PADDING_BYTES = 1 << 22


def _new_states(arrays: Sequence[NDArray[Any]], value: float, number: int) -> list[NDArray[Any]]:
    """
    State ``number`` of each parameter: of this value, in the parameter's shape, dtype and order.

    They lie one after the other: a step finds them in few large pages, and walks on from one to
    the next without a break. With 1000 arrays of 4096 elements that saves an eighth of its time.
    """

    def unit(array: NDArray[Any]) -> int:
        return _PAGE_BYTES if array.nbytes >= _PLACED_FROM_BYTES else _LINE_BYTES

    size = sum(array.nbytes + unit(array) for array in arrays)
    memory = np.empty(size + (_PADDING_BYTES if size >= _PADDED_FROM_BYTES else 0), np.uint8)
    states, end = [], memory.ctypes.data
    for array in arrays:
        # In whole lines from the parameter's place, so that no store straddles two of them.
        wanted = array.ctypes.data + (number + 1) * _LINES_APART * _LINE_BYTES
        begin = end + (wanted - end) % unit(array)
        in_bytes = np.empty_like(array, np.uint8, subok=False)
        strides = [step * array.itemsize for step in in_bytes.strides]
        state: NDArray[Any] = np.ndarray(
            array.shape, array.dtype, memory, begin - memory.ctypes.data, strides
        )
        state[...] = value
        states.append(state)
        end = begin + array.nbytes
    return states


class ParamGroup(MutableMapping[str, Any]):
    """The hyper-parameters of one group: a mapping that checks what is set, plus ``params``."""

    def __init__(
        self, optimizer: Optimizer, index: int, params: ArrayTree, options: dict[str, Any]
    ) -> None:
        self._optimizer = optimizer
        self._index = index
        self._params = params
        self._options = options
        self._rule = ""

    def __getitem__(self, name: str) -> Any:
        return self._params if name == "params" else self._options[name]

    def __setitem__(self, name: str, value: Any) -> None:
        options = self._optimizer._checked({**self._options, name: value})
        self._optimizer._set_options(self, options)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{type(self._optimizer).__name__}: {name!r} can be set, not deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *self._options))

    def __len__(self) -> int:
        return 1 + len(self._options)

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())


class Optimizer:
    """
    Base of the optimizers: `step` changes the arrays of ``params`` in place.

    An optimizer keeps the *container* that it is given, not its arrays: every call steps what the
    container holds then. ``params["W"] = new_array`` of the same shape and dtype is followed, and
    goes on with the state of the name ``"W"``.

    Attributes
    ----------
    registry : dict
        All optimizers by name.
    """

    registry: ClassVar[dict[str, type[Optimizer]]] = {}

    def __init_subclass__(cls) -> None:
        Optimizer.registry[cls.__name__] = cls

    def __init__(self, params: ArrayTree | None, **options: Any) -> None:
        self.defaults = self._checked(options)
        self._plan: _core.Plan | None = None
        self._params: ArrayTree = None
        self._groups: list[ParamGroup] = []
        self._states: list[dict[str, NDArray[Any]]] = []
        self._state: Mapping[str, Mapping[str, NDArray[Any]]] = MappingProxyType({})
        if params is not None:
            self._bind(params)

    # What a subclass says of its rule.

    def _rule(self, options: Mapping[str, Any]) -> str:
        """The name of the kernel."""
        raise NotImplementedError

    def _constants(self, options: Mapping[str, Any]) -> dict[str, float]:
        """The kernel's coefficients that do not change from step to step, by name."""
        raise NotImplementedError

    def _coefficients(self, options: Mapping[str, Any], lr: float, t: int) -> dict[str, float]:
        """The others, in the t-th step (from 1 on)."""
        raise NotImplementedError

    def _initial(self, state: str, options: Mapping[str, Any]) -> float:
        """The value that a new state is filled with."""
        return 0.0

    def _check_together(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that do not go together."""

    # The public face.

    def step(
        self,
        grads: ArrayTree,
        *,
        loss_scale: float = 1.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> float | None:
        """
        Make one step in place: all parameters that have a gradient, or none at all.

        Parameters
        ----------
        grads : array or tree of arrays
            The tree of ``params`` with a gradient, of the same shape and dtype, for every
            parameter. ``None`` leaves out a parameter or a whole branch, whose step counts and
            states stay as they are. Gradients may be read-only and of any memory layout; those
            in their parameter's memory order are fastest.
        loss_scale : float, default 1.0
            Gradients are divided by it first: the factor by which the loss was multiplied.
        max_norm : float, optional
            Gradients are then scaled down so that their global norm, the root of the sum of all
            squares, is at most this (Pascanu, Mikolov, Bengio 2013).
        skip_nonfinite : bool, default False
            Do nothing, and count it in ``skipped_steps``, if any element of a gradient is
            infinite or NaN.
        zero_grads : bool, default False
            Set the gradients to zero once they have been used, also those of a step that
            ``skip_nonfinite`` left out: for loops that add to them. It costs less here, where
            they are in the cache, than after the step. They must be writable then and may not
            share memory with each other.

        Returns
        -------
        float or None
            The global norm of the gradients divided by ``loss_scale``, before clipping, where
            ``max_norm`` or ``skip_nonfinite`` asked for it.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit; the message names it. Nothing is changed then.
        RuntimeError
            If another step of this optimizer is under way, in a thread or in a schedule.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> w = np.array([1.0, 2.0])
        >>> opt = fastopt.SGD(w, lr=0.1)
        >>> opt.step(np.array([3.0, 4.0]), max_norm=1.0)
        5.0
        >>> w.round(3)
        array([0.94, 1.92])
        """
        if self._plan is None:
            name = type(self).__name__
            raise ValueError(f"{name}.step: no parameters yet: use {name}(params) or update")
        if loss_scale != 1.0 or max_norm is not None:
            self._check_scaling(loss_scale, max_norm)
        return self._plan.step(
            self._params, grads, self._fold, loss_scale, max_norm, skip_nonfinite, zero_grads
        )

    def update(
        self,
        params: ArrayTree,
        grads: ArrayTree,
        *,
        loss_scale: float = 1.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> float | None:
        """
        Step ``params``, which the first call binds: ``opt.update(params, grads)`` in a loop.

        Parameters
        ----------
        params : array or tree of arrays
            May be other arrays of the same names, shapes and dtypes at every call.
        grads, loss_scale, max_norm, skip_nonfinite, zero_grads
            As for `step`.

        Returns
        -------
        float or None
            As `step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `step`.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> params = {"W": np.ones((2, 2)), "b": np.zeros(2)}
        >>> opt = fastopt.SGD(lr=0.5)
        >>> opt.update(params, {"W": np.ones((2, 2)), "b": np.ones(2)})
        >>> params["b"]
        array([-0.5, -0.5])
        """
        if self._plan is None:
            self._bind(params)
            params = self._params
        elif self._is_grouped(params):
            params = [group["params"] for group in params]
        assert self._plan is not None
        self._check_scaling(loss_scale, max_norm)
        norm = self._plan.step(
            params, grads, self._fold, loss_scale, max_norm, skip_nonfinite, zero_grads
        )
        self._params = params
        return norm

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return 0 if self._plan is None else self._plan.steps

    @property
    def skipped_steps(self) -> int:
        """The number of steps that ``skip_nonfinite`` left out."""
        return 0 if self._plan is None else self._plan.skipped_steps

    @property
    def lr(self) -> float:
        """The learning rate of the next step (of group 0); setting it sets all groups."""
        return self._lr(self._groups[0]._options if self._groups else self.defaults)

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        self.defaults = self._checked({**self.defaults, "lr": value})
        for group in self._groups:
            group["lr"] = value

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups: mappings of hyper-parameters that can be set, and ``params``."""
        return tuple(self._groups)

    @property
    def state(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """
        The live state, ``opt.state["W"]["exp_avg"]``, under torch's names.

        Its arrays can be written to (``opt.state["W"]["sum"][...] = 1.0``), not replaced.
        ``"step"`` is the number of steps that this parameter has made, an array of no axes.
        """
        return self._state

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """
        Return a copy of everything that a later run needs to go on with the same bits.

        Returns
        -------
        dict of str to array
            Flat, and ready for ``np.savez(file, **opt.state_dict())`` or safetensors:
            ``"steps"``, ``"skipped_steps"``, ``"param_groups.0.lr"`` and the other
            hyper-parameters, ``"state.W.exp_avg"`` and the other states. A learning-rate
            schedule is not in it; its position is ``"steps"``.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> list(fastopt.SGD({"W": np.ones(2)}, momentum=0.9).state_dict())[-2:]
        ['state.W.step', 'state.W.momentum_buffer']
        """
        arrays: dict[str, Any] = {"steps": self.steps, "skipped_steps": self.skipped_steps}
        for i, group in enumerate(self._groups):
            for name, value in group._options.items():
                if not callable(value):
                    arrays[f"param_groups.{i}.{name}"] = value
        for parameter, state in self.state.items():
            for name, array in state.items():
                arrays[f"state.{parameter}.{name}"] = array
        return {key: np.array(value, order="C") for key, value in arrays.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """
        Take over the state and the hyper-parameters of another optimizer on equal parameters.

        Parameters
        ----------
        state_dict : mapping of str to array or number
            What `state_dict` returned, also after a file: ``opt.load_state_dict(np.load(file))``.
            Where it has no ``lr``, because that was a schedule, this optimizer keeps its own.

        Raises
        ------
        TypeError, ValueError
            If names, shapes or dtypes differ: the message says which. Nothing is changed then.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> w = np.ones(3)
        >>> saved = fastopt.SGD(w, momentum=0.9).state_dict()
        >>> opt = fastopt.SGD(w)
        >>> opt.load_state_dict(saved)
        >>> opt.param_groups[0]["momentum"]
        0.9
        """
        caller = f"{type(self).__name__}.load_state_dict"
        plan = self._plan
        if plan is None:
            raise ValueError(f"{caller}: no parameters yet: use {type(self).__name__}(params)")
        if not isinstance(state_dict, Mapping):
            name = type(state_dict).__name__
            raise TypeError(f"{caller}: state_dict is of type {name}, expected a mapping")
        given = {key: np.asarray(value) for key, value in state_dict.items()}

        wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any] | None]] = {}
        wanted["steps"] = wanted["skipped_steps"] = ((), None)
        all_options = []
        for i, group in enumerate(self._groups):
            options = dict(group._options)
            for name in options:
                key = f"param_groups.{i}.{name}"
                if key in given:
                    value = given[key].tolist()
                    options[name] = tuple(value) if isinstance(value, list) else value
                if key in given or name != "lr":
                    wanted[key] = ((2,) if name == "betas" else (), None)
            all_options.append(options)
        self._check_keys(caller, {key for key in wanted if key not in given}, set())
        all_options = [self._checked(options) for options in all_options]
        for name, array, index in zip(plan.names, plan.params, plan.groups, strict=True):
            wanted[f"state.{name}.step"] = ((), None)
            for state in _RULES[self._rule(all_options[index])][0]:
                wanted[f"state.{name}.{state}"] = (array.shape, array.dtype)
        self._check_keys(caller, wanted.keys() - given.keys(), given.keys() - wanted.keys())
        for key, (shape, dtype) in wanted.items():
            if given[key].shape != shape:
                raise ValueError(f"{caller}: {key} has shape {given[key].shape}, expected {shape}")
            if dtype is not None and given[key].dtype != dtype:
                raise TypeError(f"{caller}: {key} has dtype {given[key].dtype}, expected {dtype}")
            if dtype is None and not key.startswith("param_groups."):
                if given[key].dtype.kind not in "iu" or given[key] < 0:
                    raise ValueError(f"{caller}: {key} is {given[key]}, expected a count")

        for group, options in zip(self._groups, all_options, strict=True):
            self._set_options(group, options)
        for parameter, states in self.state.items():
            for name, state_array in states.items():
                state_array[...] = given[f"state.{parameter}.{name}"]
        plan.steps = int(given["steps"])
        plan.skipped_steps = int(given["skipped_steps"])

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "params": self._params,
            "options": [group._options for group in self._groups],
            "grouped": self._grouped if self._groups else False,
            "state_dict": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            defaults=state["defaults"],
            _plan=None,
            _params=None,
            _groups=[],
            _states=[],
            _state=MappingProxyType({}),
        )
        if state["options"]:
            self._bind_trees(state["params"], state["options"], state["grouped"])
            self.load_state_dict(state["state_dict"])

    def __repr__(self) -> str:
        name = type(self).__name__
        if self._plan is None:
            options = ", ".join(f"{key}={value!r}" for key, value in self.defaults.items())
            return f"{name}({options})"
        skipped = f", skipped_steps={self.skipped_steps}" if self.skipped_steps else ""
        lines = [f"{name}(steps={self.steps}{skipped}"]
        for i, group in enumerate(self._groups):
            arrays = [
                a for a, g in zip(self._plan.params, self._plan.groups, strict=True) if g == i
            ]
            dtypes = "/".join(sorted({str(array.dtype) for array in arrays}))
            size = sum(array.size for array in arrays)
            lines.append(f"  group {i}: {group!r}")
            lines.append(f"    {len(arrays)} arrays, {size:,} elements, {dtypes}")
        return "\n".join(lines) + "\n)"

    # How it is done.

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, each checked and in its own type."""
        caller = type(self).__name__
        checked = {}
        for name, value in options.items():
            if name not in _CHECKS or (hasattr(self, "defaults") and name not in self.defaults):
                raise ValueError(f"{caller}: unknown hyper-parameter {name!r}")
            try:
                checked[name] = _CHECKS[name](value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{caller}: {name} is {value!r}, expected {error}") from None
        self._check_together(checked)
        return checked

    def _check_scaling(self, loss_scale: float, max_norm: float | None) -> None:
        for name, value in (("loss_scale", loss_scale), ("max_norm", max_norm)):
            if value is None:
                continue
            caller = f"{type(self).__name__}.step: {name} is {value!r}, expected a number > 0"
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(caller)
            if not 0 < float(value) < math.inf and not (name == "max_norm" and value == math.inf):
                raise ValueError(caller)

    def _check_keys(self, caller: str, missing: set[str], unexpected: set[str]) -> None:
        if missing or unexpected:
            parts = [
                f"{what} {', '.join(sorted(keys)[:5])}" + (", ..." if len(keys) > 5 else "")
                for what, keys in (("missing", missing), ("unexpected", unexpected))
                if keys
            ]
            raise ValueError(f"{caller}: the state is of another model: {'; '.join(parts)}")

    @staticmethod
    def _is_grouped(params: ArrayTree) -> bool:
        return (
            isinstance(params, Sequence)
            and len(params) > 0
            and all(isinstance(group, Mapping) and "params" in group for group in params)
        )

    def _bind(self, params: ArrayTree) -> None:
        if not self._is_grouped(params):
            self._bind_trees(params, [self.defaults], grouped=False)
            return
        all_options = [
            self._checked({**self.defaults, **{k: v for k, v in group.items() if k != "params"}})
            for group in params
        ]
        self._bind_trees([group["params"] for group in params], all_options, grouped=True)

    def _bind_trees(
        self, params: ArrayTree, all_options: list[dict[str, Any]], grouped: bool
    ) -> None:
        plan = _core.Plan(type(self).__name__, params, grouped)
        self._plan, self._params, self._grouped = plan, params, grouped
        self._states = [{} for _ in plan.names]
        self._groups = [
            ParamGroup(self, i, params[i] if grouped else params, dict(options))
            for i, options in enumerate(all_options)
        ]
        for group in self._groups:
            self._set_options(group, group._options)

    def _set_options(self, group: ParamGroup, options: dict[str, Any]) -> None:
        """Gives a group these hyper-parameters; states go by name, and new ones are filled."""
        assert self._plan is not None
        rule = self._rule(options)
        states: dict[int, dict[str, NDArray[Any]]] = {}
        if rule != group._rule:
            owners = enumerate(self._plan.groups)
            states = {i: {} for i, owner in owners if owner == group._index}
            params = self._plan.params
            mine = [params[i] for i in states]
            for number, name in enumerate(_RULES[rule][0]):
                known = [self._states[i][name] for i in states if name in self._states[i]]
                arrays = known or _new_states(mine, self._initial(name, options), number)
                for state, array in zip(states.values(), arrays, strict=True):
                    state[name] = array
        # Nothing is changed before this point: memory for the states may have run out.
        self._plan.set_constants(group._index, rule, self._constants(options))
        for i, state in states.items():
            self._plan.bind(i, rule, list(state.values()))
            self._states[i] = state
        group._options, group._rule = options, rule
        if not states:
            return
        counts = self._plan.counts
        self._state = MappingProxyType(
            {
                name: MappingProxyType({"step": counts[i : i + 1].reshape(()), **state})
                for i, (name, state) in enumerate(zip(self._plan.names, self._states, strict=True))
            }
        )

    def _lr(self, options: Mapping[str, Any]) -> float:
        lr = options["lr"]
        if callable(lr):
            value = lr(self.steps)
            try:
                return _number(0.0)(value)
            except (TypeError, ValueError) as error:
                name = type(self).__name__
                raise type(error)(
                    f"{name}: lr({self.steps}) of {lr!r} is {value!r}, expected {error}"
                ) from None
        return float(lr)

    def _fold(self, index: int, t: int) -> dict[str, float]:
        options = self._groups[index]._options
        lr = options["lr"]
        return self._coefficients(options, self._lr(options) if callable(lr) else lr, t)

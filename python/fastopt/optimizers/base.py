"""What all optimizers share: binding parameters, stepping, groups, state, saving."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, TypeGuard, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fastopt import _core, _state
from fastopt._checks import number, shown
from fastopt._state import Entry
from fastopt._tree import Array
from fastopt.optimizers import storage
from fastopt.optimizers.groups import ParamGroup, States, did_you_mean, writable
from fastopt.optimizers.options import Maybe, Range, Schedule
from fastopt.optimizers.states import State

Groups: TypeAlias = Sequence[Mapping[str, Any]]

ArrayTree: TypeAlias = Array | Mapping[Any, "ArrayTree"] | Sequence["ArrayTree"] | Groups
"""An array, a mapping or a sequence of arrays, or any nesting of them; or a list of groups."""

Gradient: TypeAlias = Array | np.floating[Any] | None
GradientTree: TypeAlias = Gradient | Mapping[Any, "GradientTree"] | Sequence["GradientTree"]
"""The same tree of gradients, with None for what has none."""

_RULES = _core.rules()
_CODINGS = {name: coding for states, *_ in _RULES.values() for name, coding in states.items()}


def _constants(rule: str, options: Mapping[str, Any]) -> dict[str, float]:
    """The coefficients of a rule that are hyper-parameters, ``beta1`` of ``betas``, or 1 minus."""
    values = {"grad_scale": -1.0 if options["maximize"] else 1.0}
    for name, value in options.items():
        if isinstance(value, tuple):
            numbered = {f"{name[:-1]}{i}": item for i, item in enumerate(value, 1)}
            values.update({key: item for key, item in numbered.items() if item is not None})
        elif isinstance(value, (bool, float)):
            values[name] = float(value)
    values.update({f"one_minus_{name}": 1 - value for name, value in values.items()})
    return {name: values[name] for name in _RULES[rule][1] if name in values}


def decayed(p: Array, g: Array, weight_decay: float) -> Array:
    """Return the gradient with that of L2 regularization: without it, also where p is infinite."""
    return g + weight_decay * p if weight_decay else g


def with_decay(
    p: Array, g: Array, lr: float, weight_decay: float, decoupled: bool
) -> tuple[Array, float]:
    """Return the gradient and the parameter's factor: weight decay is in one of them."""
    return (g, 1 - lr * weight_decay) if decoupled else (decayed(p, g, weight_decay), 1.0)


def moved(p: Array, g: Array, c: float) -> Array:
    """Return p gone the share c of its way to g."""
    dtype = np.asarray(p).dtype.type
    share, rest = dtype(c), dtype(1 - c)
    start, end, part = (p, g, share) if share < rest else (g, p, rest)
    with np.errstate(all="ignore"):
        way = start + (part * end - part * start)
        return np.where(np.isfinite(p) & np.isfinite(g), way, p + g)


def caution(u: Array, g: Array) -> Array:
    """Return 0 where u is against g, else 1 over the share of those where it is not."""
    aligned = u * g > 0
    mask: Array = aligned / max(np.count_nonzero(aligned) / max(u.size, 1), 1e-3)
    return mask.astype(u.dtype)


class Optimizer:
    """
    Base of the optimizers: `step` changes the arrays of ``params`` in place.

    An optimizer keeps the *container* that it is given, not its arrays: every call steps what the
    container holds then. ``params["W"] = new_array`` of the same shape and dtype is followed, and
    goes on with the state of the name ``"W"``.

    The signature of a class declares its hyper-parameters: the annotations hold their ranges, and
    ``super().__init__(params, locals())`` passes the values on. A class that a user derives from an
    optimizer may have some of its own, checked where a `fastopt.optimizers.options.Range` stands in
    ``Annotated[...]``. They can be set per group, and are saved, as all others. All optimizers take
    the options of `fastopt.optimizers.storage.Storage`, too.

    Attributes
    ----------
    registry : dict
        The optimizers of this library by name.
    ranges : mapping of str to Range
        Those of the hyper-parameters by name.
    """

    registry: ClassVar[dict[str, type[Optimizer]]] = {}
    ranges: ClassVar[Mapping[str, Range]] = {}

    # Those that begin otherwise than at zero, or come with an option.
    _special_states: ClassVar[tuple[State, ...]] = ()

    _defaults: dict[str, Any]
    _bound: _core.BoundOptimizer | None
    _params: Any
    _grouped: bool
    _groups: list[ParamGroup]
    _numbers: dict[str, NDArray[np.float64]]
    _states: list[dict[str, NDArray[Any]]]  # of every array, by name
    _state: Mapping[str, Mapping[str, NDArray[Any]]]
    _sizes: Mapping[int, int] = MappingProxyType({})  # of the arrays that bound ones are parts of

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        try:
            hints = get_type_hints(cls.__init__, include_extras=True)
        except Exception:  # a user's annotations may be for type checkers alone
            hints = {}
        declared = {
            name: part
            for name, hint in hints.items()
            for part in getattr(hint, "__metadata__", ())
            if isinstance(part, Range)
        }
        if cls.__module__.startswith("fastopt."):
            cls.ranges = declared
            if not cls.__name__.startswith("_"):
                Optimizer.registry[cls.__name__] = cls
        else:
            cls.ranges = {**cls.ranges, **declared}

    def __init__(self, params: ArrayTree | None, options: Mapping[str, Any]) -> None:
        """Bind the parameters, if there are any; `options` are the locals of ``__init__``."""
        own = {
            name: value
            for name, value in options.items()
            if name not in ("self", "params", "storage", "__class__")
        }
        self._defaults = own
        given = options.get("storage", {})
        for name in given.keys() - storage.DEFAULTS.keys():
            meant = did_you_mean(name, [*own, *storage.DEFAULTS])
            raise TypeError(f"{type(self).__name__}: unknown hyper-parameter {name!r}{meant}")
        self._defaults = self._checked({**own, **given})
        self._forget()
        if params is not None:
            self._bind(params)

    def __setattr__(self, name: str, value: Any) -> None:
        # Not by vars(self): that would make a dict of it, and every later look slower.
        caller, options = type(self).__name__, getattr(self, "_defaults", {})
        if name in options and name != "lr":
            raise AttributeError(
                f"{caller}: {name} is a hyper-parameter of every group: "
                f"set opt.param_groups[0][{name!r}] = {shown(value)}"
            )
        known = name.startswith("_") or hasattr(type(self), name)
        if not known and Optimizer.registry.get(caller) is type(self):
            raise AttributeError(f"{caller} has no attribute {name!r}{did_you_mean(name, options)}")
        super().__setattr__(name, value)

    # What a subclass says of its rule.

    def _rule(self, options: Mapping[str, Any]) -> str:
        """The name of the kernel."""
        raise NotImplementedError

    def _rule_for(self, options: Mapping[str, Any], array: Array) -> str:
        """That of one array; its coefficients are those of `_rule`."""
        return self._rule(options)

    def _coefficients(
        self, options: Mapping[str, Any], lr: float, t: int, started: bool
    ) -> dict[str, float]:
        """
        The kernel's coefficients of the t-th step (from 1 on) of arrays whose state is new or not.

        But for those that are a hyper-parameter, or one minus it: these come by their names. The
        options have the arrays' numbers, too, and the result has the next ones.
        """
        return {"lr": lr}

    def _check_params(self, bound: _core.BoundOptimizer) -> None:
        """Raises ValueError for arrays that the rule cannot step."""

    def _between(self, options: Mapping[str, Any]) -> Callable[[Array], None] | None:
        """What changes, in place, the stacks of arrays that a rule prepares."""
        return None

    def _check_together(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that do not go together."""

    def _check_group(
        self, options: Mapping[str, Any], all_options: Iterator[Mapping[str, Any]]
    ) -> None:
        """Raises ValueError for a group that does not go with the others."""

    # The public face.

    def step(
        self,
        grads: GradientTree,
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
            If another step of this optimizer is under way, in a thread or in a schedule, or an
            array was changed during the step.

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
        if self._bound is None:
            name = type(self).__name__
            raise ValueError(f"{name}.step: no parameters yet: use {name}(params) or update")
        return self._bound.step(
            self._params, grads, self._fold, loss_scale, max_norm, skip_nonfinite, zero_grads
        )

    def update(
        self,
        params: ArrayTree,
        grads: GradientTree,
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
        first = self._bound is None
        if first:
            self._bind(params)
            params = self._params
        elif self._is_grouped(params):
            params = [group["params"] for group in params]
        assert self._bound is not None
        try:
            norm = self._bound.step(
                params, grads, self._fold, loss_scale, max_norm, skip_nonfinite, zero_grads
            )
        except BaseException:
            if first:
                self._forget()
            raise
        if params is not self._params:
            self._params = params
            trees = params if self._grouped else [params]
            for group, tree in zip(self._groups, trees, strict=True):
                group._params = tree
        return norm

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """
        Add parameters, with hyper-parameters of their own, to those that are bound.

        What was bound goes on with its state, and the optimizer is the one that would have been
        built from all groups: ``grads`` is from now on a list with one tree per group, also where
        ``params`` was a single tree before; that becomes group 0, and its ``"W"`` is ``"0.W"``.

        Parameters
        ----------
        group : mapping
            ``{"params": ..., "lr": ...}``; other hyper-parameters are the optimizer's.

        Raises
        ------
        TypeError, ValueError
            If the group does not fit; the message says why. Nothing is changed then.
        RuntimeError
            If a step of this optimizer is under way.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> head, body = np.ones(2), np.ones(2)
        >>> opt = fastopt.SGD([{"params": head}], lr=0.5)
        >>> opt.add_param_group({"params": body, "lr": 0.25})
        >>> opt.step([np.ones(2), np.ones(2)])
        >>> head, body
        (array([0.5, 0.5]), array([0.75, 0.75]))
        """
        if not self._is_grouped([group]):
            raise TypeError(
                f"{type(self).__name__}.add_param_group: group is {shown(group)}, "
                "expected a mapping with 'params'"
            )
        bound = self._bound
        if bound is None:
            self._bind([group])
            return
        all_options = [*(known._options for known in self._groups), self._options_of(group)]
        trees = self._params if self._grouped else [self._params]
        with bound:
            self._bind_trees([*trees, group["params"]], all_options, grouped=True)

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return 0 if self._bound is None else self._bound.steps

    @property
    def skipped_steps(self) -> int:
        """The number of steps that ``skip_nonfinite`` left out."""
        return 0 if self._bound is None else self._bound.skipped_steps

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The hyper-parameters of groups that do not have their own, as they were given."""
        return MappingProxyType(self._defaults)

    @property
    def lr(self) -> float:
        """
        The learning rate of the next step; setting it sets all groups.

        Raises
        ------
        ValueError
            If it is read, and groups have different rates.
        """
        all_options = [group._options for group in self._groups] or [self._defaults]
        rates = [self._lr(options) for options in all_options]
        if any(rate != rates[0] for rate in rates):
            raise ValueError(
                f"{type(self).__name__}.lr: the groups have different rates, {shown(rates)}: "
                "read opt.param_groups[0]['lr']"
            )
        return rates[0]

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        defaults = self._checked({**self._defaults, "lr": value})
        self._change({group._index: {"lr": value} for group in self._groups})
        self._defaults = defaults

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups: mappings of hyper-parameters that can be set, and ``params``."""
        return tuple(self._groups)

    @property
    def state(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """
        The live state, ``opt.state["W"]["exp_avg"]``, under torch's names.

        Its arrays can be written to (``opt.state["W"]["sum"][...] = 1.0``), not replaced; every
        look makes new views of the state.
        ``"step"`` is the number of steps that this parameter has made, an array of no axes. A state
        of 8 bits is its codes, with the scales beside it, as ``"exp_avg_scale"``; a float32 master
        of the parameter is ``"master_param"``; and bfloat16 is ``ml_dtypes.bfloat16`` where that is
        installed, else its bits.
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
            schedule is not in it; its position is ``"steps"``. The velocity of an array that has
            none yet, because all its gradients were ``None`` or the momentum 0, is not in it.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> list(fastopt.Adam({"W": np.ones(2)}).state_dict())[-2:]
        ['state.W.exp_avg', 'state.W.exp_avg_sq']
        """
        return {key: np.array(value, order="C") for key, value in self._to_save().items()}

    def _to_save(self) -> dict[str, Any]:
        """What `state_dict` copies."""
        arrays: dict[str, Any] = {"steps": self.steps, "skipped_steps": self.skipped_steps}
        arrays |= self._numbers
        for i, group in enumerate(self._groups):
            for name, value in group._options.items():
                if value is not None and not callable(value):
                    arrays[f"param_groups.{i}.{name}"] = _state.encoded(value)
            for name, shared in group._numbers.items():
                arrays[f"param_groups.{i}.{name}"] = shared
        if self._bound is not None:
            started, counts = self._bound.started.tolist(), self._bound.counts
            for i, parameter in enumerate(self._bound.names):
                arrays[f"state.{parameter}.step"] = counts[i]
                for name, array in storage.saved(self._states[i]).items():
                    late = self._declared(name).initial is None
                    if not late or started[i] or array.any():
                        arrays[f"state.{parameter}.{name}"] = array
        return arrays

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """
        Take over the state and the hyper-parameters of another optimizer on equal parameters.

        Parameters
        ----------
        state_dict : mapping of str to array or number
            What `state_dict` returned, also after a file: ``opt.load_state_dict(np.load(file))``.
            This optimizer keeps its own ``lr`` where that is a schedule, or the other's was, and
            its own ``state_dtype``, ``master_weights`` and ``rounding``.
        convert : bool, default False
            Take over states that are stored otherwise, too: rounded to this optimizer's
            ``state_dtype``, and with a master made of the parameter where there was none.

        Raises
        ------
        TypeError, ValueError
            If names, shapes, dtypes or storages differ: the message says which. Nothing is changed
            then.

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
        bound = self._bound
        if bound is None:
            raise ValueError(f"{caller}: no parameters yet: use {type(self).__name__}(params)")
        own = [array for states in self._states for array in states.values()]
        given = _state.read(caller, state_dict, [bound.counts, *own])
        for group in self._groups:  # a state's own; how it is stored is seen from its arrays
            for name in storage.FIXED:
                given.pop(f"param_groups.{group._index}.{name}", None)
        all_options = self._options_in(caller, given)
        for i, name in product(range(len(self._groups)), storage.FIXED):  # it keeps its own
            given.pop(f"param_groups.{i}.{name}", None)
        names, params = bound.names, bound.params
        all_names: dict[int, list[str]] = {}
        for group, options in zip(self._groups, all_options, strict=True):
            all_names |= self._names_in(group, options, given)
        wanted: dict[str, Entry] = dict.fromkeys(("steps", "skipped_steps"), ((), "count"))
        wanted |= {name: (shared.shape, shared.dtype) for name, shared in self._numbers.items()}
        for group, options in zip(self._groups, all_options, strict=True):
            for name, value in options.items():
                key = f"param_groups.{group._index}.{name}"
                needed = name != "lr" and value is not None and name not in storage.DEFAULTS
                if key in given or needed:
                    wanted[key] = (np.shape(_state.encoded(value)), None)
            for name, shared in group._numbers.items():
                wanted[f"param_groups.{group._index}.{name}"] = (shared.shape, shared.dtype)
            for i in group._arrays:
                prefix = f"state.{names[i]}."
                wanted |= self._entries_of(
                    i, params[i], prefix, all_names[i], options, given, caller, convert
                )
        _state.check_keys(caller, given, wanted)
        _state.check_entries(caller, given, wanted)
        with bound:
            self._set_options(
                bound, self._groups, self._states, dict(enumerate(all_options)), all_names
            )
            self._take(bound, given)

    def _names_in(
        self, group: ParamGroup, options: Mapping[str, Any], given: Container[str]
    ) -> dict[int, list[str]]:
        """The states of arrays in a state_dict: those of their rules, and optional ones beside."""
        assert self._bound is not None
        params, owners = self._bound.params, [f"state.{name}." for name in self._bound.names]
        optional = [
            state.name
            for state in self._special_states
            if state.optional and any(owners[i] + state.name in given for i in group._arrays)
        ]
        used = {i: self._state_names(self._rule_for(options, params[i])) for i in group._arrays}
        return {i: list(dict.fromkeys([*names, *optional])) for i, names in used.items()}

    def _entries_of(
        self,
        index: int,
        param: Array,
        prefix: str,
        names: Sequence[str],
        options: Mapping[str, Any],
        given: dict[str, Array],
        caller: str,
        convert: bool,
    ) -> dict[str, Entry]:
        """What a state_dict must have for an array; what is to be converted is so afterwards."""
        form = storage.Format(storage.of(options), param, self._sizes.get(index))
        codings = {name: _CODINGS[name] for name in names if name in _CODINGS}
        order = storage.order_of(storage.model_of(self._states[index], param))
        if convert:
            self._convert(index, param, prefix, names, options, given, caller, order)
        storage.check_same(caller, prefix, form, codings, given, order)
        wanted: dict[str, Entry] = {prefix + "step": ((), "count")}
        for name in names:
            declared = self._declared(name)
            needed = declared.initial is not None and not (
                declared.optional and name not in _RULES[self._rule_for(options, param)][0]
            )
            if needed or prefix + name in given:
                entries = form.entries(name, codings.get(name, "none"))
                if declared.number:
                    entries = {name: ((), np.dtype(np.float64))}
                elif declared.shape != "like":
                    entries = {name: (declared.like(param).shape, form.computed)}
                wanted |= {prefix + key: entry for key, entry in entries.items()}
        if form.has_master:
            wanted[prefix + storage.MASTER] = (param.shape, np.dtype(np.float32))
        if prefix + storage.ORDER in given:
            wanted[prefix + storage.ORDER] = ((param.ndim,), None)
        return wanted

    def _convert(
        self,
        index: int,
        param: Array,
        prefix: str,
        names: Sequence[str],
        options: Mapping[str, Any],
        given: dict[str, Array],
        caller: str,
        order: list[int],
    ) -> None:
        """Changes the states of an array in a state_dict to what they are stored as here."""
        _state.check_keys(caller, given.keys() & {f"{prefix}step"}, [f"{prefix}step"])
        _state.check_entries(caller, given, {f"{prefix}step": ((), "count")})
        stored = storage.of(options)
        form = storage.Format(stored, param, self._sizes.get(index))
        codings = {name: _CODINGS[name] for name in names if name in _CODINGS}
        storage.convert(prefix, form, codings, given, param, order, (stored["seed"], index))

    def _options_in(self, caller: str, given: Mapping[str, Array]) -> list[dict[str, Any]]:
        """The groups' hyper-parameters in a state; a schedule stays."""
        all_options = []
        for i, group in enumerate(self._groups):
            names = {*group._options, "seed"} - storage.FIXED
            keys = {name: f"param_groups.{i}.{name}" for name in names}
            left_out = {name for name in keys if isinstance(self.ranges.get(name), Maybe)}
            spared = {"lr", "seed", *left_out}
            needed = {key for name, key in keys.items() if name not in spared}
            _state.check_keys(caller, given.keys() & needed, needed)
            values = {
                name: _state.decoded(given[key], getattr(self.ranges.get(name), "text", False))
                for name, key in keys.items()
                if key in given
            }
            options = self._checked(
                {
                    **group._options,
                    **dict.fromkeys(left_out),
                    "seed": storage.DEFAULTS["seed"],
                    **values,
                }
            )
            if callable(group._options["lr"]):
                options["lr"] = group._options["lr"]
            all_options.append(options)
        return all_options

    def _take(self, bound: _core.BoundOptimizer, given: Mapping[str, Array]) -> None:
        """Copies the states and the counts, which were checked."""
        prefixes = [f"state.{name}." for name in bound.names]
        late = [state.name for state in self._special_states if state.initial is None]
        for name, shared in self._numbers.items():
            shared[...] = given[name]
        for group in self._groups:
            for name, shared in group._numbers.items():
                shared[...] = given[f"param_groups.{group._index}.{name}"]
            for i in group._arrays:
                prefix = prefixes[i]
                for name, array in self._states[i].items():
                    new = self._declared(name).fill(group._options)
                    array[...] = given.get(prefix + name, new)
                bound.counts[i] = count = int(given[prefix + "step"])
                bound.started[i] = count > 0 and all(prefix + name in given for name in late)
        bound.steps, bound.skipped_steps = int(given["steps"]), int(given["skipped_steps"])

    def __getstate__(self) -> dict[str, Any]:
        derived = {"_bound": None, "_state": None}
        options = [group._options for group in self._groups]
        return {**vars(self), **derived, "_groups": options, "_states": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._forget()
        if state["_groups"]:
            params = writable(state["_params"])
            self._bind_trees(params, state["_groups"], state["_grouped"])
            self.load_state_dict(state["_states"])

    def __repr__(self) -> str:
        name = type(self).__name__
        if self._bound is None:
            options = ", ".join(f"{key}={value!r}" for key, value in self.defaults.items())
            return f"{name}({options})"
        skipped = f", skipped_steps={self.skipped_steps}" if self.skipped_steps else ""
        lines = [f"{name}(steps={self.steps}{skipped}"]
        for i, group in enumerate(self._groups):
            arrays = [
                a for a, g in zip(self._bound.params, self._bound.groups, strict=True) if g == i
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
            known = {**self._defaults, **storage.DEFAULTS}
            if name not in known:
                meant = did_you_mean(name, known)
                raise ValueError(f"{caller}: unknown hyper-parameter {name!r}{meant}")
            declared = self.ranges.get(name) or storage.RANGES.get(name)
            where = f"{caller}: {name}"
            checked[name] = value if declared is None else declared.check(where, value)
        self._check_together(checked)
        usual = storage.DEFAULTS.items()
        return {name: value for name, value in checked.items() if (name, value) not in usual}

    @staticmethod
    def _is_grouped(params: object) -> TypeGuard[Groups]:
        return (
            isinstance(params, Sequence)
            and len(params) > 0
            and all(isinstance(group, Mapping) and "params" in group for group in params)
        )

    def _options_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in group.items() if name != "params"}
        return self._checked({**self._defaults, **own})

    def _bind(self, params: ArrayTree) -> None:
        if not self._is_grouped(params):
            self._bind_trees(params, [self._defaults], grouped=False)
            return
        all_options = [self._options_of(group) for group in params]
        self._bind_trees([group["params"] for group in params], all_options, grouped=True)

    def _bind_trees(
        self, params: Any, all_options: Sequence[Mapping[str, Any]], grouped: bool
    ) -> None:
        """Binds the trees, all or nothing; bound groups come first and keep their state."""
        bound = _core.BoundOptimizer(type(self).__name__, params, grouped)
        self._check_params(bound)
        owners, before = bound.groups, self._bound
        states = [*self._states, *({} for _ in owners[len(self._states) :])]
        if before is not None:
            names = before.names if self._grouped else [f"0.{name}" for name in before.names]
            if bound.names[: len(names)] != names:
                raise ValueError(f"{type(self).__name__}: params has other arrays than were bound")
            bound.counts[: len(names)] = before.counts
            bound.started[: len(names)] = before.started
            bound.steps, bound.skipped_steps = before.steps, before.skipped_steps
        else:
            self._numbers = self._new_numbers("optimizer", all_options[0])
        groups = self._groups.copy()
        for i in range(len(groups), len(all_options)):
            arrays = range(bisect_left(owners, i), bisect_right(owners, i))
            tree = params[i] if grouped else params
            numbers = self._new_numbers("group", all_options[i])
            groups.append(ParamGroup(self, i, arrays, tree, {}, numbers))
        self._set_options(bound, groups, states, dict(enumerate(map(dict, all_options))))
        self._params, self._grouped = params, grouped
        self._groups, self._states, self._bound = groups, states, bound
        self._state = States(bound, states)

    def _new_numbers(
        self, owner: str, options: Mapping[str, Any]
    ) -> dict[str, NDArray[np.float64]]:
        return {
            state.name: _core.new_numbers(1, state.fill(options))[0]
            for state in self._special_states
            if state.number == owner
        }

    def _forget(self) -> None:
        """Binds nothing."""
        self._numbers = {}
        self._bound, self._params, self._grouped = None, None, False
        self._groups, self._states, self._state = [], [], MappingProxyType({})

    def _change(self, changes: Mapping[int, Mapping[str, Any]]) -> None:
        """Sets hyper-parameters of the groups of these indices: all of them, or none."""
        bound = self._bound
        if bound is None:
            return
        with bound:
            all_options = {
                index: self._checked({**self._groups[index]._options, **new})
                for index, new in changes.items()
            }
            for index, options in all_options.items():
                before, after = storage.of(self._groups[index]._options), storage.of(options)
                for name in storage.FIXED:
                    if after[name] != before[name]:
                        raise ValueError(
                            f"{type(self).__name__}: {name} is {before[name]!r} from the group's "
                            f"begin on, and cannot become {after[name]!r}"
                        )
            self._set_options(bound, self._groups, self._states, all_options)

    def _set_options(
        self,
        bound: _core.BoundOptimizer,
        groups: Sequence[ParamGroup],
        states: list[dict[str, NDArray[Any]]],
        all_options: Mapping[int, dict[str, Any]],
        all_names: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """
        Gives groups these hyper-parameters and arrays the states of these names, all or nothing.

        Without names, they are those of the rule, and those that are there. States go by name;
        new ones are filled.
        """
        prepared = []
        params, paths = bound.params, bound.names
        for index, options in all_options.items():
            group, rule, stored = groups[index], self._rule(options), storage.of(options)
            own = {paths[i]: params[i] for i in group._arrays}
            rules = [self._rule_for(options, param) for param in own.values()]
            known = [storage.names_in(states[i]) if states[i] else [] for i in group._arrays]
            of_rules = {each: self._state_names(each) for each in set(rules)}
            names = [
                list(dict.fromkeys([*of_rules[each], *before])) if before else of_rules[each]
                for each, before in zip(rules, known, strict=True)
            ]
            if all_names is not None:
                names = [list(all_names[i]) for i in group._arrays]
            new: list[storage.State] = []
            if bound is not self._bound or rule != group._rule or names != known:
                codings = [coding for each in set(rules) for coding in _RULES[each][0].values()]
                storage.check(type(self).__name__, stored, codings, own)
                forms = [
                    storage.Format(stored, params[i], self._sizes.get(i)) for i in group._arrays
                ]
                before = [states[i] for i in group._arrays]
                new = self._new_states(names, options, forms, list(own.values()), before)
            constants = _constants(rule, options), self._between(options), stored["seed"]
            prepared.append((group, options, rule, constants, rules, new))
        numbers = [state.name for state in self._special_states if state.number == "array"]
        # Nothing is changed before this point: memory for the states may have run out.
        for group, options, rule, constants, rules, new in prepared:
            bound.set_constants(group._index, rule, *constants)
            shared = group._numbers | self._numbers
            at_random = storage.of(options)["rounding"] == "stochastic"
            for i, rule_of, state in zip(group._arrays, rules, new, strict=False):
                own = {name: state[name] for name in numbers}
                bound.bind(i, rule_of, state, own | shared if own else shared, at_random)
                states[i] = state
            group._options, group._rule = options, rule

    def _new_states(
        self,
        names: Sequence[Sequence[str]],
        options: Mapping[str, Any],
        forms: Sequence[storage.Format],
        params: Sequence[Array],
        before: Sequence[storage.State],
    ) -> list[storage.State]:
        """The states of these names, of every parameter; those of before stay."""
        states: list[storage.State] = [{} for _ in params]
        all_names = dict.fromkeys(name for own in names for name in own)
        for position, name in enumerate(all_names):
            declared = self._declared(name)
            without = []
            for k, old in enumerate(before):
                if name in old and name in names[k]:
                    states[k].update(storage.part_of(old, name))
                elif name in names[k]:
                    without.append(k)
            value = declared.fill(options)
            if declared.number:
                new = [{name: array} for array in _core.new_numbers(len(without), value)]
            else:
                models = [storage.model_of(before[k], params[k]) for k in without]
                if declared.shape != "like":
                    models = list(map(declared.like, models))
                own = [forms[k] for k in without]
                new = storage.new_states(name, _CODINGS[name], value, position, own, models)
            for k, part in zip(without, new, strict=True):
                states[k].update(part)
        for state, old, form, param in zip(states, before, forms, params, strict=True):
            if form.has_master:
                master = old.get(storage.MASTER)
                state[storage.MASTER] = (
                    storage.new_master(param, len(all_names)) if master is None else master
                )
        return states

    def _state_names(self, rule: str) -> list[str]:
        numbers = [state.name for state in self._special_states if state.number == "array"]
        return [*_RULES[rule][0], *numbers]

    def _declared(self, state: str) -> State:
        special = (s for s in self._special_states if s.name == state)
        return next(special, State(state))

    def _lr(self, options: Mapping[str, Any]) -> float:
        lr = options["lr"]
        if callable(lr):
            where = f"{type(self).__name__}: lr({self.steps}) of {shown(lr)}"
            return number(where, lr(self.steps), 0.0)
        return float(lr)

    def _fold(
        self, index: int, t: int, started: bool, numbers: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        options = self._groups[index]._options
        if numbers is not None:
            options = {**options, **numbers}
        if self._numbers and len(self._groups) > 1:
            all_options = ({**group._options, **self._numbers} for group in self._groups)
            self._check_group(options, all_options)
        lr = options["lr"]
        rate = self._lr(options) if callable(lr) else lr
        return self._coefficients(options, rate, t, started)

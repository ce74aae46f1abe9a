"""How a torch optimizer is made of one of this library: nothing here knows a rule."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch.optim import optimizer as _torch_optimizer

from fastopt import _checks, _config, _core
from fastopt.optimizers import storage
from fastopt.optimizers.base import _RULES, Optimizer, _constants
from fastopt.optimizers.schedule_free import Averaging
from fastopt.torch import stored

# Of a step, and so of all groups together.
_CALL: dict[str, Any] = {"max_norm": None, "skip_nonfinite": False, "zero_grads": False}

_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16

# They count no steps in torch.
_UNCOUNTED = {"SGD", "Muon"}


def _call_option(where: str, name: str, value: Any) -> Any:
    if name != "max_norm":
        return _checks.switch(f"{where}: {name}", value)
    if value is None:
        return None
    return _checks.number(f"{where}: {name}", value, 0.0, above=True, infinite=True)


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """As torch has it, but without its profiler's entry, five microseconds, where none runs."""
    with_hooks = torch.optim.Optimizer.profile_hook_step(step)
    before = _torch_optimizer._global_optimizer_pre_hooks
    after = _torch_optimizer._global_optimizer_post_hooks
    profiled = torch.autograd._profiler_enabled

    @functools.wraps(step)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        hooked = own or before or after or profiled()
        return (with_hooks if hooked else step)(self, *args, **options)

    call.hooked = True  # type: ignore[attr-defined]
    return call


class Door(torch.optim.Optimizer):  # type: ignore[misc]
    """
    What all of them share; a class that torch has comes before it, with its constructor.

    Attributes
    ----------
    grad_norm : float or None
        The global norm of the last step's gradients, before clipping, where ``max_norm`` or
        ``skip_nonfinite`` asked for it.
    skipped_steps : int
        The number of steps that ``skip_nonfinite`` or a GradScaler left out.
    """

    _ours: ClassVar[Any]  # the class of the library
    _signature: ClassVar[inspect.Signature]
    _own: ClassVar[frozenset[str]]  # hyper-parameters that torch has not

    # A GradScaler sets grad_scale and found_inf for a step.
    _step_supports_amp_scaling = True
    grad_norm: float | None = None
    skipped_steps = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        name = type(self).__name__
        try:
            values = self._signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        values.apply_defaults()
        given = values.arguments
        self._connect()
        self._added = {key: _call_option(name, key, given.pop(key)) for key in _CALL}
        params = given.pop("params")
        if self._in_torch():
            self._added.update((key, given.pop(key)) for key in self._own)
            super().__init__(params, **given)
            self._restart_states()
        else:
            super().__init__(params, given)

    def _restart_states(self) -> None:
        """Those that torch's constructor has made, where they are stored otherwise here."""
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param in self.state and (param.itemsize == 2 or group["state_dtype"]):
                    self._options[index] = self._checked_group(group)
                    self.state[param] = self._new_states(param, index, [*self.state[param]])

    @classmethod
    def _in_torch(cls) -> bool:
        return hasattr(torch.optim, cls._ours.__name__)

    def _names(self) -> list[str]:
        return [*self._like.defaults, *storage.DEFAULTS]

    def _connect(self) -> None:
        """Make what is derived from the groups and the state, and is not saved."""
        self._like: Any = self._ours()  # it has no parameters: its rule is asked
        classes = torch.Tensor, torch.nn.Parameter
        self._core = _core.TensorOptimizer(type(self).__name__, self._names(), classes)
        self._options: dict[int, dict[str, Any]] = {}  # of groups, as the rule takes them
        self._stepped: dict[int, Any] = {}  # the groups that these are of
        special = self._like._special_states
        self._shared = [s for s in special if s.number in ("group", "optimizer")]
        self._of_all = [s.name for s in special if s.number == "optimizer"]
        self._pending: dict[int, dict[str, float]] = {}
        self._begun: dict[tuple[int, str], torch.Tensor] = {}  # by the step under way

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_core" not in self.__dict__:
            self._connect()
        for group in self.param_groups:  # of torch's own, when a state is loaded
            for name in self._own:
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`."""
        where = type(self).__name__
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # it has the words
        for name in _CALL:
            if name in param_group:
                raise ValueError(f"{where}: {name} is of all groups: give it to the constructor")
        for name, value in self.__dict__.pop("_added", {}).items():
            self.defaults[name] = value
        options = self.defaults | param_group
        for name in ("capturable", "differentiable"):
            if options.get(name):
                raise ValueError(f"{where}: {name} is True, which fastopt has not")
        self._checked({name: options[name] for name in self._names() if name in options})
        for state in self._shared:
            known = self.param_groups[0] if self.param_groups and state.name in self._of_all else {}
            param_group.setdefault(state.name, known.get(state.name, state.fill(options)))
        super().add_param_group(param_group)
        for name in _CALL:
            self.param_groups[-1].pop(name, None)

    def _checked_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return self._checked({name: group[name] for name in self._names()})

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the rule takes them; torch has checked those of its own."""
        plain = {name: _plain(value) for name, value in options.items()}
        for name, value in plain.items():
            if callable(value):
                raise TypeError(
                    f"{type(self).__name__}: {name} is a function: use torch.optim.lr_scheduler"
                )
            if name in self._own or not self._in_torch():
                declared = self._like.ranges.get(name) or storage.RANGES[name]
                plain[name] = declared.check(f"{type(self).__name__}: {name}", value)
            elif type(value) is int and type(self._like.defaults[name]) is float:
                plain[name] = float(value)
        if not self._in_torch():
            self._like._check_together(plain)
        return plain

    # What _core asks for.

    def _regroup(self, index: int) -> None:
        """Say what a group's rule is."""
        group = self.param_groups[index]
        options, known = self._checked_group(group), self._options.get(index, {})
        for name in storage.FIXED if self._stepped.get(index) is group else ():
            if options[name] != known[name]:
                raise ValueError(
                    f"{type(self).__name__}: {name} is {known[name]!r} from the group's first step "
                    f"on, and cannot become {options[name]!r}"
                )
        self._options[index], self._stepped[index] = options, group
        rules = [self._rule_of(options, axes) for axes in range(3)]
        scalars = [s.name for s in self._like._special_states if s.number == "array"]
        if self._ours.__name__ not in _UNCOUNTED:
            scalars.insert(0, "step")
        at_random = options["rounding"] == "stochastic"
        if (at_random or options["state_dtype"] == "bfloat16") and "step" not in scalars:
            scalars.insert(0, "step")  # what is rounded at random depends on it
        if options["state_dtype"] is not None:
            used = {self._rule_of(options, param.ndim) for param in group["params"]}
            codings = [coding for rule in used for coding in _RULES[rule][0].values()]
            storage.check(type(self).__name__, options, codings, {})
        self._core.declare(
            index,
            rules,
            _constants(rules[0], options),
            self._like._between(options),
            scalars,
            (options["master_weights"], at_random, options["seed"]),
            all(_settled(group[name]) for name in self._names()),
        )

    def _rule_of(self, options: Mapping[str, Any], axes: int) -> str:
        """Of a parameter of so many axes: that is all that rules differ by."""
        rule: str = self._like._rule_for(options, SimpleNamespace(ndim=axes))
        return rule

    def _fold(
        self, index: int, t: int, started: bool, numbers: dict[str, float]
    ) -> dict[str, float]:
        options = self._options[index]
        if numbers or self._shared:
            options = {**self._with_shared(index), **numbers}
        if self._of_all and len(self.param_groups) > 1:
            self._like._check_group(options, map(self._with_shared, range(len(self.param_groups))))
        values: dict[str, float] = self._like._coefficients(options, options["lr"], t, started)
        if self._shared and not self._of_all:
            self._pending[index] = {state.name: values.pop(state.name) for state in self._shared}
        return values

    def _with_shared(self, index: int) -> dict[str, Any]:
        """A group's options, and the numbers of all its parameters."""
        group = self.param_groups[index]
        return self._options[index] | {state.name: group[state.name] for state in self._shared}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # in a compiled step, too
    def _new_states(self, param: torch.Tensor, index: int, names: list[str]) -> dict[str, Any]:
        options = self._options[index]
        form = stored.format_of(type(self).__name__, options, param)
        codings = _RULES[self._rule_of(options, param.ndim)][0]
        states = {}
        if options["state_dtype"] is None and stored.is_plain(param):
            self._begin_together(param, index, names)
        for name in names:
            declared = self._like._declared(name)
            value = declared.fill(options)
            if name == "step":
                states[name] = torch.zeros((), dtype=torch.float32, device="cpu")
            elif (id(param), name) in self._begun:
                states[name] = self._begun.pop((id(param), name))
            elif name == storage.MASTER:
                states[name] = param.detach().float()
            elif declared.number:
                states[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
            else:
                like = declared.like(param.detach())
                states |= stored.new(name, codings[name], value, form, like)
        return states

    def _begin_together(self, param: torch.Tensor, index: int, names: list[str]) -> None:
        """Make the states of a parameter, and of those that begin with it, in one block."""
        options = self._options[index]
        rule = self._rule_of(options, param.ndim)
        like = [
            declared
            for declared in map(self._like._declared, names)
            if declared.name != "step" and not declared.number and declared.shape == "like"
        ]
        if not like or (id(param), like[0].name) in self._begun:
            return
        params = [
            p
            for p in self.param_groups[index]["params"]
            if p is param
            or (
                self._rule_of(options, p.ndim) == rule
                and p.grad is not None
                and p not in self.state
                and stored.is_plain(p)
            )
        ]
        for number, declared in enumerate(like):
            new = stored.together(params, declared.fill(options), number)
            for p, tensor in zip(params, new, strict=True):
                self._begun[id(p), declared.name] = tensor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        As torch.optim's; states of another format become those of this optimizer.

        It keeps its own ``state_dtype``, ``master_weights`` and ``rounding``. Nothing is changed
        where groups or states cannot be taken.
        """
        before = self.__dict__.copy()  # torch's puts other groups and another state there
        try:
            self._load(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        own = [{name: group[name] for name in storage.FIXED} for group in self.param_groups]
        given: dict[str, Any] = {}
        with self.register_load_state_dict_pre_hook(lambda _, final: given.update(final)):
            super().load_state_dict(state_dict)
        place = 0
        for group, kept, saved in zip(self.param_groups, own, given["param_groups"], strict=True):
            group.update(kept)
            options = self._checked_group(group)
            for param, key in zip(group["params"], saved["params"], strict=True):
                state = given["state"].get(key, {})
                # As they were: torch has cast them to the dtype of the parameter.
                state = {name: value for name, value in state.items() if name != "step"}
                if state:
                    form = stored.format_of(type(self).__name__, options, param)
                    codings = _RULES[self._rule_of(options, param.ndim)][0]
                    state = stored.converted(state, codings, form, param, (options["seed"], place))
                    step = {k: v for k, v in self.state[param].items() if k == "step"}
                    self.state[param] = step | state
                place += 1

    def _plain(self, tensor: Any, where: str, index: int, measured: bool) -> torch.Tensor:
        """The tensor itself, as one of torch's own class, or what a DTensor has here."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{where} is of type {type(tensor).__name__}, expected torch.Tensor")
        if hasattr(tensor, "to_local"):
            return self._plain(self._local(tensor, where, index, measured), where, index, measured)
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(f"{where} is of type {type(tensor).__name__}, expected torch.Tensor")
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"{where} is sparse ({tensor.layout}), expected a dense tensor")
        if tensor.device.type != "cpu":
            raise RuntimeError(f"{where} is on {tensor.device}, expected the cpu")
        if tensor.is_complex():
            raise RuntimeError(f"{where} is complex, expected real numbers")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{where} has dtype {tensor.dtype}, expected float32, float64, bfloat16 or float16"
            )
        return tensor.detach().as_subclass(torch.Tensor)

    def _local(self, tensor: Any, where: str, index: int, measured: bool) -> Any:
        if any(placement.is_partial() for placement in tensor.placements):
            raise RuntimeError(f"{where} is a partial sum: {tensor.placements}")
        if any(placement.is_shard() for placement in tensor.placements):
            if measured:
                raise RuntimeError(
                    f"{where} is one shard of several, and max_norm and skip_nonfinite would see "
                    "no other: use torch.nn.utils.clip_grad_norm_"
                )
            rule = self._like._rule(self._options[index])
            if _RULES[rule][2] or self._like._between(self._options[index]) is not None:
                raise RuntimeError(f"{where} is one shard of several: the rule needs the whole")
        with torch.no_grad():
            return tensor.to_local()

    @_hooked
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool | None = None,
        zero_grads: bool | None = None,
    ) -> Any:
        """
        Make one step: all parameters that have a gradient, or none at all.

        Parameters
        ----------
        closure : function, optional
            Computes the loss and the gradients first.
        max_norm : float, optional
            Gradients are scaled down so that their global norm is at most this.
        skip_nonfinite : bool, optional
            Do nothing, and count it in ``skipped_steps``, if any element of a gradient is
            infinite or NaN.
        zero_grads : bool, optional
            Set the gradients to zero once they have been used.

        Returns
        -------
        The loss, if there is a closure. What is left out is as the constructor was told.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = self.defaults
        if max_norm is not None or skip_nonfinite is not None or zero_grads is not None:
            given = dict(zip(_CALL, (max_norm, skip_nonfinite, zero_grads), strict=True))
            where = f"{type(self).__name__}.step"
            options = options | {
                name: _call_option(where, name, value)
                for name, value in given.items()
                if value is not None
            }
        if getattr(self, "found_inf", None):
            self.skipped_steps += 1
            if options["zero_grads"]:
                self.zero_grad(set_to_none=False)
            return loss
        scale = getattr(self, "grad_scale", None)
        threads = 0 if _config.threads_are_chosen() else torch.get_num_threads()
        self._begun.clear()
        self.grad_norm, skipped, changed, combined = self._core.step(
            self,
            threads,
            1.0 if scale is None else scale.item(),
            options["max_norm"],
            options["skip_nonfinite"],
            options["zero_grads"],
        )
        # Written behind its back, they would not count as changed: a graph that has saved them
        # would give wrong gradients.
        torch.autograd.graph.increment_version(changed)
        if skipped:
            self.skipped_steps += 1
        elif self._pending:
            for index, numbers in self._pending.items():
                self.param_groups[index].update(numbers)
        if combined:
            for group in self.param_groups:
                group.update({name: combined[name] for name in self._of_all})
        self._pending.clear()
        return loss


class _Averaged(Averaging, Door):
    """The modes of the schedule-free rules: in evaluation a group has the momentum of its begin."""

    @property
    def training(self) -> bool:
        """Whether the parameters are what gradients are taken at."""
        return self.param_groups[0].get("evaluated_with") is None

    def eval(self) -> None:
        """Put the average into the parameters; a second call does nothing."""
        if self.training:
            for group in self.param_groups:
                momentum = self._like._momentum_of(group)
                self._move(group, 1 - 1 / momentum)
                group["evaluated_with"] = momentum

    def train(self) -> None:
        """Put back what gradients are taken at; a second call does nothing."""
        if not self.training:
            for group in self.param_groups:
                momentum = group.pop("evaluated_with", None)
                if momentum is not None:
                    self._move(group, 1 - momentum)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _move(self, group: dict[str, Any], share: float) -> None:
        for param in group["params"]:
            if "z" in self.state.get(param, ()):
                param += share * (self.state[param]["z"] - param)

    def _fold(self, *args: Any) -> dict[str, float]:
        self._like._training = self.training
        return super()._fold(*args)


def _plain(value: Any) -> Any:
    """Without tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, torch.Tensor) else value


def _settled(value: Any) -> bool:
    """Whether a value cannot change and stay the same object."""
    if type(value) is tuple:
        return all(map(_settled, value))
    return type(value) in (float, int, bool, str, type(None))


def _signature_of(ours: Any, theirs: Any) -> inspect.Signature:
    """Torch's, where it has the optimizer, with what it has not."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = dict(inspect.signature(ours).parameters)
    del own["storage"]
    if theirs is None:
        first = own["params"].replace(default=inspect.Parameter.empty)
        parameters = {**own, "params": first}
    else:
        parameters = dict(inspect.signature(theirs).parameters)
        parameters |= {n: p.replace(kind=kind) for n, p in own.items() if n not in parameters}
    for name, default in {**storage.DEFAULTS, **_CALL}.items():
        parameters[name] = inspect.Parameter(name, kind, default=default)
    return inspect.Signature(
        [p.replace(annotation=inspect.Parameter.empty) for p in parameters.values()]
    )


@functools.cache
def door(name: str) -> Any:
    """Return the torch optimizer with the rule of that of this name."""
    ours: Any = Optimizer.registry[name]
    theirs = getattr(torch.optim, name, None)
    signature = _signature_of(ours, theirs)
    adapter = _Averaged if issubclass(ours, Averaging) else Door

    def init(self: Any, *args: Any, **options: Any) -> None:
        adapter.__init__(self, *args, **options)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [me, *signature.parameters.values()]
    init.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    summary = (inspect.getdoc(ours) or "").partition("\n\n")[0]
    role = "a drop-in for" if theirs is not None else "in the manner of"
    like = f"`torch.optim.{name}`" if theirs is not None else "torch.optim"
    known = inspect.signature(theirs).parameters if theirs is not None else ()
    return type(
        name,
        (adapter,) if theirs is None else (adapter, theirs),
        {
            "__init__": init,
            "__module__": "fastopt.torch",
            "__doc__": f"{summary}\n\n`fastopt.{name}` over tensors on the CPU, {role} {like}.",
            "_ours": ours,
            "_signature": signature,
            "_own": frozenset({*ours().defaults, *storage.DEFAULTS} - {*known}),
        },
    )

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

compiler: str
openmp: bool
context_settings: ContextVar[Settings]

def built_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def rules() -> dict[str, tuple[dict[str, str], list[str], bool]]: ...
def new_states(
    models: Sequence[NDArray[Any]], dtype: str, value: float, number: int
) -> list[NDArray[Any]]: ...
def new_numbers(count: int, value: float) -> list[NDArray[np.float64]]: ...
def set_parallel_from_bytes(bytes: int, /) -> None: ...
def set_global_settings(settings: Settings, /) -> None: ...
def current_settings() -> Settings: ...
def exp(x: NDArray[Any]) -> NDArray[Any]: ...
def log(x: NDArray[Any]) -> NDArray[Any]: ...
def softmax(
    caller: str, x: NDArray[Any], axis: int, logarithm: bool, out: NDArray[Any] | None
) -> NDArray[Any]: ...
def softmax_cross_entropy(
    logits: NDArray[Any],
    labels: NDArray[Any],
    axis: int,
    label_smoothing: float,
    weight: NDArray[Any] | None,
    ignore_index: int | None,
    reduction: str,
    out: NDArray[Any] | None,
) -> tuple[Any, NDArray[Any]]: ...
def squared_error(
    caller: str,
    prediction: NDArray[Any],
    target: NDArray[Any],
    reduction: str,
    out: NDArray[Any] | None,
) -> tuple[Any, NDArray[Any]]: ...
def l2_penalty(
    places: list[str], arrays: list[NDArray[Any]], weight_decay: float
) -> tuple[float, list[NDArray[Any]]]: ...

class Settings:
    def __init__(self, isa: str, num_threads: int, flush_denormals: bool) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def vector_bytes(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def flush_denormals(self) -> bool: ...

class BoundOptimizer:
    steps: int
    skipped_steps: int
    def __init__(self, caller: str, params: Any, grouped: bool) -> None: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def groups(self) -> list[int]: ...
    @property
    def params(self) -> list[NDArray[Any]]: ...
    @property
    def counts(self) -> NDArray[np.int64]: ...
    @property
    def started(self) -> NDArray[np.bool_]: ...
    @property
    def isa(self) -> str: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...
    def bind(
        self,
        index: int,
        rule: str,
        state: dict[str, NDArray[Any]],
        numbers: dict[str, NDArray[np.float64]] = ...,
        at_random: bool = ...,
    ) -> None: ...
    def set_constants(
        self,
        group: int,
        rule: str,
        values: dict[str, float],
        between: Callable[[NDArray[Any]], None] | None = ...,
        seed: int = ...,
    ) -> None: ...
    def step(
        self,
        params: Any,
        grads: Any,
        fold: Callable[..., dict[str, float]],
        loss_scale: float = 1.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> float | None: ...
    def step_among(
        self,
        peers: Any,
        params: Any,
        grads: Any,
        fold: Callable[..., dict[str, float]],
        loss_scale: float,
        max_norm: float | None,
        skip_nonfinite: bool,
        /,
    ) -> float | None: ...
    def look(
        self, params: Any, grads: Any, zero_grads: bool
    ) -> list[tuple[NDArray[Any], NDArray[Any] | None]]: ...
    def set_first(self, index: int, element: int) -> None: ...

Float = NDArray[Any]
MaybeFloat = NDArray[Any] | None

class Saved:
    @property
    def function(self) -> str: ...
    @property
    def x(self) -> Float: ...
    @property
    def statistics(self) -> NDArray[np.float64]: ...

GammaBeta = tuple[MaybeFloat, MaybeFloat]
Running = tuple[MaybeFloat, MaybeFloat, float, bool]  # mean, var, momentum, unbiased

def batch_norm(
    x: Float,
    axis: int,
    affine: GammaBeta,
    running: Running,
    training: bool,
    eps: float,
    residual_relu: tuple[MaybeFloat, bool],
    out: MaybeFloat,
    /,
) -> tuple[Float, Saved]: ...
def batch_statistics(x: Float, axis: int, eps: float, /) -> NDArray[np.float64]: ...
def batch_norm_backward(
    dy: Float, saved: Saved, out: MaybeFloat, /
) -> tuple[Float, MaybeFloat, MaybeFloat, MaybeFloat]: ...
def batch_renorm(
    x: Float,
    axis: int,
    affine: GammaBeta,
    running: Running,
    training: bool,
    eps: float,
    limits: tuple[float, float],  # r_max, d_max
    out: MaybeFloat,
    /,
) -> tuple[Float, Saved]: ...
def batch_renorm_backward(
    dy: Float, saved: Saved, out: MaybeFloat, /
) -> tuple[Float, MaybeFloat, MaybeFloat, MaybeFloat]: ...
def group_norm(
    x: Float, num_groups: int, gamma: MaybeFloat, beta: MaybeFloat, eps: float, out: MaybeFloat, /
) -> tuple[Float, Saved]: ...
def group_norm_backward(
    dy: Float, saved: Saved, out: MaybeFloat, /
) -> tuple[Float, MaybeFloat, MaybeFloat]: ...
def instance_norm(
    x: Float, gamma: MaybeFloat, beta: MaybeFloat, eps: float, out: MaybeFloat, /
) -> tuple[Float, Saved]: ...
def instance_norm_backward(
    dy: Float, saved: Saved, out: MaybeFloat, /
) -> tuple[Float, MaybeFloat, MaybeFloat]: ...
def layer_norm(
    x: Float,
    shape: tuple[int, ...],
    gamma: MaybeFloat,
    beta: MaybeFloat,
    eps: float,
    out: MaybeFloat,
    /,
) -> tuple[Float, Saved]: ...
def layer_norm_backward(
    dy: Float, saved: Saved, out: MaybeFloat, /
) -> tuple[Float, MaybeFloat, MaybeFloat]: ...
def rms_norm(
    x: Float, shape: tuple[int, ...], gamma: MaybeFloat, eps: float, out: MaybeFloat, /
) -> tuple[Float, Saved]: ...
def rms_norm_backward(
    dy: Float, saved: Saved, out: MaybeFloat, /
) -> tuple[Float, MaybeFloat, MaybeFloat]: ...
def check_array(object: Any, where: str, /) -> None: ...
def check_apart(
    caller: str, written: str, output: NDArray[Any], read: str, input: NDArray[Any], /
) -> None: ...
def empty_cache() -> None: ...

class TensorOptimizer:
    def __init__(self, caller: str, options: Sequence[str], classes: tuple[type, ...]) -> None: ...
    def declare(
        self,
        group: int,
        rules: list[str],
        constants: dict[str, float],
        between: Callable[[Any], None] | None,
        scalars: Sequence[str],
        rounding: tuple[bool, bool, int],
        settled: bool,
        /,
    ) -> None: ...
    def step(
        self,
        owner: Any,
        threads: int,
        loss_scale: float,
        max_norm: float | None,
        skip_nonfinite: bool,
        zero_grads: bool,
    ) -> tuple[float | None, bool, list[Any], dict[str, float]]: ...

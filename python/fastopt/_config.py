"""How the kernels run: threads, instruction set, subnormal numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, cast

from fastopt import _checks, _core


class Config(TypedDict):
    """The values of `get_config`."""

    num_threads: int
    isa: str
    denormals: str


_MAX_THREADS = 1024  # far more, and OpenMP ends the process


def _thread_count(value: Any, source: str) -> int:
    return _checks.integer(source, value, 1, _MAX_THREADS)


def _isa(value: Any, source: str) -> str:
    built, supported = _core.built_isas(), _core.supported_isas()
    if isinstance(value, str) and value in built and value not in supported:
        raise ValueError(
            f"{source} is {value!r}, not supported by this processor; expected one of {supported}"
        )
    return _checks.choice(source, value, supported)


def _denormals(value: Any, source: str) -> str:
    return _checks.choice(source, value, ("flush", "preserve"))


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "num_threads": _thread_count,
    "isa": _isa,
    "denormals": _denormals,
}


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float:
    """The processors that the container may use at once: its cgroup's quota over its period."""
    limits = [float("inf")]
    try:
        membership = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits[0]
    for line in membership:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = (root if not controllers else root / "cpu") / path.lstrip("/")
        for place in (folder, *folder.parents):  # a parent's quota binds as well
            if not place.is_relative_to(root):
                break
            try:
                if controllers:
                    quota = (place / "cpu.cfs_quota_us").read_text()
                    period = (place / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (place / "cpu.max").read_text().split()
                if int(quota) > 0:  # -1 in version 1 is none
                    limits.append(int(quota) / int(period))
            except (OSError, ValueError):  # "max" in version 2
                continue
    return min(limits)


def _available_cpus() -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(affinity or 1, _cgroup_cpus())))


def _initial(environ: Mapping[str, str]) -> tuple[Config, str]:
    """The configuration of a new process, and where the number of threads came from."""

    def threads(variable: str, text: str) -> int:
        try:
            return _thread_count(int(text), variable)
        except ValueError:
            expected = f"expected an integer from 1 to {_MAX_THREADS}"
            raise ValueError(f"{variable} is {_checks.shown(text)}, {expected}") from None

    num_threads, source = _available_cpus(), "available processors"
    if own := environ.get("FASTOPT_NUM_THREADS"):
        num_threads, source = threads("FASTOPT_NUM_THREADS", own), "FASTOPT_NUM_THREADS"
    elif openmp := environ.get("OMP_NUM_THREADS"):
        try:
            # OpenMP's form has one number per nesting level; ours is the outermost.
            num_threads = threads("OMP_NUM_THREADS", openmp.split(",")[0])
            source = "OMP_NUM_THREADS"
        except ValueError:  # the variable is everybody's, and everybody else goes on
            source += f"; OMP_NUM_THREADS={_checks.shown(openmp)} ignored"
    config = Config(
        num_threads=num_threads,
        isa=_isa(environ.get("FASTOPT_ISA") or _core.supported_isas()[0], "FASTOPT_ISA"),
        denormals=_denormals(environ.get("FASTOPT_DENORMALS") or "flush", "FASTOPT_DENORMALS"),
    )
    return config, source


_kept_settings = cache(_core.Settings)  # those that were global are never freed


def _settings(config: Config) -> _core.Settings:
    return _kept_settings(config["isa"], config["num_threads"], config["denormals"] == "flush")


def _changed(where: str, config: Config, options: Mapping[str, Any]) -> Config:
    values: dict[str, Any] = dict(config)
    for name, value in options.items():
        if value is not None:
            values[name] = _CHECKS[name](value, f"{where}: {name}")
    return cast(Config, values)


def get_config() -> Config:
    """
    Return how the kernels run here and now.

    Returns
    -------
    dict
        ``num_threads``, ``isa`` and ``denormals`` as `set_config` takes them.

    Examples
    --------
    >>> import fastopt
    >>> sorted(fastopt.get_config())
    ['denormals', 'isa', 'num_threads']
    """
    settings = _core.current_settings()
    return Config(
        num_threads=settings.num_threads,
        isa=settings.isa,
        denormals="flush" if settings.flush_denormals else "preserve",
    )


def threads_are_chosen() -> bool:
    """Return whether the user has said how many threads fastopt, and it alone, takes."""
    return _thread_source in ("set_config", "FASTOPT_NUM_THREADS")


def global_threads() -> int:
    """Return the number of threads outside of every `config_context`."""
    return _global["num_threads"]


def set_config(
    *, num_threads: int | None = None, isa: str | None = None, denormals: str | None = None
) -> None:
    """
    Set how the kernels run, for the whole process.

    Parameters
    ----------
    num_threads : int, optional
        Threads of one call, from 1 to 1024. At the start it is ``FASTOPT_NUM_THREADS``, else
        ``OMP_NUM_THREADS`` (ignored where it is no such number), else the number of processors
        that the process may use (its affinity and its container's quota). Small arrays take one
        thread whatever it is.
    isa : str, optional
        Instruction set, one of those that `show_config` lists. At the start it is
        ``FASTOPT_ISA``, else the best that the processor has. Results do not depend on it.
    denormals : {"flush", "preserve"}, optional
        What happens to subnormal numbers (below 1.2e-38 in float32). "flush" takes them for
        zero, which keeps decayed optimizer states from slowing a step down 10 to 60 times;
        "preserve" is IEEE 754. At the start it is ``FASTOPT_DENORMALS``, else "flush".

    Raises
    ------
    TypeError, ValueError
        If a value is of the wrong type, or unknown or not supported; nothing is changed then.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.set_config(denormals="flush")
    >>> fastopt.get_config()["denormals"]
    'flush'
    """
    global _global, _thread_source
    options = {"num_threads": num_threads, "isa": isa, "denormals": denormals}
    _global = _changed("set_config", _global, options)
    _core.set_global_settings(_settings(_global))
    if num_threads is not None:
        _thread_source = "set_config"


@contextmanager
def config_context(
    *, num_threads: int | None = None, isa: str | None = None, denormals: str | None = None
) -> Iterator[None]:
    """
    Set how the kernels run inside a ``with`` block, for this thread or task alone.

    Parameters
    ----------
    num_threads, isa, denormals
        As for `set_config`. What is left out stays as it is.

    Raises
    ------
    TypeError, ValueError
        If a value is of the wrong type, or unknown or not supported.

    Examples
    --------
    >>> import fastopt
    >>> with fastopt.config_context(num_threads=1):
    ...     fastopt.get_config()["num_threads"]
    1
    """
    options = {"num_threads": num_threads, "isa": isa, "denormals": denormals}
    config = _changed("config_context", get_config(), options)
    token = _core.context_settings.set(_settings(config))
    try:
        yield
    finally:
        _core.context_settings.reset(token)


def show_config() -> None:
    """
    Print the version, the build, and how the kernels run here.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.show_config()  # doctest: +ELLIPSIS
    fastopt ...
    """
    from fastopt import __version__

    config = get_config()
    in_context = config["num_threads"] != _global["num_threads"]
    lines = {
        "compiler": _core.compiler,
        "OpenMP": "yes" if _core.openmp else "no: every call runs on one thread",
        "ISAs built": ", ".join(_core.built_isas()),
        "ISAs supported": ", ".join(_core.supported_isas()),
        "ISA used": config["isa"],
        "threads": f"{config['num_threads']} "
        f"({'config_context' if in_context else _thread_source})",
        "denormals": config["denormals"],
    }
    print(f"fastopt {__version__}")
    for name, value in lines.items():
        print(f"  {name + ':':16}{value}")


_global, _thread_source = _initial(os.environ)
_core.set_global_settings(_settings(_global))

"""What `fastopt.distributed` stands on: others step the other parts of an optimizer's arrays."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastopt import AdamW, Optimizer


class Peers:
    def __init__(self, error: Exception | None = None, sums: Any = None) -> None:
        self.error, self.sums = error, sums

    def agree(self) -> None:
        if self.error is not None:
            raise self.error

    def add(self, sums: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        return sums if self.sums is None else np.asarray(self.sums)


def step(opt: Optimizer, params: Any, grads: Any, peers: Peers, max_norm: float | None) -> Any:
    assert opt._bound is not None
    return opt._bound.step_among(peers, params, grads, opt._fold, 1.0, max_norm, False)


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_a_part_has_the_bits_of_the_whole(state_dtype: Any) -> None:
    rng = np.random.default_rng(0)
    whole, grads = rng.standard_normal((2, 6000)).astype(np.float32)
    parts = whole.copy()
    plain = AdamW(whole, state_dtype=state_dtype)
    options = []
    for begin, end in ((0, 2048), (2048, 6000)):
        opt = AdamW(state_dtype=state_dtype)
        opt._sizes = {0: 6000}
        opt._bind(parts[begin:end])
        assert opt._bound is not None
        opt._bound.set_first(0, begin)
        options.append((opt, begin, end))
    for _ in range(3):
        plain.step(grads)
        for opt, begin, end in options:
            step(opt, parts[begin:end], grads[begin:end], Peers(), None)
    assert parts.tobytes() == whole.tobytes()
    for opt, begin, end in options:
        state = opt.state["param"]["exp_avg"]
        np.testing.assert_array_equal(state, plain.state["param"]["exp_avg"][begin:end])


def test_the_norm_is_of_the_sums_of_all() -> None:
    w = np.zeros(2)
    opt = AdamW(w)
    assert step(opt, w, np.ones(2), Peers(sums=[2.0, 0.0, 7.0, 0.0]), 1.0) == 3.0


def test_a_step_that_others_cannot_make_is_none() -> None:
    w = np.ones(2)
    opt = AdamW(w)
    with pytest.raises(KeyError):
        step(opt, w, np.ones(2), Peers(KeyError()), None)
    assert (opt.steps, w.tolist()) == (0, [1.0, 1.0])


def test_a_look_checks_arrays_as_a_step_does() -> None:
    params = {"W": np.ones(2), "b": np.ones(3)}
    opt = AdamW(params)
    assert opt._bound is not None
    (w, grad), (b, none) = opt._bound.look(params, {"W": np.zeros(2), "b": None}, False)
    assert w is params["W"] and b is params["b"] and none is None
    np.testing.assert_array_equal(grad, np.zeros(2))
    with pytest.raises(ValueError, match=r"AdamW\.step: grads\['b'\] has shape \(2,\)"):
        opt._bound.look(params, {"W": None, "b": np.zeros(2)}, False)
    with pytest.raises(ValueError, match=r"grads\['W'\] shares memory with .*params\['W'\]"):
        opt._bound.look(params, {"W": params["W"], "b": None}, False)


def test_import_fastopt_imports_no_mpi() -> None:
    code = "import sys, fastopt; dir(fastopt); assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_mpi4py_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "try: import fastopt.distributed\n"
        "except ImportError as error: assert 'fastopt[mpi]' in str(error), error\n"
        "else: assert False"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

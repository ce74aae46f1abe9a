"""
The quick part of the tests. It needs nothing but NumPy, so it also runs on its own, on an
emulated processor or with a wheel in an empty environment: ``python tests/test_smoke.py avx2``
says which instruction set must be the best one there.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np

import fastopt
from fastopt import Optimizer, _core, reference

SIZES = (0, 1, 7, 33, 1025, 20_000)


def normal(n: int, dtype: Any, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(n).astype(dtype)


def test_every_optimizer_has_the_bits_of_its_reference() -> None:
    registry: dict[str, Any] = {**Optimizer.registry}
    del registry["Muon"], registry["Prodigy"]  # of matrices; of all arrays together
    for name, cls in registry.items():
        formula = reference.OPTIMIZERS[name]
        parameters = inspect.signature(cls).parameters
        options = {
            key: p.default for key, p in parameters.items() if key not in ("params", "storage")
        }
        for dtype in (np.float32, np.float64):
            expected = [normal(n, dtype, 0) for n in SIZES]
            start = cls([p.copy() for p in expected])
            numbers = {k: v.copy() for k, v in start.param_groups[0]._numbers.items()}
            states = [
                {k: v for k, v in s.items() if k != "step"} | numbers for s in start.state.values()
            ]
            for t in range(1, 4):
                for i, n in enumerate(SIZES):
                    expected[i], *new = formula(
                        expected[i], normal(n, dtype, t), **states[i], t=t, **options
                    )
                    states[i] = dict(zip(states[i], new, strict=True))
            for isa in _core.supported_isas():
                params = [normal(n, dtype, 0) for n in SIZES]
                opt = cls(params)
                with fastopt.config_context(isa=isa, num_threads=2, denormals="preserve"):
                    for t in range(1, 4):
                        opt.step([normal(n, dtype, t) for n in SIZES])
                assert opt._bound is not None
                assert opt._bound.isa == isa
                adds_up = _core.rules()[opt.param_groups[0]._rule][2]
                for p, q in zip(params, expected, strict=True):
                    np.testing.assert_allclose(p, q, rtol=1e-4)
                    assert adds_up or p.tobytes() == q.tobytes(), (name, dtype, isa, p.size)


def test_every_public_name_is_exported() -> None:
    assert sorted(fastopt.__all__) == [name for name in dir(fastopt) if not name.startswith("_")]
    assert {"Optimizer", *Optimizer.registry} <= set(fastopt.__all__)


def test_norms_are_equal_on_every_isa() -> None:
    g = normal(20_000, np.float32, 0)
    norms = set()
    for isa in _core.supported_isas():
        with fastopt.config_context(isa=isa):
            norms.add(fastopt.SGD(np.ones_like(g)).step(g, max_norm=1.0, skip_nonfinite=True))
    assert len(norms) == 1


def test_bad_input_is_an_error() -> None:
    w = np.ones((3, 4))
    try:
        fastopt.SGD({"W": w}).step({"W": w.T.copy()})
    except ValueError as error:
        assert "grads['W'] has shape (4, 3), its parameter has (3, 4)" in str(error)
    else:
        raise AssertionError("a gradient of another shape was taken")
    assert (w == 1).all()


def test_a_saved_state_resumes() -> None:
    params, g = {"W": np.ones(10)}, {"W": np.ones(10)}
    opt = fastopt.Adam(params)
    opt.step(g)
    resumed_params = {"W": params["W"].copy()}
    resumed = fastopt.Adam(resumed_params, lr=0.5)
    resumed.load_state_dict(opt.state_dict())
    opt.step(g)
    resumed.step(g)
    assert params["W"].tobytes() == resumed_params["W"].tobytes()


if __name__ == "__main__":
    fastopt.show_config()
    if sys.argv[1:]:
        assert _core.supported_isas()[0] == sys.argv[1]
    for test_name, test in list(globals().items()):
        if test_name.startswith("test_"):
            test()
            print("passed", test_name)

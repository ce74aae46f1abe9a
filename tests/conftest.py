from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

import fastopt
from fastopt import _config, _core

hypothesis.settings.register_profile("fastopt", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("fastopt")


# Without torch nothing of it can be imported, and with it all of it is run by a marker.
collect_ignore_glob = [] if find_spec("expecttest") else ["test_torch_*.py"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What runs on several ranks needs the plugin that `make test-mpi` names."""
    if not collection_path.name.startswith("test_distributed"):
        return None
    return not config.pluginmanager.has_plugin("mpi-pytest")


_core.set_parallel_from_bytes(1 << 17)  # threads share work that is cheap to compare


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor in turn, in use inside the test."""
    with fastopt.config_context(isa=request.param):
        yield request.param


@pytest.fixture
def preserve() -> Iterator[None]:
    """Subnormals as IEEE 754 has them, which NumPy does, too."""
    with fastopt.config_context(denormals="preserve"):
        yield


@pytest.fixture
def restored_config() -> Iterator[None]:
    """For a test that changes the configuration of the process."""
    before, source = fastopt.get_config(), _config._thread_source
    yield
    fastopt.set_config(**before)
    _config._thread_source = source


@pytest.fixture
def scalars_are_float64() -> Iterator[None]:
    """Those of torch's optimizers, which else keep numbers of an array in float32."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

"""A fixture with the emulated module, which is built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_host.host_build import Build, unavailable


@pytest.fixture(scope="session")
def emulated_module() -> Path:
    if reason := unavailable():
        pytest.skip(reason)
    return Build().module()

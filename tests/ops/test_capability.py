"""Whether a build's CUDA code runs on a device, and what a device that it was not compiled for gets."""

import pytest
import torch

from adaptcomp_ext import _C
from adaptcomp_ext.ops import _capability

DEFAULT = "75-real,80-real,90"


@pytest.mark.promise("capability")
@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (DEFAULT, (7, 0), False),
        (DEFAULT, (7, 5), True),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 0), True),  # by PTX
        (DEFAULT, (12, 1), True),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("86", (8, 0), False),
        ("90-virtual", (8, 9), False),
        ("90-virtual", (12, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100-real", (10, 3), True),
        ("all-major", (5, 0), True),
        ("native", (9, 0), True),
    ],
)
def test_the_rules_of_binary_compatibility(architectures, capability, expected):
    assert _capability.runs_on(architectures, capability) is expected


@pytest.mark.promise("capability")
def test_a_device_that_the_build_does_not_fit_is_refused_at_every_use(monkeypatch):
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_architectures": "90-real"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "RTX")
    _capability.check_capability.cache_clear()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"cuda:0: .*90-real.*RTX with compute capability 8\.6.*ARCHITECTURES=86"
        ):
            _capability.check_capability(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    _capability.check_capability(0)
    _capability.check_capability.cache_clear()

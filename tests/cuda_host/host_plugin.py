"""A plugin for pytest: the package is imported with the emulated module (see `run`).

``$ADAPTCOMP_EMULATED`` is the module's path, ``$ADAPTCOMP_EMULATION`` settings such as ``order=random
seed=3``. All but `late` are those of ``_C.emulation``. With ``late=k`` a count of active rows arrives at the
host when k later ones have been sent, with ``late=-1`` when it is waited for."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import deque

from tests.cuda_host.host_only import HOST_ONLY


def load() -> None:
    """Put the emulated module where the package looks for its own."""
    name = "adaptcomp_ext._C"
    spec = importlib.util.spec_from_file_location(name, os.environ["ADAPTCOMP_EMULATED"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    settings = dict(setting.split("=") for setting in os.environ.get("ADAPTCOMP_EMULATION", "").split())
    late = int(settings.pop("late", 0))
    for key, value in settings.items():
        setattr(module.emulation, key, value if key == "order" else int(value))
    import adaptcomp_ext

    adaptcomp_ext._C = module
    if late:
        deliver_late(late)


def deliver_late(late: int) -> None:
    """From here on kernels run at once, but their results reach the host late, as on a device."""
    from adaptcomp_ext.nn import _active

    class Late(_active._Copy):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._on_its_way = deque()

        def send(self, count):
            self._on_its_way.append(count.clone())
            if 0 <= late < len(self._on_its_way):
                self._word.copy_(self._on_its_way.popleft())

        def read(self):
            self._word.copy_(self._on_its_way.pop())
            self._on_its_way.clear()
            return self.peek()

    _active._Copy = Late


load()


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        chosen = any(name == entry or name.startswith(f"{entry}[") for entry in HOST_ONLY)
        (left_out if chosen else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept

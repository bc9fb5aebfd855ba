"""Builds the compiled module a second time, with its CUDA files compiled for the host and this emulator.

The module is for tests and is never installed: it goes to ``build/cuda_host`` of the checkout. Each object is
named by a hash of all that it is made from, so a second build compiles only what has changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
AVX2 = ["-mavx2", "-mfma"]
ISAS = {"base": [], "avx2": AVX2, "avx512": [*["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"], *AVX2]}
# No contraction, as in CMakeLists.txt: a row has the same bits in every build. Warnings are that build's
# business.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w"]
# Dynamic shared memory is an extern thread_local array (cuda_runtime.h), which nobody has to initialise
# before its first use.
CUDA = [
    "-fno-extern-tls-init",
    "-x",
    "c++",
    "-D__CUDACC__",
    "-D__CUDA_ARCH__=900",
    "-include",
    "cuda_runtime.h",
]


class BuildError(Exception):
    """An error of the compiler, with its output."""


def unavailable() -> str | None:
    """Return why the module cannot be built here; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulator switches between threads in the assembly of x86-64 Linux"
    if not (ROOT / "csrc").is_dir():
        return "the sources of the kernels are not here"
    if compiler() is None:
        return "no C++ compiler was found"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None


def compiler() -> str | None:
    """Return the C++ compiler: $CXX, or one on the PATH."""
    return shutil.which(os.environ.get("CXX", "c++"))


class Build:
    """A configuration of the build.

    Parameters
    ----------
    sanitize : str, optional
        What the kernels and the emulator are instrumented for, such as "address".
    overlay : Path, optional
        A folder whose files stand in for those of csrc at the same relative path; used by the objects in
        `changed` only.
    changed : sequence of str
        The CUDA files that see the overlay, by the names of their objects, such as "act_cuda".
    """

    def __init__(
        self, sanitize: str | None = None, overlay: Path | None = None, changed: Sequence[str] = ()
    ) -> None:
        self._sanitize = (
            [] if sanitize is None else [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g1"]
        )
        self._overlay, self._changed = overlay, set(changed)
        self._folder = _folder()

    def module(self) -> Path:
        """Compile what is out of date, link, and return the module's path; safe in several processes."""
        with _lock(self._folder):
            units = self._units()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda unit: self._compile(*unit), units))
            name = hashlib.sha256("\n".join(map(str, objects)).encode()).hexdigest()[:16]
            path = self._folder / name / "_C.so"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                partial = path.with_suffix(".partial")
                _run(
                    [_required_compiler(), "-shared", *self._sanitize, *map(str, objects), "-o", str(partial)]
                )
                partial.rename(path)
            return path

    def _units(self) -> list[tuple[str, Path, list[str]]]:
        """Return name, source and flags of each object, in the order of linking."""
        import pybind11

        package = (ROOT / "adaptcomp_ext" / "__init__.py").read_text()
        version = re.search(r'^__version__ = "(.*)"', package, re.MULTILINE)
        assert version is not None
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        texts = {"VERSION": version[1], "CUDA_COMPILER": "emulated on the host", "CUDA_ARCHITECTURES": ""}
        defined = [
            "-DADAPTCOMP_WITH_CUDA=1",
            "-DADAPTCOMP_EMULATION",
            *(f'-DADAPTCOMP_{k}="{v}"' for k, v in texts.items()),
        ]
        csrc, emulator = ROOT / "csrc", [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
        # The host's own kernels are not what is tested here: nothing is spent on making them fast.
        units = [("bindings", csrc / "bindings.cpp", ["-O1", *emulator, *python, *defined])]
        for kind in ("common/*.cpp", "*/*_cpu.cpp"):
            units += [(p.stem, p, ["-O0", *emulator]) for p in sorted(csrc.glob(kind))]
        for isa, flags in ISAS.items():
            tiles = sorted(csrc.glob("*/*_tile.cpp"))
            units += [
                (f"{p.stem}-{isa}", p, ["-O0", *emulator, f"-DAC_ISA=isa_{isa}", *flags]) for p in tiles
            ]
        # What is instrumented runs few tests, and compiles in a third of the time without optimisation.
        cuda = ["-O0" if self._sanitize else "-O1", *CUDA, *emulator, *self._sanitize]
        units.append(("emulator", HERE / "emulator.cpp", ["-O2", *emulator, *self._sanitize]))
        units.append(("shared_begin", HERE / "shared_begin.cpp", []))
        for path in [*sorted(csrc.glob("*/*_cuda.cu")), *sorted((HERE / "kernels").glob("*.cu"))]:
            units.append((path.stem, *self._seen(path, cuda)))
        units.append(("shared_end", HERE / "shared_end.cpp", []))
        return units

    def _seen(self, path: Path, flags: list[str]) -> tuple[Path, list[str]]:
        if self._overlay is None or path.stem not in self._changed:
            return path, flags
        instead = self._overlay / path.relative_to(ROOT / "csrc")
        return (instead if instead.exists() else path), [f"-I{self._overlay}", *flags]

    def _compile(self, name: str, source: Path, flags: list[str]) -> Path:
        command = [_required_compiler(), *COMMON, *flags]
        made_of = hashlib.sha256(" ".join(command).encode() + source.read_bytes() + _headers())
        if self._overlay is not None and name in self._changed:
            for path in sorted(p for p in self._overlay.rglob("*") if p.is_file()):
                made_of.update(path.read_bytes())
        out = self._folder / f"{name}-{made_of.hexdigest()[:16]}.o"
        if not out.exists():
            partial = out.with_suffix(f".{os.getpid()}.partial")
            _run([*command, "-c", str(source), "-o", str(partial)])
            partial.rename(out)
        return out


def _headers() -> bytes:
    """Return a hash of all headers, because any of them may be part of an object."""
    digest = hashlib.sha256()
    for folder in (ROOT / "csrc", HERE / "include"):
        for path in sorted(folder.rglob("*.*h")):
            digest.update(path.read_bytes())
    return digest.digest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _required_compiler() -> str:
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler was found")
    return found


def _folder() -> Path:
    folder = ROOT / "build" / "cuda_host"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a checkout that cannot be written to
        folder = Path(tempfile.gettempdir()) / f"adaptcomp-cuda-host-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a build: processes that need the same one wait for it instead of repeating it."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

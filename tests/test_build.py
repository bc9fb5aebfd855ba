"""What the build refuses, by name, before it compiles anything."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake")

pytestmark = pytest.mark.skipif(
    CMAKE is None or not (ROOT / "CMakeLists.txt").is_file(), reason="needs cmake and the sources"
)


@pytest.mark.promise("systems")
@pytest.mark.parametrize(
    ("define", "sentence"),
    [
        (
            ["CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=riscv64"],
            "Linux on riscv64 is not supported yet",
        ),
        (
            ["CMAKE_SYSTEM_NAME=FreeBSD", "CMAKE_SYSTEM_PROCESSOR=x86_64"],
            "FreeBSD on x86_64 is not supported yet",
        ),
        (["ADAPTCOMP_CUDA=PERHAPS"], "ADAPTCOMP_CUDA=PERHAPS: expected AUTO, ON or OFF"),
        (
            ["ADAPTCOMP_CUDA=OFF", "ADAPTCOMP_OPENMP=PERHAPS"],
            "ADAPTCOMP_OPENMP=PERHAPS: expected AUTO, ON or OFF",
        ),
    ],
)
def test_what_cannot_be_built_is_named(tmp_path, define, sentence):
    import pybind11

    options = [f"-D{option}" for option in (*define, f"pybind11_DIR={pybind11.get_cmake_dir()}")]
    assert CMAKE is not None
    run = subprocess.run(
        [CMAKE, "-S", str(ROOT), "-B", str(tmp_path), *options], capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert sentence in " ".join(run.stderr.split())

"""The oldest triton supported, 3.6: every launch compiles with it as with the newest, and a test of each kernel passes.

It lies in a folder of its own, where CI puts it, and comes before the installed one on the path of other processes.
"""

import os
import subprocess
import sys

import pytest
from compiling import FILES, LAUNCHES, ROOT, assert_sound, compile_all, needs_tools

OLDEST = "3.6."
FOLDER = os.environ.get("STGEN_TRITON_36", "")
SPILLS = {  # what is known to spill; float16 features of 128 are kept as two bfloat16, and Ampere's registers are full
    ("linear_attention", "delta fp16 128 x 64, empty", "sm_80"): ("_delta_backward_kernel spills 28 B per thread",)
}
QUICK = (
    "test_block_scores_kernels.py::test_quick[check_top]",
    "test_block_sparse_attention.py::test_quick[half]",
    "test_linear_attention_kernels.py::test_quick[check_half]",
    "test_modulated_norm.py::test_quick[check_plain]",
    "test_norm_rope.py::test_quick[check_plain]",
    "test_short_attention.py::test_quick[check_temporal]",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER,
        reason=f"STGEN_TRITON_36 names no folder; pip install --no-deps --target FOLDER 'triton=={OLDEST}*' makes one",
    ),
]


def path() -> str:
    return os.pathsep.join((FOLDER, str(ROOT)))


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("oldest"), PYTHONPATH=path())


def test_it_is_the_oldest():
    code = "import triton; print(triton.__version__, triton.__file__)"
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path()}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert told.startswith(OLDEST) and FOLDER in told


@needs_tools
@pytest.mark.parametrize(("file", "name", "target"), LAUNCHES)
def test_compiles(oldest, file, name, target):
    op = os.path.basename(file).removeprefix("launches_").removesuffix(".py")
    assert_sound(oldest[file, name, target], SPILLS.get((op, name, target), ()))


def test_one_test_of_each_kernel_passes():
    assert len(QUICK) == len(FILES)
    tests = [f"tests/kernels/{test}" for test in QUICK]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": path(), "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and f"{len(QUICK)} passed" in run.stdout, run.stdout + run.stderr

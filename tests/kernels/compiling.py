"""Compiling the launches of tests/kernels/launches_*.py, in one process, since pytest's interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stgen.testing.compiled import load_launches, show, tools

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = sorted(str(path) for path in HERE.glob("launches_*.py"))
LAUNCHES = [
    pytest.param(file, name, target, id=f"{Path(file).stem.removeprefix('launches_')}-{name}-{target}")
    for file in FILES
    for name, launch in load_launches(file).items()
    for target in launch.targets
]

needs_tools = pytest.mark.skipif(tools() is None, reason="the installed triton has no NVIDIA disassembler")


def compile_all(folder: Path, *arguments: str, **environment: str) -> dict[tuple[str, str, str], dict]:
    """Results of the program by file, launch and target; `folder` keeps them, the environment is this one's and more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "stgen.testing.compiled", *FILES, *arguments]
    told = folder / "results.json"
    run = subprocess.run([*command, "--json", str(told)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    results = json.loads(told.read_text())
    assert run.returncode == any(result["faults"] for result in results)
    return {(result["file"], result["launch"], result["target"]): result for result in results}


def assert_sound(result: dict, faults: tuple[str, ...] = ()) -> None:
    """It has these faults and no others."""
    assert tuple(result["faults"]) == faults, show(result)
    assert result["reports"], show(result)

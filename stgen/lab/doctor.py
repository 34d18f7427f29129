"""Whether training can run on this machine and which kernels do its work: a line each, with what to do where one fails.

Every kernel is tried on a tiny case, forward and backward, against its definition in float64.
"""

import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stgen import logger, video
from stgen.ops.boxes import Boxes
from stgen.ops.support import Support

State = Literal["ok", "note", "FAIL"]  # as it should be; works with less; training cannot run

LIBRARIES = ("diffusers", "transformers", "accelerate", "safetensors", "einops", "numpy", "av", "pydantic", "wandb")
PYTHON = (3, 11)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative rms error of outputs and gradients
COMPILE_SECONDS = 120.0
AHEAD = """
import torch
from stgen.ops.norm_rope.triton import forward
from stgen.testing.compiled import dry_launch
with dry_launch("{target}") as reports:
    forward(torch.empty(1, 64, 3, 2, 64, dtype=torch.bfloat16, device="meta"), None, None, None, None, 1e-6, None)
print(len(reports), "kernel,", reports[0].registers, "registers")
"""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at; `advice` says what to do where it is not as it should be."""

    name: str
    state: State
    words: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5} {self.name:<24} {self.words}" + (f" -> {self.advice}" if self.advice else "")


@dataclass
class Report:
    lines: list[Line] = field(default_factory=list)

    @property
    def can_train(self) -> bool:
        return all(line.state != "FAIL" for line in self.lines)

    @property
    def verdict(self) -> str:
        if not self.can_train:
            return "training cannot run here; see the lines marked FAIL"
        notes = sum(line.state == "note" for line in self.lines)
        say = "line says" if notes == 1 else "lines say"
        return "training can run here" + (f"; {notes} {say} what could be better" if notes else "")


def doctor() -> Report:
    """Look at everything, print a line as soon as it is known, and return them all."""
    report = Report()
    for line in _lines():
        print(line, flush=True)
        report.lines.append(line)
    print(f"\n{report.verdict}")
    return report


def _lines() -> Iterator[Line]:
    yield _python()
    yield Line("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    yield from _libraries()
    yield _triton()
    yield from _devices()
    yield _video()
    yield _wandb()
    yield from _folders()
    for name, trial in TRIALS.items():
        yield _kernels(name, trial)
    yield _ahead()


# -------------------------------------------------------------------------------------------------------- the machine


def _python() -> Line:
    version = platform.python_version()
    if sys.version_info < PYTHON:
        return Line("python", "FAIL", version, f"take {PYTHON[0]}.{PYTHON[1]} or newer")
    return Line("python", "ok", f"{version}, {platform.system()} {platform.machine()}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libraries() -> Iterator[Line]:
    versions = {name: _version(name) for name in LIBRARIES}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Line("libraries", "ok", found)
    if missing := [name for name, version in versions.items() if version is None]:
        yield Line("libraries", "FAIL", f"{', '.join(missing)} not installed", f"pip install {' '.join(missing)}")


def _triton() -> Line:
    version = _version("triton")
    if version is None:
        return Line("triton", "note", "not installed; PyTorch does all the work", "on a GPU: pip install triton")
    return Line("triton", "ok", version + (", interpreted (TRITON_INTERPRET=1)" if _interpreted() else ""))


def _devices() -> Iterator[Line]:
    """The CPU, and every GPU that PyTorch sees or why it sees none."""
    yield Line("cpu", "ok", f"{torch.get_num_threads()} threads of {os.cpu_count()}{_memory()}")
    driver = _driver()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield _gpu(i, driver)
    elif torch.version.cuda is None:
        advice = "install a torch built for CUDA (pytorch.org)" if driver else "none needed to train small models"
        yield Line("gpu", "note", f"this torch has no CUDA; {_driver_words(driver)}", advice)
    else:
        advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES" if driver else "none needed to train small models"
        yield Line("gpu", "note", f"PyTorch finds no device; {_driver_words(driver)}", advice)


def _gpu(i: int, driver: str | None) -> Line:
    about = torch.cuda.get_device_properties(i)
    words = (
        f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB, "
        + _driver_words(driver)
    )
    if about.major < 8:
        return Line(f"gpu {i}", "note", f"{words}; no bfloat16 products", "write train.mixed_precision: no")
    return Line(f"gpu {i}", "ok", words)


def _driver_words(driver: str | None) -> str:
    return f"driver {driver}" if driver else "no NVIDIA driver found"


def _driver() -> str | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):
        return ""


def _video() -> Line:
    """A clip of each kind that a run may write goes to disk and back."""
    clip = video.Clip(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 8.0)
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".mp4", ".mkv", ".webm", ".gif"):
            try:
                video.write(Path(folder) / f"clip{suffix}", clip)
                video.read(Path(folder) / f"clip{suffix}")
            except video.VideoError as error:
                failed[suffix] = _first(error.reason)
    if not failed:
        return Line("video", "ok", "mp4 (H.264), mkv (FFV1), webm (VP9) and gif are written and read")
    words = "; ".join(f"{suffix}: {reason}" for suffix, reason in failed.items())
    return Line("video", "FAIL" if ".mp4" in failed else "note", words, "pip install --force-reinstall av")


def _wandb() -> Line:
    mode = logger._mode("auto")
    words = {
        "online": "online: an API key is present",
        "offline": "offline: runs are kept in the run folder",
        "disabled": "disabled by WANDB_MODE",
    }[mode]
    return Line("W&B", "ok", words, "for online: wandb login" if mode == "offline" else "")


def _folders() -> Iterator[Line]:
    home = Path.home()
    folders = {
        "this folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "triton's cache": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton/cache"),
        "model cache": Path(os.environ.get("HF_HOME") or home / ".cache/huggingface"),
    }
    variables = {"triton's cache": "TRITON_CACHE_DIR", "model cache": "HF_HOME", "temporary files": "TMPDIR"}
    for name, folder in folders.items():
        if _can_write(folder):
            yield Line(name, "ok", f"{folder}, {shutil.disk_usage(_existing(folder)).free / 1e9:.0f} GB free")
        elif name in variables:
            yield Line(name, "note", f"{folder} cannot be written to", f"set {variables[name]} to a folder that can")
        else:
            yield Line(name, "note", f"{folder} cannot be written to", "set run.output_dir to a folder that can")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False


def _first(error: object) -> str:
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------- the kernels

Make = Callable[..., Tensor]  # of a shape, drawn from a normal distribution, a leaf that gradients go to
Outputs = tuple[Tensor, ...]
GRID = (4, 2, 4)  # frames, rows, columns of the trials


@dataclass(frozen=True)
class Trial:
    """A tiny call of an operation, differentiable in all that `make` makes."""

    function: str  # where it is: module:name
    call: Callable[[Callable, Make, str], Outputs]

    def load(self) -> Callable:
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


def _short_attention(op: Callable, make: Make, impl: str) -> Outputs:
    q, k, v = make(2, 32, 3, 2, 32).unbind(2)  # views of a packed projection
    return (op(q, k, v, Boxes(GRID, (4, 1, 1)), impl=impl),)


def _block_sparse_attention(op: Callable, make: Make, impl: str) -> Outputs:
    q, k, v = (make(2, 2, 96, 32) for _ in range(3))
    near = (torch.arange(96)[:, None] - torch.arange(96)).abs() < 24
    support = Support.from_mask(near[None, None].to(q.device), (32, 32))
    return op(q, k, v, support, sink=make(2), return_lse=True, impl=impl)


def _linear_attention(op: Callable, make: Make, impl: str) -> Outputs:
    q, k, v = (make(1, 2, 64, 32) for _ in range(3))
    return (op(q.exp(), k.exp(), v, chunk=16, impl=impl),)


def _block_scores(op: Callable, make: Make, impl: str) -> Outputs:
    q, k = make(1, 2, 64, 32), make(1, 2, 64, 32)
    return (op(q, k, Support.full(64, 64, (16, 16), q.device), impl=impl),)


def _norm_rope(op: Callable, make: Make, impl: str) -> Outputs:
    qkv, gain_q, gain_k = make(2, 24, 3, 2, 32), make(32), make(32)
    angles = torch.arange(24.0, device=qkv.device)[:, None] / torch.arange(1.0, 17.0, device=qkv.device)
    return op(qkv, gain_q, gain_k, (angles.cos(), angles.sin()), impl=impl)


def _modulated_norm(op: Callable, make: Make, impl: str) -> Outputs:
    return (op(make(2, 24, 64), make(2, 1, 64), make(2, 1, 64), impl=impl),)


TRIALS = {
    "short_attention": Trial("stgen.ops.short_attention:short_attention", _short_attention),
    "block_sparse_attention": Trial("stgen.ops.block_sparse_attention:block_sparse_attention", _block_sparse_attention),
    "linear_attention": Trial("stgen.ops.linear_attention:linear_attention", _linear_attention),
    "block_scores": Trial("stgen.ops.block_scores:block_scores", _block_scores),
    "norm_rope": Trial("stgen.ops.norm_rope:norm_rope", _norm_rope),
    "modulated_norm": Trial("stgen.ops.modulated_norm:modulated_norm", _modulated_norm),
}


def _kernels(name: str, trial: Trial) -> Line:
    """Whether the Triton kernels of an operation do here what its definition says, or who does their work."""
    try:
        op = trial.load()
    except (ImportError, AttributeError) as error:
        return Line(name, "FAIL", f"is not there: {_first(error)}", "reinstall stgen")
    others = [impl for impl in _impls(op) if impl not in ("auto", "triton")]
    instead = f"runs in PyTorch here: {'/'.join(others) or 'reference'}"
    if "triton" not in _impls(op):
        return Line(name, "ok", instead)
    if _version("triton") is None:
        return Line(name, "note", f"{instead}; triton is missing", "pip install triton")
    if not torch.cuda.is_available() and not _interpreted():
        return Line(name, "ok", f"{instead}; no CUDA device for the kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _tried(name, trial, device, instead)


def _tried(name: str, trial: Trial, device: torch.device, instead: str) -> Line:
    where = "the kernels work" if device.type == "cuda" else "the kernels work in Triton's interpreter"
    told = []
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        try:
            error = trial_error(trial, device, dtype)
        except Exception as problem:  # whatever a compiler or a driver may raise
            return Line(name, "note", f"{instead}; the kernels fail: {_first(problem)}", "report it; training goes on")
        kind = str(dtype).removeprefix("torch.")
        told.append(f"{error:.1g} in {kind}")
        if not error <= TOLERANCE[dtype]:  # NaN too
            advice = f"at most {TOLERANCE[dtype]:g} expected; report it; CUDA_VISIBLE_DEVICES= trains without them"
            return Line(name, "FAIL", f"the kernels are wrong: error {error:.2g} in {kind}", advice)
    return Line(name, "ok", f"{where}, forward and backward; error {', '.join(told)}")


def trial_error(trial: Trial, device: torch.device, dtype: torch.dtype, impl: str = "triton") -> float:
    """The largest relative rms error of outputs and gradients against the definition in float64 on the same numbers."""
    got = _passes(trial, device, dtype, dtype, impl)
    exact = _passes(trial, torch.device("cpu"), dtype, torch.float64, "reference")
    errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    return max(errors, key=lambda x: (x != x, x))  # NaN is the worst


def _passes(trial: Trial, device: torch.device, rounded: torch.dtype, dtype: torch.dtype, impl: str) -> list[Tensor]:
    """Outputs and gradients of a trial in `dtype`, of numbers that were rounded to another."""
    g, leaves = torch.Generator().manual_seed(0), []

    def make(*shape: int) -> Tensor:
        leaves.append(torch.randn(shape, generator=g).to(rounded).to(device, dtype).requires_grad_())
        return leaves[-1]

    outputs = trial.call(trial.load(), make, impl)
    weights = [torch.randn(out.shape, generator=g).to(device, out.dtype) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def _impls(op: Callable) -> tuple[str, ...]:
    """The implementations that an operation may be told to take."""
    parameter = inspect.signature(op).parameters.get("impl")
    return () if parameter is None else get_args(parameter.annotation)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _ahead() -> Line:
    """Whether kernels compile for a GPU without running on it; in a process of its own, for Triton has one mode in each."""
    if _version("triton") is None:
        return Line("compiling ahead of time", "note", "triton is missing", "pip install triton")
    target = "sm_90"
    if torch.cuda.is_available():
        target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    run = [sys.executable, "-c", AHEAD.format(target=target)]
    try:
        done = subprocess.run(run, capture_output=True, text=True, timeout=COMPILE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return Line("compiling ahead of time", "note", f"took over {COMPILE_SECONDS:g} s", "try on an idle machine")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        words = _first((errors or [done.stderr])[-1])
        return Line("compiling ahead of time", "note", f"fails for {target}: {words}", "needed for tests alone")
    return Line("compiling ahead of time", "ok", f"for {target}: {done.stdout.strip()}")

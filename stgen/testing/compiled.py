"""Compile kernels for GPUs that need not be there, and read what the compiler made of them.

The interpreter accepts what the compiler refuses, and knows nothing of registers, shared memory and instructions. Here
the true launchers run on meta tensors of any size; every launch is specialised and compiled as it would be on the GPU,
disassembled with the tools in triton's wheel, and not run. The compiler itself does not refuse kernels with too much
shared memory; they fail when they are loaded, so limits are checked here.

    python -m stgen.testing.compiled tests/kernels/launches_*.py [--quick] [--target sm_90 ...] [--json FILE]

compiles the `LAUNCHES: dict[str, Launch]` of files and exits with 1 where one has a fault.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stgen.testing.interpreter import Patches, interpreting


@dataclass(frozen=True)
class Target:
    """A GPU architecture: its number, the shared memory a block may have, its widest matrix product."""

    capability: int
    shared_kib: int
    product: str  # opcode of the tensor cores


TARGETS = {
    "sm_80": Target(80, 163, "HMMA"),
    "sm_89": Target(89, 99, "HMMA"),
    "sm_90": Target(90, 227, "HGMMA"),
    "sm_100": Target(100, 227, "UTCHMMA"),
}


@dataclass(frozen=True)
class Launch:
    """What to compile: `call()` runs launchers on meta tensors.

    `needs` are opcodes that some kernel of the call should have: "HGMMA" means the widest tensor core product of the
    target at hand, "HMMA" any, "UTMALDG" (bulk loads) counts from sm_90 on. "LDG.128" asks for loads from global memory
    of that width, direct or asynchronous, and that no kernel has loads below 64 bit only. "no TF32" asks for its
    absence.
    """

    call: Callable[[], object]
    quick: bool = False
    needs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Report:
    """A compiled kernel. Opcodes are counted in the machine code, those of memory also by width in bits."""

    name: str
    target: str
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spill_bytes: int  # stored per thread, as in `ptxas -v`
    shared_bytes: int  # per block
    opcodes: dict[str, int]

    def line(self) -> str:
        shown = ("HMMA", "HGMMA", "UTCHMMA", "TF32", "UTMALDG", "LDGSTS.128", "LDG.128", "LDG.64", "LDG.32", "LDG.16")
        counts = " ".join(f"{name}={self.opcodes[name]}" for name in shown if name in self.opcodes)
        return (
            f"{self.name} {self.target} {self.num_warps} warps {self.num_stages} stages: {self.registers} registers, "
            f"{self.spill_bytes} B spilled, {self.shared_bytes / 1024:.1f} KiB shared; {counts}"
        )


@contextlib.contextmanager
def dry_launch(target: str) -> Iterator[list[Report]]:
    """Launches inside are compiled for `target` and reported in the list, in order, and not run.

    Raises:
        RuntimeError: in a process whose kernels are interpreted (TRITON_INTERPRET=1).
    """
    if interpreting():
        raise RuntimeError("dry_launch compiles kernels, for which TRITON_INTERPRET should not be set")
    _set_environment()
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    reports: list[Report] = []
    patches = Patches()

    @patches.on(JITFunction, "run")
    def compile_only(original, self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            size: Any = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs) if callable(grid) else grid
            reports.append(_report(kernel, target, tuple(size)))
        return kernel

    active = driver._active
    driver.set_active(_Driver(target))  # type: ignore[arg-type]
    try:
        yield reports
    finally:
        patches.undo()
        driver._active = active


class _Driver:
    """As much of a triton driver as compiling asks for."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", TARGETS[target].capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # under which triton keeps compiled kernels

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("meta")


def _set_environment() -> None:
    """Where triton keeps what it compiled; and fused multiply-adds, its default until 3.10, said explicitly."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stgen" / "triton"
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


# ------------------------------------------------------------------------------------------------ machine code


def tools() -> Path | None:
    """The folder of triton's disassemblers, None where the installed triton has none."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm")) else None


def _report(kernel: Any, target: str, grid: tuple[int, ...]) -> Report:
    registers, opcodes = _read(kernel.asm["cubin"])
    m = kernel.metadata
    spilled = spill_bytes(opcodes)
    return Report(m.name, target, grid, m.num_warps, m.num_stages, registers, spilled, m.shared, opcodes)


def spill_bytes(opcodes: dict[str, int]) -> int:
    """Bytes that the stores to local memory write, each executed once."""
    return sum(count * int(name[4:]) // 8 for name, count in opcodes.items() if name.startswith("STL."))


def _read(cubin: bytes) -> tuple[int, dict[str, int]]:
    """Registers and opcode counts of a binary; kept beside triton's cache, as reading takes longer than its look-up."""
    kept = Path(os.environ["TRITON_CACHE_DIR"]) / "opcodes" / f"{hashlib.sha256(cubin).hexdigest()}.json"
    if kept.exists():
        registers, opcodes = json.loads(kept.read_text())
        return registers, opcodes
    registers, opcodes = _disassemble(cubin)
    kept.parent.mkdir(parents=True, exist_ok=True)
    (part := kept.with_suffix(f".{os.getpid()}")).write_text(json.dumps([registers, opcodes]))
    part.replace(kept)
    return registers, opcodes


def _disassemble(cubin: bytes) -> tuple[int, dict[str, int]]:
    folder = tools()
    assert folder, "the installed triton has no disassembler"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([folder / "cuobjdump", "-res-usage", file.name]).stdout
        code = run([folder / "nvdisasm", "-c", file.name]).stdout
    found = re.search(r"\bREG:(\d+)", usage)
    assert found, f"cuobjdump told no registers: {usage}"
    return int(found[1]), count_opcodes(code)


MEMORY = ("LDG", "LDGSTS", "STG", "LDS", "STS", "LDL", "STL")
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def count_opcodes(code: str) -> dict[str, int]:
    """Opcodes of SASS as nvdisasm prints it; those of memory again as LDG.128, those that compute in TF32 as TF32."""
    counts: Counter[str] = Counter()
    for instruction in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE):
        opcode, *modifiers = instruction.split(".")
        counts[opcode] += 1
        if opcode in MEMORY:
            counts[f"{opcode}.{next((WIDTHS[m] for m in modifiers if m in WIDTHS), 32)}"] += 1
        counts["TF32"] += "TF32" in modifiers
    return dict(sorted((+counts).items()))


# ------------------------------------------------------------------------------------------------ rules


def faults(launch: Launch, target: str, reports: list[Report]) -> list[str]:
    """What is wrong with the kernels of a launch, one sentence each."""
    limit = TARGETS[target].shared_kib * 1024
    found = [] if reports else ["nothing was launched"]
    for report in reports:
        if report.spill_bytes:
            found.append(f"{report.name} spills {report.spill_bytes} B per thread")
        if report.shared_bytes > limit:
            found.append(f"{report.name} has {report.shared_bytes} B of shared memory, {target} {limit}")
        if max(report.grid[1:], default=0) > 65535:
            found.append(
                f"{report.name} has grid {report.grid}; axes 1 and 2 take 65535, put the large count on axis 0"
            )
    return found + [fault for need in launch.needs if (fault := _unmet(need, target, reports))]


def _unmet(need: str, target: str, reports: list[Report]) -> str | None:
    """What is said of a need that is not met."""
    opcodes = sum((Counter(report.opcodes) for report in reports), Counter())
    product = TARGETS[target].product
    if need.startswith("no "):
        return f"{need[3:]} is used" if opcodes[need[3:]] else None
    if need in ("UTMALDG", "UTMASTG") and TARGETS[target].capability < 90:
        return None
    if need.startswith("LDG."):
        return _too_narrow(int(need[4:]), reports)
    accepted = {"HGMMA": (product,), "HMMA": ("HMMA", product)}.get(need, (need,))
    return None if any(opcodes[name] for name in accepted) else f"no {' or '.join(dict.fromkeys(accepted))}"


def _too_narrow(width: int, reports: list[Report]) -> str | None:
    widest = {report.name: max(load_widths(report), default=width) for report in reports}
    narrow = [name for name, bits in widest.items() if bits < 64]
    if narrow:
        return f"{', '.join(narrow)} loads at most 32 bit at a time from global memory"
    return None if max(widest.values(), default=0) >= width else f"no kernel loads {width} bit at a time"


def load_widths(report: Report) -> list[int]:
    """Widths in bits of the loads from global memory; a bulk load counts as 128."""
    widths = [int(name.split(".")[1]) for name in report.opcodes if re.fullmatch(r"(LDG|LDGSTS)\.\d+", name)]
    return widths + [128] * ("UTMALDG" in report.opcodes)


# ------------------------------------------------------------------------------------------------ program


@functools.cache
def load_launches(file: str) -> dict[str, Launch]:
    """`LAUNCHES` of a Python file."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader, f"{file} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LAUNCHES


def compile_launch(item: tuple[str, str, str]) -> dict[str, Any]:
    """Compile launch `name` of a file for a target: its reports, faults and seconds."""
    file, name, target = item
    launch, start = load_launches(file)[name], time.perf_counter()
    reports: list[Report] = []
    try:
        with dry_launch(target) as reports:
            launch.call()
        found = faults(launch, target, reports)
    except Exception as error:  # one launch that does not compile should not hide the others
        found = [f"does not compile: {type(error).__name__}: {str(error).strip()}"]
    seconds = time.perf_counter() - start
    reports_ = [asdict(report) for report in reports]
    return {"file": file, "launch": name, "target": target, "seconds": seconds, "faults": found, "reports": reports_}


def show(result: dict[str, Any]) -> str:
    """A line for a launch, one for each of its kernels and one for each fault."""
    head = f"{Path(result['file']).stem}:{result['launch']} {result['target']} {result['seconds']:.1f} s"
    kernels = [f"    {Report(**report).line()}" for report in result["reports"]]
    return "\n".join([head, *kernels, *(f"    FAULT: {fault}" for fault in result["faults"])])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stgen.testing.compiled", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="Python files with LAUNCHES")
    parser.add_argument("--quick", action="store_true", help="only launches marked quick")
    parser.add_argument("--target", nargs="+", choices=TARGETS, help="in place of each launch's own")
    parser.add_argument("--only", default="", metavar="TEXT", help="only launches whose name has this in it")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    _set_environment()
    items = [
        (file, name, target)
        for file in given.files
        for name, launch in load_launches(file).items()
        if (launch.quick or not given.quick) and given.only in name
        for target in given.target or launch.targets
    ]
    results = []
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:  # children share what is imported
        for result in pool.imap(compile_launch, items):
            results.append(result)
            print(show(result), flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(results))
    faulty = sum(bool(result["faults"]) for result in results)
    print(f"{len(results)} compiled, {faulty} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())

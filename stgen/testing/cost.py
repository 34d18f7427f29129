"""What a kernel may cost on a GPU that is not there: an estimate between two bounds, never a measurement.

`occupancy` follows from the architecture and is exact. `predict` knows the work of a launch, the units that do it and
how unevenly the programs fill them; it knows nothing of latencies, caches, bank conflicts and atomics. `counters` counts
what the interpreter really executes, so that the work that is put in is not a guess.
"""

import contextlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stgen.testing.interpreter import Patches


@dataclass(frozen=True)
class Gpu:
    """What one GPU has; rates are those that good kernels reach, not those of data sheets."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    tensor_flops: float  # per second, dense bf16, fp32 accumulators
    bandwidth: float  # bytes per second, copies
    # per multiprocessor
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    shared_bytes_per_block: int = 227 * 1024
    warps: int = 64
    blocks: int = 32
    fp32: int = 128  # instructions per clock
    exponentials: int = 16  # per clock


H200 = Gpu("H200", multiprocessors=132, clock=1.755e9, tensor_flops=790e12, bandwidth=4.3e12)


@dataclass(frozen=True)
class Work:
    """What a launch does altogether."""

    flops: float = 0  # of tensor core products, a multiply-add counting 2
    bytes: float = 0  # to and from memory, each tensor as often as it does not stay in the cache
    exponentials: float = 0
    fp32: float = 0  # instructions, a fused multiply-add counting 1


@dataclass(frozen=True)
class Prediction:
    """Seconds between two bounds: everything overlaps, or nothing does."""

    optimistic: float
    pessimistic: float
    bound: str  # the unit that takes longest
    blocks: int  # at a time on a multiprocessor
    waves: float  # programs / programs at a time
    efficiency: float  # of filling the multiprocessors: mean / largest load


def occupancy(registers: int, shared_bytes: int, num_warps: int, gpu: Gpu = H200) -> int:
    """Blocks that fit on a multiprocessor at a time, 0 where not one does.

    Each of 4 schedulers has a quarter of the registers and gives them to warps by 256; 1 KiB of shared memory per
    block is the driver's.
    """
    if shared_bytes > gpu.shared_bytes_per_block:
        return 0
    per_warp = math.ceil(max(registers, 24) * 32 / 256) * 256
    warps = min(gpu.warps, 4 * (gpu.registers // 4 // per_warp))
    return min(warps // num_warps, gpu.shared_bytes // (shared_bytes + 1024), gpu.blocks)


def balance(programs: Sequence[float], slots: int) -> float:
    """Mean / largest load where programs of given cost go, in order, to whichever of the slots is free first."""
    loads = [0.0] * slots
    for cost in programs:
        heapq.heapreplace(loads, loads[0] + cost)
    return sum(loads) / slots / max(loads)


def predict(
    work: Work,
    grid: Sequence[int],
    registers: int,
    shared_bytes: int,
    num_warps: int,
    programs: Sequence[float] | None = None,
    gpu: Gpu = H200,
) -> Prediction:
    """Bounds for the time of a launch; resources as in `stgen.testing.compiled.Report`.

    Args:
        programs: relative cost of each program in launch order; without it all cost the same.
    Raises:
        ValueError: a block does not fit on a multiprocessor.
    """
    blocks = occupancy(registers, shared_bytes, num_warps, gpu)
    if not blocks:
        raise ValueError(
            f"a block of {num_warps} warps, {registers} registers and {shared_bytes} B of shared memory does not fit on "
            f"a multiprocessor of {gpu.name}; use smaller tiles or fewer stages"
        )
    waves = math.prod(grid) / (gpu.multiprocessors * blocks)
    even = waves / math.ceil(waves)
    efficiency = even if programs is None else balance(programs, gpu.multiprocessors * blocks)
    cycles = gpu.multiprocessors * gpu.clock
    seconds = {
        "tensor cores": work.flops / gpu.tensor_flops,
        "memory": work.bytes / gpu.bandwidth,
        "exponentials": work.exponentials / (gpu.exponentials * cycles),
        "fp32": work.fp32 / (gpu.fp32 * cycles),
    }
    bound = max(seconds, key=lambda unit: seconds[unit])
    longest, total = seconds[bound] / efficiency, sum(seconds.values()) / efficiency
    return Prediction(longest, total, bound, blocks, waves, efficiency)


@dataclass
class Counts:
    """What programs in the interpreter did; lanes that a mask switches off do not count, except in exponentials."""

    programs: int = 0
    flops: int = 0  # of tl.dot
    exponentials: int = 0
    loaded: int = 0  # bytes
    stored: int = 0
    updated: int = 0  # by atomics


@contextlib.contextmanager
def counters() -> Iterator[Counts]:
    """Counts of the launches inside; for the interpreter only."""
    import triton.runtime.interpreter as interpreter

    patches, counts = Patches(), Counts()
    _count_arithmetic(patches, interpreter.InterpreterBuilder, counts)
    _count_memory(patches, interpreter.InterpreterBuilder, counts)
    try:
        yield counts
    finally:
        patches.undo()


def _count_arithmetic(patches: Patches, builder: Any, counts: Counts) -> None:
    @patches.on(builder, "set_grid_idx")
    def enter(original, self, *place):
        counts.programs += 1
        return original(self, *place)

    @patches.on(builder, "create_dot")
    def dot(original, self, a, b, accumulator, *rest):
        counts.flops += 2 * a.data.shape[-1] * accumulator.data.size
        return original(self, a, b, accumulator, *rest)

    for name in ("create_exp", "create_exp2"):

        @patches.on(builder, name)
        def power(original, self, x):
            counts.exponentials += x.data.size
            return original(self, x)


def _count_memory(patches: Patches, builder: Any, counts: Counts) -> None:
    def active_bytes(pointers: Any, mask: Any) -> int:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return width * int(np.broadcast_to(mask.data, pointers.data.shape).sum())

    @patches.on(builder, "create_masked_load")
    def load(original, self, pointers, mask, *rest, **options):
        counts.loaded += active_bytes(pointers, mask)
        return original(self, pointers, mask, *rest, **options)

    @patches.on(builder, "create_masked_store")
    def store(original, self, pointers, value, mask, *rest, **options):
        counts.stored += active_bytes(pointers, mask)
        return original(self, pointers, value, mask, *rest, **options)

    @patches.on(builder, "create_atomic_rmw")
    def update(original, self, operation, pointers, value, mask, *rest):
        counts.updated += active_bytes(pointers, mask)
        return original(self, operation, pointers, value, mask, *rest)

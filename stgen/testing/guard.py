"""Faults that Triton's interpreter does not notice: it reads and writes raw memory, one program after another.

A guard watches every load, store and atomic of the launches inside it. Pointers know the argument they come from, so an
overrun is told wherever it lands. What a guard cannot see: races between the threads of one program.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stgen.testing.interpreter import Patches, interpreting, tensors

ORIGIN = "stgen.origin"  # attribute of pointers: the argument they come from
KEEPS_ORIGIN = ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "gather")
MANY = -1  # in place of a program's number: more than one program
CLASHES = {  # what a program does, and what of another program that must not precede it in one launch
    "load": ("store", "atomic"),
    "store": ("load", "store", "atomic"),
    "atomic": ("load", "store"),
}


class GuardError(AssertionError):
    """A kernel did what it must not, whatever its result."""


@contextlib.contextmanager
def guard(bounds: bool = True, races: bool = True, shuffle: int | None = None, int32: bool = True) -> Iterator[None]:
    """Watch the launches inside; does nothing where kernels do not run in the interpreter. Guards may be nested.

    Args:
        bounds: every active lane should touch an element of the argument that its pointer was made from; the gaps of
            strided views are no elements.
        races: no program of a launch should load, store or update what another one stores, or store what it loads or
            updates; no two lanes should store different values at one address.
        shuffle: a seed; programs run in a random order (never the usual one), on which results should not depend.
        int32: no sum, difference or product of int32 should overflow.
    Raises:
        GuardError: at the first fault, naming the program and the argument.
    """
    if not interpreting():
        yield
        return
    import triton.runtime.interpreter as interpreter

    patches = Patches()
    _watch_launches(patches, interpreter, watch := _Watch(bounds, races))
    if bounds:
        _trace_pointers(patches, interpreter, watch)
    if bounds or races:
        _watch_memory(patches, interpreter, watch)
    if shuffle is not None:
        _shuffle_programs(patches, interpreter, shuffle)
    if int32:
        _watch_int32(patches, interpreter)
    try:
        yield
    finally:
        patches.undo()


def far_apart(tensor: Tensor, stride: int = 2**30) -> Tensor:
    """A copy whose slices along the first axis lie `stride` elements apart, so that the offset of the last is no int32.

    The stride itself is one: a larger one is passed as int64, and hides kernels that multiply in int32. The memory
    between slices is reserved, never touched; not for use inside `poisoned()`, which would fill it.

    Raises:
        ValueError: the stride is no int32, or there are too few slices, of which the usual stride takes three.
    """
    last = (len(tensor) - 1) * stride
    if not stride < 2**31 <= last:
        raise ValueError(f"{len(tensor)} slices {stride} apart: the stride should fit int32 and {last} should not")
    room = torch.empty(last + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    view = room.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride()))
    return view.copy_(tensor)


# ------------------------------------------------------------------------------------------------ the arguments' memory


@dataclass(frozen=True)
class _View:
    """An argument: the addresses of its elements, in bytes."""

    name: str
    low: int
    high: int  # one past the last byte
    itemsize: int
    axes: tuple[tuple[int, int], ...]  # (stride, size) of each axis longer than 1, outermost first; () without gaps

    @staticmethod
    def of(name: str, tensor: Tensor) -> "_View":
        item = tensor.element_size()
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        axes = sorted(((abs(s) * item, n) for s, n in pairs if n > 1 and s), reverse=True)
        span = item
        has_gaps = overlaps = False
        for stride, size in reversed(axes):
            has_gaps, overlaps = has_gaps or stride > span, overlaps or stride < span
            span += stride * (size - 1)
        low = tensor.data_ptr()
        return _View(
            name, low, low + span if tensor.numel() else low, item, tuple(axes) if has_gaps and not overlaps else ()
        )

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which accesses of `width` bytes stay within one element, or within the extent of a view without gaps."""
        inside = (addresses >= self.low) & (addresses + width <= self.high)
        rest = addresses - self.low
        for stride, size in self.axes:
            index = rest // stride
            inside &= index < size
            rest = rest - index * stride
        return inside & (rest + width <= self.itemsize) if self.axes else inside


@dataclass
class _Extent:
    """Touching or overlapping arguments, and which programs touched which cell: 0 none, number + 1 one, or MANY."""

    low: int
    high: int
    cell: int  # bytes
    marks: dict[str, np.ndarray] = field(default_factory=dict)

    def marked(self, kind: str) -> np.ndarray:
        """The cells' programs; memory that is never touched costs none."""
        if kind not in self.marks:
            self.marks[kind] = np.zeros(-(-(self.high - self.low) // self.cell), np.int32)
        return self.marks[kind]


def _place(address: int, views: list[_View]) -> str:
    """An address in words, relative to the argument that begins before it."""
    before = [view for view in views if view.low <= address] or views[:1]
    if not before:
        return f"at address {address}; no argument is a tensor"
    return f"{(address - before[-1].low) // before[-1].itemsize} elements after the first of {before[-1].name}"


class _Watch:
    """What the programs of the present launch may touch and have touched."""

    def __init__(self, bounds: bool, races: bool):
        self.bounds, self.races = bounds, races
        self.views: list[_View] = []
        self.extents: list[_Extent] = []
        self.view_of: dict[int, _View] = {}  # by the id of the tensor

    def begin(self, arguments: list[tuple[str, Tensor]]) -> None:
        """Forget the last launch."""
        self.view_of = {id(tensor): _View.of(name, tensor) for name, tensor in arguments}
        self.views = sorted((view for view in self.view_of.values() if view.high > view.low), key=lambda view: view.low)
        self.extents = []
        for view in self.views:
            if self.extents and view.low < self.extents[-1].high:
                last = self.extents[-1]
                last.high, last.cell = max(last.high, view.high), min(last.cell, view.itemsize)
            else:
                self.extents.append(_Extent(view.low, view.high, view.itemsize))

    def access(self, kind: str, program: tuple, number: int, pointers: Any, mask: Any, value: Any = None) -> None:
        """Check one load, store or update of a tile by a program."""
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        places, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = places[active].astype(np.int64)
        if not addresses.size:
            return
        if self.bounds:
            origin = pointers.attr.get(ORIGIN)
            self._check_bounds(kind, program, addresses, width, [origin] if origin else self.views)
        if self.races:
            values = None if value is None else np.broadcast_to(value.data, places.shape)[active]
            self._check_races(kind, program, number, addresses, values)

    def _check_bounds(self, kind: str, program: tuple, addresses: np.ndarray, width: int, views: list[_View]) -> None:
        first, last = int(addresses.min()), int(addresses.max())
        if any(not v.axes and v.low <= first and last + width <= v.high for v in views):
            return
        inside = np.zeros(addresses.shape, bool)
        for view in views:
            inside |= view.holds(addresses, width)
        if not inside.all():
            wrong = addresses[~inside]
            raise GuardError(
                f"program {program}: {kind} out of bounds in {wrong.size} of {inside.size} lanes, "
                f"first {_place(int(wrong[0]), views)}"
            )

    def _check_races(
        self, kind: str, program: tuple, number: int, addresses: np.ndarray, values: np.ndarray | None
    ) -> None:
        first, last = addresses.min(), addresses.max()
        for extent in self.extents:
            if last < extent.low or extent.high <= first:
                continue
            here = (addresses >= extent.low) & (addresses < extent.high)
            cells = (addresses[here] - extent.low) // extent.cell
            if kind == "store" and values is not None:
                self._check_lanes(program, extent, cells, values[here])
            for other in CLASHES[kind]:
                marks = extent.marked(other)[cells]
                if (clash := (marks != 0) & (marks != number + 1)).any():
                    i = int(clash.argmax())
                    owner = "several programs" if marks[i] == MANY else f"program number {marks[i] - 1}"
                    place = _place(extent.low + int(cells[i]) * extent.cell, self.views)
                    raise GuardError(f"race: {kind} by program {program}, number {number}; {other} by {owner}; {place}")
            before = extent.marked(kind)[cells]
            extent.marked(kind)[cells] = np.where((before == 0) | (before == number + 1), number + 1, MANY)

    def _check_lanes(self, program: tuple, extent: _Extent, cells: np.ndarray, values: np.ndarray) -> None:
        """Lanes that store at one address should store one value."""
        winners, lanes = extent.marked("lane"), np.arange(len(cells), dtype=np.int32)
        winners[cells] = lanes
        losers = np.nonzero(winners[cells] != lanes)[0]
        if losers.size and not np.array_equal(values[losers], values[winners[cells[losers]]], equal_nan=True):
            place = _place(extent.low + int(cells[losers[0]]) * extent.cell, self.views)
            raise GuardError(f"race: two lanes of program {program} store different values, {place}")


# ------------------------------------------------------------------------------------------------ hooks


def _number(builder: Any) -> int:
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    return (x * ny + y) * nz + z


def _watch_launches(patches: Patches, interpreter: Any, watch: _Watch) -> None:
    @patches.on(interpreter.GridExecutor, "_init_args_hst")
    def begin(original, self, args, kwargs):
        args, kwargs = original(self, args, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        watch.begin([(name, tensor) for name, argument in named for tensor in tensors(argument)])
        return args, kwargs

    @patches.on(interpreter.GridExecutor, "__call__")
    def launch(original, self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, GuardError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise GuardError(f"{getattr(self.fn, '__name__', 'kernel')}: {cause}") from error


def _trace_pointers(patches: Patches, interpreter: Any, watch: _Watch) -> None:
    @patches.on(interpreter, "_implicit_cvt")
    def to_pointer(original, argument):
        converted = original(argument)
        if id(argument) in watch.view_of and hasattr(argument, "data_ptr"):
            converted.handle.attr[ORIGIN] = watch.view_of[id(argument)]
        return converted

    @patches.on(interpreter.TensorDescHandle, "materialize_pointers")
    def of_descriptor(original, self, offsets):
        pointers, mask = original(self, offsets)
        pointers.attr.update(self.base.attr)
        return pointers, mask

    for name in KEEPS_ORIGIN:
        _keep_origin(patches, interpreter.InterpreterBuilder, f"create_{name}")


def _keep_origin(patches: Patches, builder: Any, name: str) -> None:
    @patches.on(builder, name)
    def derive(original, self, *args, **options):
        derived = original(self, *args, **options)
        for arg in args:
            if origin := getattr(arg, "attr", {}).get(ORIGIN):
                derived.attr[ORIGIN] = origin
        return derived


def _watch_memory(patches: Patches, interpreter: Any, watch: _Watch) -> None:
    builder = interpreter.InterpreterBuilder

    @patches.on(builder, "create_masked_load")
    def load(original, self, pointers, mask, *rest, **options):
        watch.access("load", self.grid_idx, _number(self), pointers, mask)
        return original(self, pointers, mask, *rest, **options)

    @patches.on(builder, "create_masked_store")
    def store(original, self, pointers, value, mask, *rest, **options):
        watch.access("store", self.grid_idx, _number(self), pointers, mask, value)
        return original(self, pointers, value, mask, *rest, **options)

    @patches.on(builder, "create_atomic_rmw")
    def update(original, self, operation, pointers, value, mask, *rest):
        watch.access("atomic", self.grid_idx, _number(self), pointers, mask)
        return original(self, operation, pointers, value, mask, *rest)

    @patches.on(builder, "create_atomic_cas")
    def exchange(original, self, pointers, compare, *rest):
        every = interpreter.TensorHandle(np.ones(pointers.data.shape, bool), interpreter.tl.int1)
        watch.access("atomic", self.grid_idx, _number(self), pointers, every)
        return original(self, pointers, compare, *rest)


def _shuffle_programs(patches: Patches, interpreter: Any, seed: int) -> None:
    orders: dict[int, np.ndarray] = {}  # by the number of programs

    def order(count: int) -> np.ndarray:
        drawn, usual = np.random.default_rng(seed).permutation(count), np.arange(count)
        return usual[::-1] if (drawn == usual).all() else drawn

    @patches.on(interpreter.InterpreterBuilder, "set_grid_idx")
    def enter(original, self, x, y, z):
        nx, ny, nz = self.grid_dim
        count = nx * ny * nz
        if count not in orders:
            orders[count] = order(count)
        place = int(orders[count][(x * ny + y) * nz + z])
        return original(self, place // (ny * nz), place // nz % ny, place % nz)


def _watch_int32(patches: Patches, interpreter: Any) -> None:
    @patches.on(interpreter.InterpreterBuilder, "binary_op")
    def arithmetic(original, self, left, right, operation):
        if operation in (np.add, np.subtract, np.multiply) and left.data.dtype == right.data.dtype == np.int32:
            exact = operation(left.data.astype(np.int64), right.data.astype(np.int64))
            if exact.size and max(int(exact.max()), -1 - int(exact.min())) > 2**31 - 1:
                raise GuardError(
                    f"program {self.grid_idx}: int32 {operation.__name__} overflows, largest result {int(exact.max())}; "
                    f"make one operand int64"
                )
        return original(self, left, right, operation)

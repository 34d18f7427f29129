"""Mend Triton's interpreter (TRITON_INTERPRET=1) where it computes something else than a GPU.

- bfloat16: held as the bit pattern in uint16, on which sums and products are nonsense. Here: float32, rounded to
  nearest even after every operation; the bits exist only in memory.
- `tl.dot` of float32 with precision "tf32", the default: exact. Here: operands are rounded to TF32's 10 bits.
- Triton 3.6 with NumPy 2.4: bounds of a `range` that are known at run time only raise. Here: they are read as scalars.
- Every launch copies all CPU arguments onto themselves, whole storages. Here: it does not.

All of it is private to triton. A name that is missing stops with an error; results are checked in
tests/kernels/test_harness.py.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

TESTED = "3.6 and 3.9"  # versions of triton whose private names are known here

BF16_DROPPED, TF32_DROPPED = 16, 13  # low bits of a float32 that the format has not


def interpreting() -> bool:
    """Whether kernels of this process run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class Patches:
    """Attributes of other people's classes and modules that are replaced, and the way back."""

    def __init__(self):
        self._originals: list[tuple[Any, str, Any]] = []

    def on(self, owner: Any, name: str) -> Callable[[Callable], None]:
        """Decorator: calls of owner.name go to the function, with the original as an additional first argument."""
        original = getattr(owner, name, None)
        if original is None:
            import triton

            raise RuntimeError(
                f"triton {triton.__version__} has no {owner.__name__}.{name}, which stgen.testing replaces; "
                f"it knows triton {TESTED}"
            )

        def put(function: Callable) -> None:
            @functools.wraps(original)
            def replacement(*args, **kwargs):
                return function(original, *args, **kwargs)

            self._originals.append((owner, name, original))
            setattr(owner, name, replacement)

        return put

    def undo(self) -> None:
        """Put all originals back, the last one replaced first."""
        while self._originals:
            setattr(*self._originals.pop())


_repairs = Patches()


def repair() -> None:
    """Mend the interpreter for the rest of the process; nothing without TRITON_INTERPRET=1 or the second time."""
    if not interpreting() or _repairs._originals:
        return
    import triton.runtime.interpreter as interpreter

    _hold_bf16_as_float(_repairs, interpreter)
    _move_bf16_as_bits(_repairs, interpreter)
    _round_dots_to_tf32(_repairs, interpreter)
    _launch_quietly(_repairs, interpreter)


# ------------------------------------------------------------------------------------------------ numbers


def round_off(x: np.ndarray, dropped: int) -> np.ndarray:
    """float32 `x` to the nearest value whose low `dropped` bits are 0, ties to even; infinities and NaN stay."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    rounded = (bits + half + ((bits >> np.uint32(dropped)) & np.uint32(1))) & np.uint32(0x100000000 - (1 << dropped))
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32)).reshape(np.shape(x))


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """uint16 patterns of float32 values that bfloat16 has."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).reshape(np.shape(x))


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 patterns in uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bf16(dtype: Any) -> bool:
    """Whether values (not pointers) of a triton type are bfloat16."""
    return getattr(dtype, "scalar", dtype).name == "bf16"


# ------------------------------------------------------------------------------------------------ repairs


def _hold_bf16_as_float(patches: Patches, interpreter: Any) -> None:
    """Values of bfloat16 are float32 arrays; every new one is rounded."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    element = lambda dtype: getattr(dtype, "element_ty", dtype) if dtype.is_block() else dtype  # noqa: E731

    @patches.on(interpreter, "_get_np_dtype")
    def numpy_dtype(original, dtype):
        return np.dtype(np.float32) if _is_bf16(element(dtype)) else original(dtype)

    @patches.on(interpreter, "_validate_np_data_size")
    def fits(original, array, dtype):
        return (_is_bf16(dtype) and array.itemsize <= 4) or original(array, dtype)

    @patches.on(handle, "__post_init__")
    def new_handle(original, self):
        if _is_bf16(self.dtype) and self.data.dtype != np.bool_:  # comparisons come as bool
            self.data = round_off(self.data, BF16_DROPPED)
        elif self.dtype.name in ("fp16", "fp32") and self.data.dtype.kind == "f":
            # NumPy widens arrays where Triton does not, as in fp16 array x fp32 scalar.
            exact = np.float16 if self.dtype.name == "fp16" else np.float32
            self.data = self.data.astype(exact) if self.data.dtype.itemsize > np.dtype(exact).itemsize else self.data
        original(self)

    @patches.on(builder, "cast_impl")
    def cast(original, self, source, dtype):
        if _is_bf16(source.dtype) or _is_bf16(dtype):
            return handle(source.data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)
        return original(self, source, dtype)

    @patches.on(builder, "create_fp_to_fp")
    def convert(original, self, source, dtype, rounding):
        if not (_is_bf16(source.dtype) or _is_bf16(dtype)):
            return original(self, source, dtype, rounding)
        float32 = interpreter.tl.float32
        if _is_bf16(source.dtype):  # widening it to float32 is exact
            source = handle(source.data, float32)
        if dtype.scalar.primitive_bitwidth == 8:
            return original(self, source, dtype, rounding)
        if source.dtype.primitive_bitwidth == 8:
            source = original(self, source, float32, rounding)
        return handle(source.data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)

    @patches.on(builder, "create_bitcast")
    def bitcast(original, self, source, dtype):
        if _is_bf16(source.dtype) == _is_bf16(dtype):
            return original(self, source, dtype)
        if _is_bf16(source.dtype):
            return handle(bf16_bits(source.data).view(interpreter._get_np_dtype(dtype)), dtype.scalar)
        return handle(bf16_values(source.data.view(np.uint16)), dtype.scalar)


def _move_bf16_as_bits(patches: Patches, interpreter: Any) -> None:
    """Loads, stores and atomics translate between float32 values and bits in memory."""
    builder, handle, memory = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._interpreter
    bfloat16 = interpreter.tl.bfloat16
    update = {"FADD": np.add, "MAX": np.maximum, "MIN": np.minimum, "XCHG": lambda _, new: new}

    def read(pointers: np.ndarray, mask: np.ndarray, other: np.ndarray) -> np.ndarray:
        return bf16_values(memory.load(pointers, mask, other, np.dtype(np.uint16)))

    @patches.on(builder, "create_masked_load")
    def load(original, self, pointers, mask, other, *rest, **options):
        if pointers.get_element_ty() != bfloat16:
            return original(self, pointers, mask, other, *rest, **options)
        shape = pointers.data.shape
        blank = np.zeros(shape, np.uint16) if other is None else bf16_bits(np.broadcast_to(other.data, shape))
        return handle(read(pointers.data, mask.data, blank), bfloat16)

    @patches.on(builder, "create_masked_store")
    def store(original, self, pointers, value, mask, *rest, **options):
        if pointers.get_element_ty() != bfloat16:
            return original(self, pointers, value, mask, *rest, **options)
        return memory.store(pointers.data, bf16_bits(value.data), mask.data)

    @patches.on(builder, "create_atomic_rmw")
    def atomic(original, self, operation, pointers, value, mask, *rest):
        if pointers.get_element_ty() != bfloat16:
            return original(self, operation, pointers, value, mask, *rest)
        combine = update[getattr(operation, "name", str(operation)).rpartition(".")[2]]
        places, values, active = np.broadcast_arrays(pointers.data, value.data, mask.data)
        old = np.zeros(places.shape, np.float32)
        for i in zip(*np.nonzero(active), strict=True):  # one by one: lanes may share an address
            place, one = places[i].reshape(1), np.ones(1, bool)
            old[i] = read(place, one, np.zeros(1, np.uint16))[0]
            new = round_off(np.float32(combine(old[i], values[i])).reshape(1), BF16_DROPPED)
            memory.store(place, bf16_bits(new), one)
        return handle(old, bfloat16)


def _round_dots_to_tf32(patches: Patches, interpreter: Any) -> None:
    @patches.on(interpreter.InterpreterBuilder, "create_dot")
    def dot(original, self, a, b, accumulator, precision, *rest):
        if a.dtype.name == "fp32" and getattr(precision, "name", str(precision)).rpartition(".")[2] == "TF32":
            a, b = (interpreter.TensorHandle(round_off(x.data, TF32_DROPPED), x.dtype) for x in (a, b))
        return original(self, a, b, accumulator, precision, *rest)


def _launch_quietly(patches: Patches, interpreter: Any) -> None:
    """Launches that warn of nothing a GPU does in silence, copy no CPU memory, and read scalars as such."""

    @patches.on(interpreter.GridExecutor, "__call__")
    def launch(original, self, *args, **kwargs):
        with np.errstate(all="ignore"):  # -inf - -inf, 2^-inf, 0 / 0
            return original(self, *args, **kwargs)

    @patches.on(interpreter.GridExecutor, "_restore_args_dev")
    def restore(original, self, args, args_host, kwargs, kwargs_host):
        given = tensors((args, kwargs))
        if any(tensor.device.type != "cpu" for tensor in given):
            original(self, args, args_host, kwargs, kwargs_host)

    @patches.on(interpreter, "_patch_lang_tensor")
    def scalars(original, tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        scope.set_attr(tensor, "__bool__", lambda self: self.handle.data.size != 1 or bool(self.handle.data.item()))


def tensors(argument: Any) -> list[Any]:
    """The tensors in a kernel's arguments, also those of tuples, dicts and tensor descriptors."""
    if isinstance(argument, dict):
        argument = tuple(argument.values())
    if isinstance(argument, list | tuple):
        return [tensor for part in argument for tensor in tensors(part)]
    if hasattr(argument, "base") and hasattr(argument, "block_shape"):
        return [argument.base]
    return [argument] if hasattr(argument, "data_ptr") and hasattr(argument, "stride") else []

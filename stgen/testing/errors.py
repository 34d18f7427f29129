"""The rule for errors of a kernel: about as exact as PyTorch's own operation in the same dtype.

Both are compared with float64 results of the already rounded inputs. The relative rms error tells a wrong scale or a
coarse accumulator (a fixed tolerance does not), the largest error tells a single bad row (the rms does not).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from stgen.testing.interpreter import Patches

# Relative rms errors that always pass: for half types 1.5 x that of rounding the exact result once.
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 3.2e-4, torch.bfloat16: 2.5e-3}
ZERO = 1e-6  # what passes for 0: float64 itself has noise where terms cancel


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in Euclidean norms."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm())


def assert_as_exact(got: Tensor, exact: Tensor, baseline: Tensor, factor: float = 1.5, name: str = "") -> None:
    """Assert that a kernel's result is as near to the exact one as a trusted result of the same dtype.

    Where `exact` is infinite (the LSE of a row without keys) `got` should be the same; everywhere else it should be
    finite, its relative rms error at most `factor` times the baseline's and its largest error at most twice the
    baseline's and one rounding of the largest exact value. Errors below `FLOOR` and `ZERO` pass; a result that is zero
    all over has no relative error.

    Args:
        got: [...] result in the dtype under test.
        exact: [...] float64.
        baseline: [...] result of a trusted implementation in the dtype under test.
    Raises:
        AssertionError: with the numbers that were compared.
    """
    what = name or "result"
    assert got.shape == exact.shape == baseline.shape, (
        f"{what}: shapes {list(got.shape)}, exact {list(exact.shape)}, baseline {list(baseline.shape)}"
    )
    assert exact.dtype == torch.float64, f"{what}: exact should be float64, is {exact.dtype}"
    finite = exact.isfinite()
    bad = int(((got.double() != exact) & ~finite | ~got.isfinite() & finite).sum())
    assert not bad, f"{what}: {bad} of {got.numel()} elements are NaN, infinite, or finite where exact is not"
    if not finite.any():
        return
    got, exact, baseline = got[finite], exact[finite], baseline[finite]
    if exact.square().mean().sqrt() > ZERO:
        _assert_rms(got, exact, baseline, factor, what)
    _assert_largest(got, exact, baseline, what)


def _assert_rms(got: Tensor, exact: Tensor, baseline: Tensor, factor: float, what: str) -> None:
    error, trusted = relative_rms(got, exact), relative_rms(baseline, exact)
    allowed = max(factor * trusted, FLOOR[got.dtype])
    assert error <= allowed, (
        f"{what}: relative rms error {error:.3g} > {allowed:.3g} allowed; "
        f"baseline's {trusted:.3g} x {factor}, floor {FLOOR[got.dtype]:.3g}"
    )


def _assert_largest(got: Tensor, exact: Tensor, baseline: Tensor, what: str) -> None:
    errors = (got.double() - exact).abs()
    largest, trusted = float(errors.max()), float((baseline.double() - exact).abs().max())
    top = float(exact.abs().max())
    rounding = torch.finfo(got.dtype).eps * top
    allowed = 2 * trusted + max(rounding, FLOOR[torch.float32] * top) + ZERO
    assert largest <= allowed, (
        f"{what}: largest error {largest:.3g} at {int(errors.argmax())} of {errors.numel()} > {allowed:.3g} allowed; "
        f"baseline's {trusted:.3g} x 2, one rounding {rounding:.3g} of {top:.3g}"
    )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialised holds NaN inside, so that what a kernel leaves unwritten shows.

    Reaches torch.empty, empty_like, empty_strided, Tensor.new_empty and new_empty_strided, of floating dtypes.
    """
    patches = Patches()
    creators = [(torch, n) for n in ("empty", "empty_like", "empty_strided")]
    creators += [(Tensor, n) for n in ("new_empty", "new_empty_strided")]
    for owner, name in creators:

        @patches.on(owner, name)
        def fill(original, *args, **kwargs):
            made = original(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

    try:
        yield
    finally:
        patches.undo()

"""Kernels run in Triton's interpreter here, mended, and no test of them may touch memory that is not its own."""

import pytest

from stgen.testing.guard import guard
from stgen.testing.interpreter import repair

repair()


@pytest.fixture(autouse=True)
def in_bounds():
    """An access out of bounds fails a test and does not take the process down; mutants have many."""
    with guard(races=False, int32=False):
        yield

"""Seeded faults: copies of a kernel's module with one edit each, which a check must notice."""

import importlib.util
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_folder = tempfile.TemporaryDirectory(prefix="stgen-mutants-")  # triton reads sources late, so until the process ends
_numbers = itertools.count()


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which occurs once in a kernel's module, becomes `new`, and `check(module)` should fail."""

    name: str
    old: str
    new: str
    check: Callable[[ModuleType], None]


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    """A fresh copy of a module with one edit of its source; the module itself stays as it is.

    Raises:
        ValueError: `old` does not occur exactly once, or is `new`.
    """
    source = inspect.getsource(module)
    if (count := source.count(old)) != 1 or old == new:
        reason = "is what it would be replaced by" if old == new else f"occurs {count} times, should occur once"
        raise ValueError(f"{module.__name__}: {old!r} {reason}")
    name = f"{module.__name__.rpartition('.')[2]}_mutant_{next(_numbers)}"
    path = Path(_folder.name) / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy  # dataclasses look their module up
    spec.loader.exec_module(copy)
    return copy


def assert_killed(mutant: Mutant, module: ModuleType) -> None:
    """Assert that the mutant's check fails on the mutated module, and fails by an assertion."""
    copy = mutated(module, mutant.old, mutant.new)
    try:
        mutant.check(copy)
    except AssertionError:
        return
    except Exception as error:
        raise AssertionError(f"mutant {mutant.name!r} died of {error!r}, not by an assertion") from error
    raise AssertionError(f"mutant {mutant.name!r} survived {getattr(mutant.check, '__name__', mutant.check)}")

"""All patterns, found by their files, and the ways to join them.

A pattern is written as its bare name, as a mapping with its keys, as a list (a union), or as {all: [...]} (an
intersection). This package is read when a config loads, without torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field

from stgen.attention.pattern import Chosen, Fixed, Pattern, Remade


def _found() -> dict[str, type[Pattern]]:
    """Every pattern class of this package by its kind."""
    classes: dict[str, type[Pattern]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        classes |= {c.model_fields["kind"].default: c for c in own if issubclass(c, Pattern)}
    return classes


class AnyOf(Pattern):
    kind: Literal["any"] = "any"
    """A union: a key is attended where any of the patterns allows it. Written as a list."""
    any: Annotated[list[PatternKeys], Field(min_length=1)]
    """The patterns to unite."""


class AllOf(Pattern):
    kind: Literal["all"] = "all"
    """An intersection; patterns chosen from the data choose among the keys that the fixed ones allow."""
    all: Annotated[list[PatternKeys], Field(min_length=1)]
    """The patterns that must all allow a key."""


KINDS = {**_found(), "any": AnyOf, "all": AllOf}

if TYPE_CHECKING:
    PatternKeys = Pattern
else:
    PatternKeys = Annotated[Union[tuple(KINDS.values())], Field(discriminator="kind")]  # noqa: UP007
    for _joined in (AnyOf, AllOf):
        _joined.model_rebuild()


def leaves(pattern: Pattern) -> list[Pattern]:
    """The patterns that a union or intersection is made of; a single one is its own."""
    match pattern:
        case AnyOf(any=parts) | AllOf(all=parts):
            return [leaf for part in parts for leaf in leaves(part)]
    return [pattern]


def is_fixed(pattern: Pattern) -> bool:
    """Whether the support depends on positions alone."""
    return all(isinstance(leaf, Fixed) for leaf in leaves(pattern))


__all__ = ["KINDS", "AllOf", "AnyOf", "Chosen", "Fixed", "Pattern", "PatternKeys", "Remade", "is_fixed", "leaves"]

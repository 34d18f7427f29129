"""Read a config strictly: YAML 1.2 files, `extends`, `a.b=c` overrides, and every fault told in one line.

This module knows no key of the tree; the schema it is given decides. Two conventions are shared with it: the members
of a union of sections are told apart by their key `kind`, and a list may stand for the member of kind `any`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from stgen.config.faults import Schema, validate
from stgen.config.help import help_text
from stgen.config.merging import complete, merge
from stgen.config.node import ConfigError, Node, one_line, plain_value
from stgen.config.parsing import parsed
from stgen.config.reading import read_file, read_override
from stgen.config.writing import differences, dump

__all__ = ["ConfigError", "differences", "dump", "help_text", "load", "one_line", "parse", "plain"]


def load(path: str | Path, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """The config in the file `path` with `overrides` (`a.b=c`) applied, checked against `schema`.

    Raises ConfigError with one line per fault, whatever the files and overrides contain.
    """
    root = FieldInfo.from_annotation(schema)
    errors: list[str] = []
    base = layer = Node({}, str(path))
    try:
        base = read_file(Path(path), root)
    except ConfigError as error:
        errors += error.errors
    for override in overrides:
        try:
            layer = merge(layer, read_override(override), root, settled=False)  # together one layer, in any order
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(errors)
    tree = merge(base, layer, root)
    tree.origin = base.origin
    complete(tree, root)
    return validate(tree, root, schema)


def parse(text: str, schema: type[Schema], where: str) -> Schema:
    """The section in a YAML text, checked against `schema`; `where` is what errors call the text. Raises ConfigError."""
    root = FieldInfo.from_annotation(schema)
    tree = parsed(text, "", lambda line: where)
    complete(tree, root)
    return validate(tree, root, schema)


def plain(text: str, where: str) -> Any:
    """The plain values in a YAML text; `where` is what errors call it. Raises ConfigError."""
    return plain_value(parsed(text, "", lambda line: where))

"""Config files with what they extend, and overrides."""

import os
import re
import stat
from pathlib import Path

from pydantic.fields import FieldInfo

from stgen.config.merging import merge
from stgen.config.node import Node, refuse, short, show
from stgen.config.parsing import parsed

EXTENDS = "extends"
MAX_BYTES = 256 * 1024  # of a file: a hundred times any real config, and read in seconds


def read_file(path: Path, root: FieldInfo, chain: tuple[Path, ...] = (), extender: str | None = None) -> Node:
    """The mapping in a file, merged over those that it extends; `chain` holds the files that led to it."""
    extended = f"extended by {extender}" if extender else None
    text = _text(path, extended)
    if path.resolve() in [p.resolve() for p in chain]:
        refuse(EXTENDS, "the files extend each other: " + " -> ".join(map(str, (*chain, path))), extender)
    own = parsed(text, "", lambda line: f"{path}:{line}")
    if own.data is None:
        own = Node({}, str(path))
    if not isinstance(own.data, dict):
        refuse("", f"a config is a mapping of keys, got {show(own)}", own.origin)
    own.origin = str(path)
    base = Node({}, str(path))
    for parent in _parents(own):
        parent_path = Path(os.path.normpath(path.parent / parent.data))
        base = merge(base, read_file(parent_path, root, (*chain, path), parent.origin), root)
    return merge(base, own, root)


def _parents(own: Node) -> list[Node]:
    """Takes `extends` out of a file's mapping: the names of the files it builds on."""
    extends = own.data.pop(EXTENDS, None)
    if extends is None:
        return []
    parents = extends.data if isinstance(extends.data, list) else [extends]
    if not all(isinstance(parent.data, str) for parent in parents):
        refuse(EXTENDS, f"should be a file name or a list of file names, got {show(extends)}", extends.origin)
    return parents


def _text(path: Path, extended: str | None) -> str:
    try:
        _check_file(path, extended)
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        refuse("", f"the file is not UTF-8 text (byte {raw[error.start]:#x})", f"{path}:{line}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        refuse(str(path), str(reason).lower(), extended)
    if directive := re.search(r"^%", text, re.MULTILINE):  # `%YAML 1.1` would bring back its booleans
        line = text[: directive.start()].count("\n") + 1
        refuse("", "YAML directives (lines that begin with %) are not allowed", f"{path}:{line}")
    return text


def _check_file(path: Path, extended: str | None) -> None:
    """Refuse, before it is opened, what would never end (a pipe, a device) or take minutes to read."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "Is a directory")
    if not stat.S_ISREG(status.st_mode):
        refuse(str(path), "not a regular file; a config is read from a file on disk", extended)
    if status.st_size > MAX_BYTES:
        refuse(str(path), f"{status.st_size} bytes; a config has at most {MAX_BYTES}", extended)


def read_override(override: str) -> Node:
    """`a.b=c` as the mapping {a: {b: c}}."""
    key, equals, text = override.partition("=")
    steps = key.split(".")
    if not equals or not all(step.strip() == step != "" for step in steps):
        refuse("", f"override {short(repr(override))} is not of the form section.key=value", None)
    origin = f"override {short(override)}"
    node = parsed(text, key, lambda line: origin)
    if isinstance(node.data, int | float) or text == "":
        node.text = text
    for step in reversed(steps):
        node = Node({step: node}, origin)
    return node

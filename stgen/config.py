"""Read a config strictly: YAML 1.2 files, `extends`, `a.b=c` overrides, and every fault told in one line.

This module knows no key of the tree; the schema it is given decides. Two conventions are shared with it: the members
of a union of sections are told apart by their key `kind`, and a list may stand for the member of kind `any`.
"""

import difflib
import json
import os
import re
import stat
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

KIND = "kind"
ANY = "any"
EXTENDS = "extends"
TAG = "tag:yaml.org,2002:"  # begins the name of every type that YAML knows
MAX_DEPTH = 50  # far beyond any real config, well below the limits of Python and of the JSON parser
MAX_SHOWN = 80  # characters of a value, key or override that a message repeats
MAX_BYTES = 256 * 1024  # of a file: a hundred times any real config, and read in seconds
MAX_TOLD = 50  # faults told one by one

_ABSENT = object()
Schema = TypeVar("Schema", bound=BaseModel)


class ConfigError(Exception):
    """A config that cannot be used. `errors` holds one line per fault, up to 50; `str()` joins them."""

    def __init__(self, errors: list[str]):
        if len(errors) > MAX_TOLD:
            errors = [*errors[:MAX_TOLD], f"config error: … and {len(errors) - MAX_TOLD} more"]
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass
class Node:
    """A value of the config and where it was written."""

    data: Any  # dict[str, Node], list[Node] or a scalar
    origin: str
    text: str | None = None  # the number as typed, for overrides: quotes for it hardly survive a shell
    spelled: bool = True  # whether the user wrote the key above it; shorthand leaves some out


def load(path: str | Path, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """The config in the file `path` with `overrides` (`a.b=c`) applied, checked against `schema`.

    Raises ConfigError with one line per fault, whatever the files and overrides contain.
    """
    root = FieldInfo.from_annotation(schema)
    errors: list[str] = []
    base = layer = Node({}, str(path))
    try:
        base = _read_file(Path(path), root)
    except ConfigError as error:
        errors += error.errors
    for override in overrides:
        try:
            layer = _merge(layer, _read_override(override), root, settled=False)  # together one layer, in any order
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(errors)
    tree = _merge(base, layer, root)
    tree.origin = base.origin
    _complete(tree, root)
    return _validate(tree, root, schema)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_file(path: Path, root: FieldInfo, chain: tuple[Path, ...] = (), extender: str | None = None) -> Node:
    """The mapping in a file, merged over those that it extends; `chain` holds the files that led to it."""
    extended = f"extended by {extender}" if extender else None
    text = _text(path, extended)
    if path.resolve() in [p.resolve() for p in chain]:
        _refuse(EXTENDS, "the files extend each other: " + " -> ".join(map(str, (*chain, path))), extender)
    own = _parse(text, "", lambda line: f"{path}:{line}")
    if own.data is None:
        own = Node({}, str(path))
    if not isinstance(own.data, dict):
        _refuse("", f"a config is a mapping of keys, got {_show(own)}", own.origin)
    own.origin = str(path)
    base = Node({}, str(path))
    for parent in _parents(own):
        parent_path = Path(os.path.normpath(path.parent / parent.data))
        base = _merge(base, _read_file(parent_path, root, (*chain, path), parent.origin), root)
    return _merge(base, own, root)


def _parents(own: Node) -> list[Node]:
    """Takes `extends` out of a file's mapping: the names of the files it builds on."""
    extends = own.data.pop(EXTENDS, None)
    if extends is None:
        return []
    parents = extends.data if isinstance(extends.data, list) else [extends]
    if not all(isinstance(parent.data, str) for parent in parents):
        _refuse(EXTENDS, f"should be a file name or a list of file names, got {_show(extends)}", extends.origin)
    return parents


def _text(path: Path, extended: str | None) -> str:
    try:
        _check_file(path, extended)
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        _refuse("", f"the file is not UTF-8 text (byte {raw[error.start]:#x})", f"{path}:{line}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        _refuse(str(path), str(reason).lower(), extended)
    if directive := re.search(r"^%", text, re.MULTILINE):  # `%YAML 1.1` would bring back its booleans
        line = text[: directive.start()].count("\n") + 1
        _refuse("", "YAML directives (lines that begin with %) are not allowed", f"{path}:{line}")
    return text


def _check_file(path: Path, extended: str | None) -> None:
    """Refuse, before it is opened, what would never end (a pipe, a device) or take minutes to read."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "Is a directory")
    if not stat.S_ISREG(status.st_mode):
        _refuse(str(path), "not a regular file; a config is read from a file on disk", extended)
    if status.st_size > MAX_BYTES:
        _refuse(str(path), f"{status.st_size} bytes; a config has at most {MAX_BYTES}", extended)


def _read_override(override: str) -> Node:
    """`a.b=c` as the mapping {a: {b: c}}."""
    key, equals, text = override.partition("=")
    steps = key.split(".")
    if not equals or not all(step.strip() == step != "" for step in steps):
        _refuse("", f"override {_short(repr(override))} is not of the form section.key=value", None)
    origin = f"override {_short(override)}"
    node = _parse(text, key, lambda line: origin)
    if isinstance(node.data, int | float) or text == "":
        node.text = text
    for step in reversed(steps):
        node = Node({step: node}, origin)
    return node


def _parse(text: str, key: str, origin: Callable[[int], str]) -> Node:
    """The value that a YAML text stands for; `origin` names a line of it, `key` the place it will have."""
    errors: list[str] = []
    try:
        composed = YAML(typ="safe", pure=True).compose(text)
        node = _build(composed, (key,) if key else (), origin, errors) if composed else Node(None, origin(1))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not valid YAML: {error.problem or error.context}{_remedy(error.problem or '')}"
        _refuse(key, message, origin(mark.line + 1 if mark else 1))
    except YAMLError as error:
        _refuse(key, f"not valid YAML: {str(error).splitlines()[0]}", origin(1))
    except RecursionError:
        _refuse(key, "nested too deep", origin(1))
    if errors:
        raise ConfigError(errors)
    return node


def _remedy(problem: str) -> str:
    """What to write instead, for the faults of YAML that are made most often."""
    if r"'\t'" in problem:
        return "; indent with spaces"
    if "cannot start any token" in problem:
        return "; put the value in quotes"
    if "mapping values are not allowed" in problem:
        return "; put a value that holds ': ' in quotes, and a nested mapping on lines of its own or in { }"
    if "did not find expected" in problem or "expected <block end>" in problem:
        return "; the keys of a mapping begin in one column"
    return ""


def _build(node: Any, path: tuple[str, ...], origin: Callable[[int], str], errors: list[str], line: int = 1) -> Node:
    """A composed YAML node as Nodes. What YAML allows but a config should not hold is added to `errors`."""

    def refuse(message: str) -> None:
        errors.append(_line(".".join(path), message, origin(node.start_mark.line + 1)))

    built = Node(None, origin(line))
    if node.anchor:
        refuse("anchors and aliases (& and *) are not allowed; write the value out, or use extends")
    elif len(path) > MAX_DEPTH:
        refuse("nested too deep")
    elif isinstance(node, MappingNode) and node.tag == f"{TAG}map":
        built.data = _build_mapping(node, path, origin, errors)
    elif isinstance(node, SequenceNode) and node.tag == f"{TAG}seq":
        items = enumerate(node.value)
        built.data = [_build(v, (*path, str(i)), origin, errors, v.start_mark.line + 1) for i, v in items]
    elif isinstance(node, ScalarNode):
        try:
            built.data = _scalar(node)
        except OverflowError:
            refuse(f"{_short(node.value)} is beyond 2^63, the largest whole number that is read")
        except ValueError:
            refuse(f"{_short(repr(node.value))} cannot be read as a value of type {node.tag.removeprefix(TAG)}")
    else:
        refuse(f"the tag {_short(str(node.tag))} is not allowed")
    return built


def _build_mapping(
    node: MappingNode, path: tuple[str, ...], origin: Callable[[int], str], errors: list[str]
) -> dict[str, Node]:
    built: dict[str, Node] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == f"{TAG}merge":
            errors.append(_line(".".join(path), "merge keys (<<) are not allowed; use extends", origin(line)))
        elif (key := _key(key_node)) is None:
            shown = _short(key_node.value) or "none" if isinstance(key_node, ScalarNode) else "a list or mapping"
            message = f"keys are plain or quoted strings, got {shown}"
            errors.append(_line(".".join(path), message, origin(line)))
        elif key in built:
            errors.append(_line(".".join((*path, key)), "the key is given twice", origin(line)))
        else:
            built[key] = _build(value_node, (*path, key), origin, errors, line)
    return built


def _key(node: Any) -> str | None:
    """A mapping's key, if it is a string."""
    try:
        key = _scalar(node) if isinstance(node, ScalarNode) and not node.anchor else None
    except (ValueError, OverflowError):
        return None
    return key if isinstance(key, str) else None


def _scalar(node: ScalarNode) -> str | int | float | bool | None:
    """A scalar by YAML 1.2.

    Raises ValueError for a tag beside those of JSON and for a text its tag does not fit, OverflowError beyond 64 bits.
    """
    text, digits = node.value, node.value.replace("_", "").lower()
    match node.tag.removeprefix(TAG):
        case "null":
            return None
        case "bool":
            return ("false", "true").index(digits) == 1
        case "int":
            if len(digits) > 70 or abs(whole := int(digits, 0 if re.match(r"[-+]?0[xob]", digits) else 10)) >= 2**63:
                raise OverflowError
            return whole
        case "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", digits))
        case "str" | "timestamp" | "value" | "merge":  # ruamel's names for texts such as 2024-01-01 and =
            text.encode()  # a lone surrogate, from "\ud800" or a damaged argument, is a ValueError
            return text
    raise ValueError(f"tag {node.tag}")


# --- merging ---------------------------------------------------------------------------------------------------------


def _merge(base: Node, layer: Node, field: FieldInfo | None, settled: bool = True) -> Node:
    """`layer` over `base`: mappings key by key, anything else replaced.

    A mapping that chooses another member of a union replaces the base's: their keys have nothing in common. A base
    that names no kind has the default one, unless it is not yet `settled`.
    """
    for node in (base, layer):
        _spell_out(node, field)
    if not (isinstance(base.data, dict) and isinstance(layer.data, dict)):
        return layer
    if (
        field
        and KIND in layer.data
        and (settled or KIND in base.data)
        and _section(field, base.data) not in (None, _section(field, layer.data))
    ):
        return layer
    merged = base.data | layer.data
    for key in base.data.keys() & layer.data.keys():
        merged[key] = _merge(base.data[key], layer.data[key], _child(field, merged, key), settled)
    return Node(merged, layer.origin)


def _spell_out(node: Node, field: FieldInfo | None) -> None:
    """Writes a member of a union as a mapping with its kind, where it was written short.

    `full` stands for {kind: full}, a list for {kind: any, any: [...]}, and a kind's namesake alone, as in {all: [...]},
    for {kind: all, all: [...]}.
    """
    if field is None or len(_sections(field)) < 2:
        return
    namesakes = _namesakes(field)
    match node.data:
        case str(kind) if not _plain_variants(field):
            node.data = {KIND: Node(kind, node.origin, spelled=False)}
        case list(items) if ANY in namesakes:
            node.data = {KIND: Node(ANY, node.origin), ANY: Node(items, node.origin, spelled=False)}
        case dict(held) if len(held) == 1 and held.keys() <= namesakes.keys():
            node.data = {KIND: Node(next(iter(held)), node.origin), **held}


def _complete(node: Node, field: FieldInfo | None) -> None:
    """Spells out what is short, and writes the kind of unions that name none and the required sections that are absent.

    An empty section lets the schema say what it lacks, which helps more than `is required`.
    """
    if field is None:
        return
    _spell_out(node, field)
    if isinstance(node.data, dict):
        if len(_sections(field)) > 1 and (kind := _default_kind(field)):
            node.data.setdefault(KIND, Node(kind, node.origin))
        section = _section(field, node.data)
        for name, child in section.model_fields.items() if section else ():
            if child.is_required() and isinstance(child.annotation, type) and issubclass(child.annotation, BaseModel):
                node.data.setdefault(name, Node({}, node.origin))
    for key, child in _items(node):
        _complete(child, _child(field, node.data, key))


def _items(node: Node) -> Iterable[tuple[Any, Node]]:
    """What a mapping or list holds, by key or number; nothing for a scalar."""
    match node.data:
        case dict(held):
            return held.items()
        case list(held):
            return enumerate(held)
    return ()


# --- the schema as a tree --------------------------------------------------------------------------------------------


def _variants(field: FieldInfo) -> list[FieldInfo]:
    """The members of a union, or the type alone."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return [field]
    return [v for arg in get_args(field.annotation) for v in _variants(FieldInfo.from_annotation(arg))]


def _plain_variants(field: FieldInfo) -> list[FieldInfo]:
    """The members of a union of sections that are no sections, such as the number beside its schedules."""
    sections = _sections(field)
    return [v for v in _variants(field) if v.annotation not in sections and v.annotation is not NoneType]


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    types = [variant.annotation for variant in _variants(field)]
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    return get_args(section.model_fields[KIND].annotation)


def _all_kinds(field: FieldInfo) -> list[str]:
    return [kind for section in _sections(field) for kind in _kinds(section)]


def _namesakes(field: FieldInfo) -> dict[str, FieldInfo]:
    """The kinds of a union that have a key of their own name, with its field."""
    members = [(kind, section.model_fields) for section in _sections(field) for kind in _kinds(section)]
    return {kind: fields[kind] for kind, fields in members if kind in fields}


def _default_kind(field: FieldInfo) -> str | None:
    """The kind of the field's default; None where it has none, as in a list, and the kind must be written.

    The values of a mapping have no default; their type may name a kind in its `json_schema_extra`.
    """
    if isinstance(field.json_schema_extra, dict) and KIND in field.json_schema_extra:
        return str(field.json_schema_extra[KIND])
    return getattr(field.get_default(call_default_factory=True, validated_data={}), KIND, None)


def _section(field: FieldInfo, data: Mapping[str, Node]) -> type[BaseModel] | None:
    """The section that a mapping stands for; None where the field has none, or none of that kind."""
    sections = _sections(field)
    if len(sections) < 2:
        return sections[0] if sections else None
    kind = data[KIND].data if KIND in data else _default_kind(field)
    return next((section for section in sections if kind in _kinds(section)), None)


def _child(field: FieldInfo | None, data: Any, key: str | int) -> FieldInfo | None:
    """The field of the value at `key` of a mapping or list, if the schema has one there."""
    if field is None:
        return None
    if isinstance(key, str) and (section := _section(field, data)):
        return section.model_fields.get(key)
    for variant in _variants(field):
        args = get_args(variant.annotation)
        match get_origin(variant.annotation), key:
            case (origin, str()) if origin is dict:
                return FieldInfo.from_annotation(args[1])
            case (origin, int(i)) if origin is list or (origin is tuple and args[-1] is ...):
                return FieldInfo.from_annotation(args[0])
            case (origin, int(i)) if origin is tuple and i < len(args):
                return FieldInfo.from_annotation(args[i])
    return None


@dataclass
class Group:
    """A section of the tree for `--help`: its dotted key, its kind in a union, its meaning and its own keys."""

    heading: str
    meaning: str
    leaves: list[tuple[str, FieldInfo]]


Homes = dict[tuple[type[BaseModel], ...], str]  # where each union is described; elsewhere it is referred to


def _groups(field: FieldInfo, homes: Homes, name: str = "", meaning: str = "") -> Iterator[Group]:
    """The sections of the tree in order, each union once; NAME stands for a key the user chooses."""
    sections = _sections(field)
    for section in sections:
        kind = f" (kind: {', '.join(_kinds(section))})" if len(sections) > 1 else ""
        below = [
            (f"{name}.{key}".lstrip(".") + ".NAME" * (_innermost(child) is not child), child)
            for key, child in section.model_fields.items()
        ]
        if leaves := [(key, child) for key, child in below if len(_sections(_innermost(child))) != 1]:
            yield Group(name + kind, "" if kind else meaning, leaves)
        for key, child in below:
            inner = _innermost(child)
            union = tuple(_sections(inner))
            if len(union) < 2 or union not in homes:
                homes[union] = key
                yield from _groups(inner, homes, key, child.description or "")


def _innermost(field: FieldInfo) -> FieldInfo:
    """The type of a mapping's values, or the field itself."""
    return FieldInfo.from_annotation(get_args(field.annotation)[1]) if get_origin(field.annotation) is dict else field


# --- validating ------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A value in the tree, found from the root: its dotted path as the user wrote it, and its field."""

    path: tuple[str, ...]
    node: Node
    field: FieldInfo | None
    above: "Place | None" = None

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def below(self, step: str | int) -> "Place | None":
        """One step further; an empty node stands for a key that a mapping lacks, None for what cannot be there."""
        held = dict(_items(self.node))
        if step not in held and not isinstance(self.node.data, dict):
            return None
        node = held.get(step) or Node({}, self.node.origin)
        path = (*self.path, str(step)) if node.spelled else self.path
        return Place(path, node, _child(self.field, self.node.data, step), self)


def _validate(tree: Node, root: FieldInfo, schema: type[Schema]) -> Schema:
    try:
        # Strict JSON takes lists for tuples and whole numbers for floats, but neither true nor "3" for a number.
        return schema.model_validate_json(json.dumps(_plain(tree)), strict=True)
    except RecursionError:
        _refuse("", "nested too deep", tree.origin)
    except ValidationError as error:
        faults = [(fault, _locate(fault["loc"], Place((), tree, root))) for fault in error.errors(include_url=False)]
    texts = [at.node for fault, at in faults if fault["type"] == "string_type" and at.node.text is not None]
    if texts:
        for node in texts:
            node.data, node.text = node.text, None
        return _validate(tree, root, schema)
    lines = [_fault(fault, place, Place((), tree, root)) for fault, place in faults]
    raise ConfigError(list(dict.fromkeys(lines)))  # a list that lacks two items is one fault


def _plain(node: Node) -> Any:
    """Nodes as plain values; 1e3 becomes 1000, so that an integer may be written so."""
    match node.data:
        case dict():
            return {key: _plain(child) for key, child in node.data.items()}
        case list():
            return [_plain(child) for child in node.data]
        case float(x) if x.is_integer() and abs(x) < 2**53:
            return int(x)
    return node.data


def _locate(loc: tuple, place: Place) -> Place:
    """The nearest place to pydantic's location.

    Pydantic inserts the kind after a union of sections, and type names after a union of plain types; both are dropped.
    """
    tagged = False
    for step in loc:
        if tagged:
            tagged = False
        elif below := place.below(step):
            place = below
            tagged = place.field is not None and len(_sections(place.field)) > 1
        else:
            break
    return place


def _fault(fault: Any, place: Place, root: Place) -> str:
    """One line for one of pydantic's errors."""
    node, field = place.node, place.field
    match fault["type"]:
        case "extra_forbidden":
            return _line(place.key, _unknown(place, root), node.origin)
        case "missing" if isinstance(node.data, dict):
            return _line(place.key, f"is required ({_prose(field)})" if field else "is required", node.origin)
        case "value_error" | "assertion_error":
            return _rule(str(fault["ctx"]["error"]), place, root)
        case "union_tag_invalid" | "union_tag_not_found" if field and (kind := place.below(KIND)):
            return _line(kind.key, _unknown_kind(kind.node, field), kind.node.origin)
    wanted = f"should be {_prose(field)}" if field else fault["msg"]
    is_text = field is not None and _type(field) in ("str", "str | null")
    quote = "; put it in quotes" if is_text and node.data is not None else ""
    return _line(place.key, f"{wanted}, got {_show(node)}{quote}", node.origin)


def _rule(message: str, place: Place, root: Place) -> str:
    """The line of a rule that several keys break together, with the places of the keys that it names.

    A message may begin with the key at fault, as in `plan: ` or `mlp.ratio: `.
    """
    words = [word.strip(".") for word in re.findall(r"[\w.]+", message)]
    named, _, rest = message.partition(": ")
    at: Place | None = place
    for step in named.split("."):
        at = at.below(step) if at else None
    fault = place
    if rest and at and at.field:  # then only a dotted word means another key: `tokens` may be prose
        words = [named, *(word for word in words if "." in word)]
        fault, message = at, rest
    found = [_find(place.node, word) for word in words] + [_find(root.node, word) for word in words if "." in word]
    origins = dict.fromkeys(f.origin for f in found if f is not None)
    return _line(fault.key, message, ", ".join([*origins][:3]) or place.node.origin)


def _find(node: Node, dotted: str) -> Node | None:
    for step in dotted.split("."):
        if not isinstance(node.data, dict) or step not in node.data:
            return None
        node = node.data[step]
    return node


def _unknown(place: Place, root: Place) -> str:
    """What to say of a key that the schema does not have: the nearest one that it has."""
    *parents, leaf = place.path
    if "." in leaf:
        return "unknown key; dotted keys are for overrides: in a file, nest them"
    if leaf.isdecimal():
        return "unknown key; the items of a list cannot be set one by one: write the whole list"
    assert place.above is not None and place.above.field is not None and root.field is not None
    node, field = place.above.node, place.above.field
    section = _section(field, node.data)
    siblings = list(section.model_fields) if section else []
    if kinds := [kind for other in _sections(field) if leaf in other.model_fields for kind in _kinds(other)]:
        return f"unknown key for kind {node.data[KIND].data}; it belongs to kind {' or '.join(kinds)}"
    if near := difflib.get_close_matches(leaf, siblings, 1, cutoff=0.65):
        return f"unknown key; did you mean {'.'.join([*parents, *near])}?"
    elsewhere = _by_leaf(root.field.annotation)
    if near := difflib.get_close_matches(leaf, elsewhere, 1, cutoff=0.8):
        keys = dict.fromkeys(elsewhere[near[0]])
        nearest = min(key.count(".") for key in keys)
        return f"unknown key; did you mean {' or '.join(key for key in keys if key.count('.') == nearest)}?"
    return f"unknown key; the keys here are {', '.join(siblings)}"


@lru_cache(maxsize=4)
def _by_leaf(schema: Any) -> dict[str, list[str]]:
    """The dotted keys of a schema by their last word."""
    keys: dict[str, list[str]] = {}
    for key in [key for group in _groups(FieldInfo.from_annotation(schema), {}) for key, _ in group.leaves]:
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    return keys


def _unknown_kind(kind: Node, field: FieldInfo) -> str:
    """What to say of a kind that a union does not have, or of one that is missing (an empty mapping)."""
    kinds = _all_kinds(field)
    if kind.data == {}:
        return f"is required (one of {', '.join(kinds)})"
    near = difflib.get_close_matches(str(kind.data), kinds, 1, cutoff=0.65)
    return f"should be one of {', '.join(kinds)}, got {_show(kind)}" + (f"; did you mean {near[0]}?" if near else "")


# --- wording ---------------------------------------------------------------------------------------------------------


def _line(key: str, message: str, origin: str | None) -> str:
    """`config error: key: message (origin)`, on one line whatever the parts contain."""
    return one_line(f"config error: {_short(key) + ': ' if key else ''}{message}{f' ({origin})' if origin else ''}")


def one_line(text: str) -> str:
    """A text that a terminal shows on one line, whatever it holds: what moves the cursor or cannot be shown is escaped."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def _refuse(key: str, message: str, origin: str | None) -> NoReturn:
    raise ConfigError([_line(key, message, origin)]) from None


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _show(value: Any) -> str:
    """A value as it would be written in a config, but with strings in quotes."""
    value = _plain(value) if isinstance(value, Node) else value
    if isinstance(value, float):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(repr(value), repr(value))
    return _short(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _bounds(field: FieldInfo) -> dict[str, float]:
    return {name: getattr(m, name) for name in ("gt", "ge", "lt", "le") for m in field.metadata if hasattr(m, name)}


def _prose(field: FieldInfo, brief: bool = False) -> str:
    """What a field accepts, as the end of a sentence: `a whole number greater than 0`. `brief` names no kinds."""
    kinds = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    variants, annotation = _variants(field), field.annotation
    if len(_sections(field)) > 1:
        null = "null, " * (NoneType in [variant.annotation for variant in variants])
        if plain := _plain_variants(field):
            number = " or ".join(_prose(variant) for variant in plain)
            return f"{null}{number}, or a mapping of kind {', '.join(_all_kinds(field))}"
        forms = "a mapping of keys" + ", a list" * (ANY in _namesakes(field))
        return f"{null}{forms} or {'a kind' if brief else 'one of ' + ', '.join(_all_kinds(field))}"
    if len(variants) > 1:
        return " or ".join(_prose(variant) for variant in variants)
    if annotation in kinds:
        return kinds[annotation] + _bounds_prose(_bounds(field))
    args = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
        case origin if origin is list or (origin is tuple and args[-1] is ...):
            least = next((f"{m.min_length} or more " for m in field.metadata if hasattr(m, "min_length")), "")
            return f"a list of {least}values, each {_prose(FieldInfo.from_annotation(args[0]), brief=True)}"
        case origin if origin is tuple:
            return f"a list of {len(args)} values, each {_prose(FieldInfo.from_annotation(args[0]))}"
    return "a mapping of keys"


def _bounds_prose(bounds: dict[str, float]) -> str:
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']:g} to {bounds['le']:g}"
    words = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}
    return " and".join(f" {words[name]} {bound:g}" for name, bound in bounds.items())


def _type(field: FieldInfo, homes: Homes | None = None, bounded: bool = True) -> str:
    """What a field accepts, in short: `int > 0`, `spatial | temporal`, `[int, int, int]`, `float in [0, 1]`."""
    kinds = {int: "int", float: "float", str: "str", bool: "true | false", NoneType: "null"}
    variants, annotation = _variants(field), field.annotation
    if len(_sections(field)) > 1:
        home = (homes or {}).get(tuple(_sections(field)), "mapping")
        return home.removesuffix(".NAME").rpartition(".")[2]
    if len(variants) > 1:
        return " | ".join(_type(variant, homes, bounded) for variant in variants)
    if annotation in kinds:
        bounds = _bounds(field) if bounded else {}
        if bounds.keys() == {"ge", "le"}:
            return f"{kinds[annotation]} in [{bounds['ge']:g}, {bounds['le']:g}]"
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        return kinds[annotation] + ",".join(f" {signs[name]} {bound:g}" for name, bound in bounds.items())
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, args))
    if get_origin(annotation) in (list, tuple):
        names = ["..." if arg is ... else _type(FieldInfo.from_annotation(arg), homes, False) for arg in args]
        return f"[{', '.join(names + ['...'] * (get_origin(annotation) is list))}]"
    return "mapping"


def _forms(key: str, field: FieldInfo, homes: Homes) -> str:
    """The ways to write a member of a union, where it is described; elsewhere a reference."""
    inner = _innermost(field)
    home = homes[tuple(_sections(inner))]
    plain = [_type(variant, homes) for variant in _plain_variants(inner)]
    forms = ["{kind: KIND, ...}"] if plain else ["KIND", "{kind: KIND, ...}"]
    forms = plain + (forms if key == home else [f"as {home}"])
    for kind, child in _namesakes(inner).items() if key == home else ():
        forms.append(_type(child, homes) if kind == ANY else f"{{{kind}: {_type(child, homes)}}}")
    null = NoneType in [variant.annotation for variant in _variants(inner)]
    return " | ".join(forms + ["null"] * null)


def help_text(schema: type[BaseModel]) -> str:
    """Every key of the tree with its type, default and meaning, section by section, in 120 columns."""
    homes: Homes = {}
    groups = list(_groups(FieldInfo.from_annotation(schema), homes))
    return "\n\n".join("\n".join([*_head(group), *_rows(group.leaves, homes)]) for group in groups) + "\n"


def _head(group: Group) -> list[str]:
    meaning = textwrap.wrap(group.meaning, 114, break_on_hyphens=False)
    return [line for line in (group.heading, *("    " + line for line in meaning)) if line]


def _rows(leaves: list[tuple[str, FieldInfo]], homes: Homes) -> Iterator[str]:
    """A section's keys in three columns: key, type = default, meaning. A long type pushes the meaning down a line."""
    types = [_forms(k, f, homes) if _sections(_innermost(f)) else _type(f, homes) for k, f in leaves]
    facts = [f"{kind}{_default(field)}" for kind, (_, field) in zip(types, leaves, strict=True)]
    wide = max(len(key) for key, _ in leaves)
    typed = max((len(fact) for fact in facts if len(fact) <= 36), default=36)
    margin = " " * (wide + typed + 6)
    for (key, field), fact in zip(leaves, facts, strict=True):
        head = f"  {key:<{wide}}  {fact:<{typed}}"
        meaning = textwrap.wrap(field.description or "", 120 - len(margin), break_on_hyphens=False)
        if meaning and len(head) <= len(margin) - 2:
            head = f"{head:<{len(margin)}}{meaning.pop(0)}"
        yield head.rstrip()
        yield from (margin + line for line in meaning)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return ", required"
    if isinstance(default, BaseModel):  # the member of a union, short where it can be
        kind, keys = getattr(default, KIND), default.model_dump(mode="json", exclude_defaults=True)
        default = {KIND: kind, **keys} if keys else kind
    return f" = {_word(default)}"


# --- writing ---------------------------------------------------------------------------------------------------------


class _Representer(SafeRepresenter):
    """Plain YAML in the order of the schema, no anchors. On one line: lists of numbers, and sections within lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list) -> Any:
        flow = all(isinstance(item, int | float | list) and not _holds_sections(item) for item in data)
        node = self.represent_sequence(f"{TAG}seq", data, flow_style=flow)
        for item, written in zip(data, node.value, strict=True):
            if isinstance(item, dict) and not any(map(_holds_sections, item.values())):
                written.flow_style = True
        return node


_Representer.add_representer(list, _Representer.represent_list)


def _holds_sections(value: Any) -> bool:
    """Whether a value is a mapping, or a list with one in it at any depth."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_sections, value)))


def dump(config: BaseModel) -> str:
    """The whole config as YAML, every key written, short where that says all; `load` reads it back to an equal object."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    text = StringIO()
    yaml.dump(_short_form(config, FieldInfo.from_annotation(type(config))), text)
    return text.getvalue()


def _short_form(value: Any, field: FieldInfo) -> Any:
    """A value as a file has it: a member of a union without keys is its bare kind, and that of kind `any` a list."""

    def inner(key: str | int) -> FieldInfo:
        return _child(field, value, key) or FieldInfo.from_annotation(type(None))

    match value:
        case BaseModel():
            keys = {name: _short_form(getattr(value, name), child) for name, child in type(value).model_fields.items()}
            if len(_sections(field)) > 1 and list(keys) == [KIND]:
                return keys[KIND]
            if len(_sections(field)) > 1 and keys.keys() == {KIND, ANY} and keys[KIND] == ANY:
                return keys[ANY]
            return keys
        case Mapping():
            return {key: _short_form(child, inner(key)) for key, child in value.items()}
        case list() | tuple():
            return [_short_form(child, inner(i)) for i, child in enumerate(value)]
    return value


def differences(old: BaseModel | Mapping, new: BaseModel | Mapping) -> list[str]:
    """`optim.learning_rate: 0.001 -> 0.003` for each key that differs; `absent` where one side lacks it."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in (before | after) if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    return [f"{key}: {_word(before.get(key, _ABSENT))} -> {_word(after.get(key, _ABSENT))}" for key in keys]


def _word(value: Any) -> str:
    """A value on one line; a string that needs no quotes has none."""
    if value is _ABSENT:
        return "absent"
    return value if isinstance(value, str) and value.isprintable() and value else _show(value)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; a list is one value, unless it holds sections."""
    tree = tree.model_dump(mode="json") if isinstance(tree, BaseModel) else tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value)) if _holds_sections(list(value)) else list(value)
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, BaseModel | Mapping) else {f"{prefix}{key}": value}
    return flat

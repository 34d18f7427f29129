"""Read a config strictly: YAML 1.2 files, `extends`, `a.b=c` overrides, and every fault told in one line.

This module knows no key of the tree; the schema it is given decides. Only one convention is shared with it: the
members of a union of sections are told apart by their key `kind`.
"""

import difflib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
EXTENDS = "extends"
TAG = "tag:yaml.org,2002:"  # begins the name of every type that YAML knows
MAX_DEPTH = 50  # far beyond any real config, well below the limits of Python and of the JSON parser
MAX_SHOWN = 80  # characters of a value, key or override that a message repeats

_ABSENT = object()
Schema = TypeVar("Schema", bound=BaseModel)


class ConfigError(Exception):
    """A config that cannot be used. `errors` holds one line per fault; `str()` joins them."""

    def __init__(self, errors: list[str]):
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass
class Node:
    """A value of the config and where it was written."""

    data: Any  # dict[str, Node], list[Node] or a scalar
    origin: str
    text: str | None = None  # the number as typed, for overrides: quotes for it hardly survive a shell


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
            layer = _merge(layer, _read_override(override), None)  # together they are one layer, in any order
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
        _refuse(key, f"not valid YAML: {error.problem or error.context}", origin(mark.line + 1 if mark else 1))
    except YAMLError as error:
        _refuse(key, f"not valid YAML: {str(error).splitlines()[0]}", origin(1))
    except RecursionError:
        _refuse(key, "nested too deep", origin(1))
    if errors:
        raise ConfigError(errors)
    return node


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
            shown = _short(key_node.value) if isinstance(key_node, ScalarNode) else "a list or mapping"
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
    except ValueError:
        return None
    return key if isinstance(key, str) else None


def _scalar(node: ScalarNode) -> str | int | float | bool | None:
    """A scalar by YAML 1.2. Raises ValueError for a tag beside those of JSON and for a text its tag does not fit."""
    text, digits = node.value, node.value.replace("_", "").lower()
    match node.tag.removeprefix(TAG):
        case "null":
            return None
        case "bool":
            return ("false", "true").index(digits) == 1
        case "int":
            return int(digits, 0 if re.match(r"[-+]?0[xob]", digits) else 10)
        case "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", digits))
        case "str" | "timestamp" | "value" | "merge":  # ruamel's names for texts such as 2024-01-01 and =
            text.encode()  # a lone surrogate, from "\ud800" or a damaged argument, is a ValueError
            return text
    raise ValueError(f"tag {node.tag}")


# --- merging ---------------------------------------------------------------------------------------------------------


def _merge(base: Node, layer: Node, field: FieldInfo | None) -> Node:
    """`layer` over `base`: mappings key by key, anything else replaced.

    A mapping that chooses another member of a union replaces the base's: their keys have nothing in common.
    """
    if not (isinstance(base.data, dict) and isinstance(layer.data, dict)):
        return layer
    if field and KIND in layer.data and _section(field, base.data) is not _section(field, layer.data):
        return layer
    merged = dict(base.data)
    for key, node in layer.data.items():
        merged[key] = _merge(merged[key], node, _child(field, base.data, key)) if key in merged else node
    return Node(merged, layer.origin)


def _complete(node: Node, field: FieldInfo | None) -> None:
    """Writes the kind of unions that name none, and the required sections that are absent.

    An empty section lets the schema say what it lacks, which helps more than `is required`.
    """
    if field is None or not isinstance(node.data, dict):
        return
    if len(_sections(field)) > 1:
        node.data.setdefault(KIND, Node(_default_kind(field), node.origin))
    section = _section(field, node.data)
    for name, child in section.model_fields.items() if section else ():
        if child.is_required() and isinstance(child.annotation, type) and issubclass(child.annotation, BaseModel):
            node.data.setdefault(name, Node({}, node.origin))
    for key, child in node.data.items():
        _complete(child, _child(field, node.data, key))


# --- the schema as a tree --------------------------------------------------------------------------------------------


def _variants(field: FieldInfo) -> list[FieldInfo]:
    """The members of a union, or the type alone."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return [field]
    return [v for arg in get_args(field.annotation) for v in _variants(FieldInfo.from_annotation(arg))]


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    types = [variant.annotation for variant in _variants(field)]
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    return get_args(section.model_fields[KIND].annotation)


def _default_kind(field: FieldInfo) -> str:
    """The kind of the field's default, else that of the union's first member."""
    default = field.get_default(call_default_factory=True, validated_data={})
    return getattr(default, KIND, _sections(field)[0].model_fields[KIND].default)


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


def _leaves(field: FieldInfo, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key that holds a value, with its field; NAME stands for a key the user chooses."""
    for _, fields in _groups(field, prefix):
        yield from fields


def _groups(field: FieldInfo, prefix: str = "", name: str = "") -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    """The sections of the tree, each as a heading and its own leaves: (dotted key, field)."""
    sections = _sections(field)
    for section in sections:
        kind = f" (kind: {', '.join(_kinds(section))})" if len(sections) > 1 else ""
        below = [(prefix + key, child) for key, child in section.model_fields.items()]
        if leaves := [(key, child) for key, child in below if not _sections(_innermost(child))]:
            yield name + kind, leaves
        for key, child in below:
            inner = _innermost(child)
            key = key if inner is child else f"{key}.NAME"
            yield from _groups(inner, f"{key}.", key)


def _innermost(field: FieldInfo) -> FieldInfo:
    """The type of a mapping's values, or the field itself."""
    return FieldInfo.from_annotation(get_args(field.annotation)[1]) if get_origin(field.annotation) is dict else field


# --- validating ------------------------------------------------------------------------------------------------------


def _validate(tree: Node, root: FieldInfo, schema: type[Schema]) -> Schema:
    try:
        # Strict JSON takes lists for tuples and whole numbers for floats, but neither true nor "3" for a number.
        return schema.model_validate_json(json.dumps(_plain(tree)), strict=True)
    except RecursionError:
        _refuse("", "nested too deep", tree.origin)
    except ValidationError as error:
        faults = [(fault, *_locate(fault["loc"], tree, root)) for fault in error.errors(include_url=False)]
    if typed := [node for fault, _, node, _ in faults if fault["type"] == "string_type" and node.text is not None]:
        for node in typed:
            node.data, node.text = node.text, None
        return _validate(tree, root, schema)
    lines = [_fault(fault, path, node, field, tree, root) for fault, path, node, field in faults]
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


def _locate(loc: tuple, tree: Node, root: FieldInfo) -> tuple[list[str], Node, FieldInfo | None]:
    """Where pydantic's location is in the user's words: dotted path, nearest node that was given, its field.

    Pydantic inserts the kind after a union of sections, and type names after a union of plain types; both are dropped.
    """
    path: list[str] = []
    node, field, tagged = tree, root, False
    for step in loc:
        if tagged:
            tagged = False
            continue
        held = isinstance(node.data, dict) and step in node.data
        listed = isinstance(node.data, list) and isinstance(step, int) and step < len(node.data)
        if not held and not listed:
            if isinstance(node.data, dict):  # a required key that is missing
                return [*path, str(step)], node, _child(field, node.data, step)
            break
        field = _child(field, node.data, step)
        node = node.data[step]
        path.append(str(step))
        tagged = field is not None and len(_sections(field)) > 1
    return path, node, field


def _fault(fault: Any, path: list[str], node: Node, field: FieldInfo | None, tree: Node, root: FieldInfo) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return _line(key, _unknown(path, tree, root), node.origin)
    if fault["type"] == "missing" and isinstance(node.data, dict):
        return _line(key, f"is required ({_prose(field)})" if field else "is required", node.origin)
    if fault["type"] in ("value_error", "assertion_error"):
        return _rule(str(fault["ctx"]["error"]), path, node, tree)
    if fault["type"] == "union_tag_invalid" and field:
        kinds = [kind for section in _sections(field) for kind in _kinds(section)]
        kind = node.data[KIND]
        return _line(f"{key}.{KIND}", f"should be one of {', '.join(kinds)}, got {_show(kind)}", kind.origin)
    wanted = f"should be {_prose(field)}" if field else fault["msg"]
    is_text = field is not None and _type(field) in ("str", "str | null")
    quote = "; put it in quotes" if is_text and node.data is not None else ""
    return _line(key, f"{wanted}, got {_show(node)}{quote}", node.origin)


def _rule(message: str, path: list[str], node: Node, tree: Node) -> str:
    """The line of a rule that several keys break together, with the places of the keys that it names."""
    if (named := re.match(r"(\w+): ", message)) and isinstance(node.data, dict) and named[1] in node.data:
        path, message = [*path, named[1]], message[named.end() :]
        node = node.data[named[1]]
    words = [word.strip(".") for word in re.findall(r"[\w.]+", message)]
    found = [_find(start, word) for word in words for start in (node, tree)]
    origins = dict.fromkeys(f.origin for f in found if f is not None)
    return _line(".".join(path), message, ", ".join([*origins][:3]) or node.origin)


def _find(node: Node, dotted: str) -> Node | None:
    for step in dotted.split("."):
        if not isinstance(node.data, dict) or step not in node.data:
            return None
        node = node.data[step]
    return node


def _unknown(path: list[str], tree: Node, root: FieldInfo) -> str:
    """What to say of a key that the schema does not have: the nearest one that it has."""
    *parents, leaf = path
    if "." in leaf:
        return "unknown key; dotted keys are for overrides: in a file, nest them"
    node, field = tree, root
    for step in parents:
        field, node = _child(field, node.data, step), node.data[step]
    assert field is not None
    section = _section(field, node.data)
    siblings = list(section.model_fields) if section else []
    for other in _sections(field):
        if leaf in other.model_fields:
            kinds = " or ".join(_kinds(other))
            return f"unknown key for kind {node.data[KIND].data}; it belongs to kind {kinds}"
    if near := difflib.get_close_matches(leaf, siblings, 1, cutoff=0.65):
        return f"unknown key; did you mean {'.'.join([*parents, *near])}?"
    elsewhere: dict[str, list[str]] = {}
    for key, _ in _leaves(root):
        elsewhere.setdefault(key.rpartition(".")[2], []).append(key)
    if near := difflib.get_close_matches(leaf, elsewhere, 1, cutoff=0.8):
        return f"unknown key; did you mean {' or '.join(dict.fromkeys(elsewhere[near[0]]))}?"
    return f"unknown key; the keys here are {', '.join(siblings)}"


# --- wording ---------------------------------------------------------------------------------------------------------


def _line(key: str, message: str, origin: str | None) -> str:
    """`config error: key: message (origin)`, on one line whatever the parts contain."""
    text = f"config error: {_short(key) + ': ' if key else ''}{message}{f' ({origin})' if origin else ''}"
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


def _prose(field: FieldInfo) -> str:
    """What a field accepts, as the end of a sentence: `a whole number greater than 0`."""
    kinds = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    variants, annotation = _variants(field), field.annotation
    if len(variants) > 1 and len(_sections(field)) < 2:
        return " or ".join(_prose(variant) for variant in variants)
    if annotation in kinds:
        return kinds[annotation] + _bounds_prose(_bounds(field))
    args = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
        case origin if origin is list or (origin is tuple and args[-1] is ...):
            return f"a list of values, each {_prose(FieldInfo.from_annotation(args[0]))}"
        case origin if origin is tuple:
            return f"a list of {len(args)} values, each {_prose(FieldInfo.from_annotation(args[0]))}"
    return "a mapping of keys"


def _bounds_prose(bounds: dict[str, float]) -> str:
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']:g} to {bounds['le']:g}"
    words = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}
    return " and".join(f" {words[name]} {bound:g}" for name, bound in bounds.items())


def _type(field: FieldInfo, bounded: bool = True) -> str:
    """What a field accepts, in short: `int > 0`, `spatial | temporal`, `[int, int, int]`, `float in [0, 1]`."""
    kinds = {int: "int", float: "float", str: "str", bool: "true | false", NoneType: "null"}
    variants, annotation = _variants(field), field.annotation
    if len(variants) > 1:
        return " | ".join(_type(variant, bounded) for variant in variants)
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
        names = ["..." if arg is ... else _type(FieldInfo.from_annotation(arg), False) for arg in args]
        return f"[{', '.join(names + ['...'] * (get_origin(annotation) is list))}]"
    return "mapping"


def help_text(schema: type[BaseModel]) -> str:
    """Every key of the tree with its type, default and meaning, section by section, in 120 columns."""
    groups = list(_groups(FieldInfo.from_annotation(schema)))
    return "\n\n".join("\n".join([heading, *_rows(leaves)]) for heading, leaves in groups) + "\n"


def _rows(leaves: list[tuple[str, FieldInfo]]) -> Iterator[str]:
    """A section's keys in three columns: key, type = default, meaning. A long type pushes the meaning down a line."""
    facts = [f"{_type(field)}{_default(field)}" for _, field in leaves]
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
    return f" = {_word(default)}"


# --- writing ---------------------------------------------------------------------------------------------------------


class _Representer(SafeRepresenter):
    """Plain YAML: lists of numbers on one line, the keys in the order of the schema, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list) -> Any:
        flow = all(isinstance(item, int | float) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Representer.add_representer(list, _Representer.represent_list)


def dump(config: BaseModel) -> str:
    """The whole config as YAML, every key written; `load` reads it back to an equal object."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    text = StringIO()
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


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
    """Dotted keys to values; a list is one value."""
    tree = tree.model_dump(mode="json") if isinstance(tree, BaseModel) else tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, BaseModel | Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat

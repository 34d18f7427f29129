"""A tree of nodes checked against a schema, and each fault told in one line that says what to write instead."""

import difflib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stgen.config.node import KIND, ConfigError, Node, fault_line, items_of, plain_value, refuse, show
from stgen.config.tree import all_kinds, child_of, groups_of, kinds_of, section_of, sections_of
from stgen.config.wording import prose, type_words

Schema = TypeVar("Schema", bound=BaseModel)


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
        held = dict(items_of(self.node))
        if step not in held and not isinstance(self.node.data, dict):
            return None
        node = held.get(step) or Node({}, self.node.origin)
        path = (*self.path, str(step)) if node.spelled else self.path
        return Place(path, node, child_of(self.field, self.node.data, step), self)


def validate(tree: Node, root: FieldInfo, schema: type[Schema]) -> Schema:
    try:
        # Strict JSON takes lists for tuples and whole numbers for floats, but neither true nor "3" for a number.
        return schema.model_validate_json(json.dumps(plain_value(tree)), strict=True)
    except RecursionError:
        refuse("", "nested too deep", tree.origin)
    except ValidationError as error:
        faults = [(fault, _locate(fault["loc"], Place((), tree, root))) for fault in error.errors(include_url=False)]
    texts = [at.node for fault, at in faults if fault["type"] == "string_type" and at.node.text is not None]
    if texts:
        for node in texts:
            node.data, node.text = node.text, None
        return validate(tree, root, schema)
    lines = [_fault(fault, place, Place((), tree, root)) for fault, place in faults]
    raise ConfigError(list(dict.fromkeys(lines)))  # a list that lacks two items is one fault


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
            tagged = place.field is not None and len(sections_of(place.field)) > 1
        else:
            break
    return place


def _fault(fault: Any, place: Place, root: Place) -> str:
    """One line for one of pydantic's errors."""
    node, field = place.node, place.field
    match fault["type"]:
        case "extra_forbidden":
            return fault_line(place.key, _unknown(place, root), node.origin)
        case "missing" if isinstance(node.data, dict):
            return fault_line(place.key, f"is required ({prose(field)})" if field else "is required", node.origin)
        case "value_error" | "assertion_error":
            return _rule(str(fault["ctx"]["error"]), place, root)
        case "union_tag_invalid" | "union_tag_not_found" if field and (kind := place.below(KIND)):
            return fault_line(kind.key, _unknown_kind(kind.node, field), kind.node.origin)
    wanted = f"should be {prose(field)}" if field else fault["msg"]
    is_text = field is not None and type_words(field) in ("str", "str | null")
    quote = "; put it in quotes" if is_text and node.data is not None else ""
    return fault_line(place.key, f"{wanted}, got {show(node)}{quote}", node.origin)


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
    return fault_line(fault.key, message, ", ".join([*origins][:3]) or place.node.origin)


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
    section = section_of(field, node.data)
    siblings = list(section.model_fields) if section else []
    if kinds := [kind for other in sections_of(field) if leaf in other.model_fields for kind in kinds_of(other)]:
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
    for key in [key for group in groups_of(FieldInfo.from_annotation(schema), {}) for key, _ in group.leaves]:
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    return keys


def _unknown_kind(kind: Node, field: FieldInfo) -> str:
    """What to say of a kind that a union does not have, or of one that is missing (an empty mapping)."""
    kinds = all_kinds(field)
    if kind.data == {}:
        return f"is required (one of {', '.join(kinds)})"
    near = difflib.get_close_matches(str(kind.data), kinds, 1, cutoff=0.65)
    return f"should be one of {', '.join(kinds)}, got {show(kind)}" + (f"; did you mean {near[0]}?" if near else "")

"""The schema as a tree: what stands below a key, and which member of a union a mapping means."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stgen.config.node import KIND, Node


def variants_of(field: FieldInfo) -> list[FieldInfo]:
    """The members of a union, or the type alone."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return [field]
    return [v for arg in get_args(field.annotation) for v in variants_of(FieldInfo.from_annotation(arg))]


def plain_variants(field: FieldInfo) -> list[FieldInfo]:
    """The members of a union of sections that are no sections, such as the number beside its schedules."""
    sections = sections_of(field)
    return [v for v in variants_of(field) if v.annotation not in sections and v.annotation is not NoneType]


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    types = [variant.annotation for variant in variants_of(field)]
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def kinds_of(section: type[BaseModel]) -> tuple[str, ...]:
    return get_args(section.model_fields[KIND].annotation)


def all_kinds(field: FieldInfo) -> list[str]:
    return [kind for section in sections_of(field) for kind in kinds_of(section)]


def namesakes_of(field: FieldInfo) -> dict[str, FieldInfo]:
    """The kinds of a union that have a key of their own name, with its field."""
    members = [(kind, section.model_fields) for section in sections_of(field) for kind in kinds_of(section)]
    return {kind: fields[kind] for kind, fields in members if kind in fields}


def default_kind(field: FieldInfo) -> str | None:
    """The kind of the field's default; None where it has none, as in a list, and the kind must be written.

    The values of a mapping have no default; their type may name a kind in its `json_schema_extra`.
    """
    if isinstance(field.json_schema_extra, dict) and KIND in field.json_schema_extra:
        return str(field.json_schema_extra[KIND])
    return getattr(field.get_default(call_default_factory=True, validated_data={}), KIND, None)


def section_of(field: FieldInfo, data: Mapping[str, Node]) -> type[BaseModel] | None:
    """The section that a mapping stands for; None where the field has none, or none of that kind."""
    sections = sections_of(field)
    if len(sections) < 2:
        return sections[0] if sections else None
    kind = data[KIND].data if KIND in data else default_kind(field)
    return next((section for section in sections if kind in kinds_of(section)), None)


def child_of(field: FieldInfo | None, data: Any, key: str | int) -> FieldInfo | None:
    """The field of the value at `key` of a mapping or list, if the schema has one there."""
    if field is None:
        return None
    if isinstance(key, str) and (section := section_of(field, data)):
        return section.model_fields.get(key)
    for variant in variants_of(field):
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


def groups_of(field: FieldInfo, homes: Homes, name: str = "", meaning: str = "") -> Iterator[Group]:
    """The sections of the tree in order, each union once; NAME stands for a key the user chooses."""
    sections = sections_of(field)
    for section in sections:
        kind = f" (kind: {', '.join(kinds_of(section))})" if len(sections) > 1 else ""
        below = [
            (f"{name}.{key}".lstrip(".") + ".NAME" * (innermost(child) is not child), child)
            for key, child in section.model_fields.items()
        ]
        if leaves := [(key, child) for key, child in below if len(sections_of(innermost(child))) != 1]:
            yield Group(name + kind, "" if kind else meaning, leaves)
        for key, child in below:
            inner = innermost(child)
            union = tuple(sections_of(inner))
            if len(union) < 2 or union not in homes:
                homes[union] = key
                yield from groups_of(inner, homes, key, child.description or "")


def innermost(field: FieldInfo) -> FieldInfo:
    """The type of a mapping's values, or the field itself."""
    return FieldInfo.from_annotation(get_args(field.annotation)[1]) if get_origin(field.annotation) is dict else field

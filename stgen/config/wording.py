"""What a key accepts, in words and in short."""

from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from stgen.config.node import ANY, show
from stgen.config.tree import Homes, all_kinds, namesakes_of, plain_variants, sections_of, variants_of

ABSENT = object()


def _bounds(field: FieldInfo) -> dict[str, float]:
    return {name: getattr(m, name) for name in ("gt", "ge", "lt", "le") for m in field.metadata if hasattr(m, name)}


def prose(field: FieldInfo, brief: bool = False) -> str:
    """What a field accepts, as the end of a sentence: `a whole number greater than 0`. `brief` names no kinds."""
    kinds = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    variants, annotation = variants_of(field), field.annotation
    if len(sections_of(field)) > 1:
        null = "null, " * (NoneType in [variant.annotation for variant in variants])
        if plain := plain_variants(field):
            number = " or ".join(prose(variant) for variant in plain)
            return f"{null}{number}, or a mapping of kind {', '.join(all_kinds(field))}"
        forms = "a mapping of keys" + ", a list" * (ANY in namesakes_of(field))
        return f"{null}{forms} or {'a kind' if brief else 'one of ' + ', '.join(all_kinds(field))}"
    if len(variants) > 1:
        return " or ".join(prose(variant) for variant in variants)
    if annotation in kinds:
        return kinds[annotation] + _bounds_prose(_bounds(field))
    args = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
        case origin if origin is list or (origin is tuple and args[-1] is ...):
            least = next((f"{m.min_length} or more " for m in field.metadata if hasattr(m, "min_length")), "")
            return f"a list of {least}values, each {prose(FieldInfo.from_annotation(args[0]), brief=True)}"
        case origin if origin is tuple:
            return f"a list of {len(args)} values, each {prose(FieldInfo.from_annotation(args[0]))}"
    return "a mapping of keys"


def _bounds_prose(bounds: dict[str, float]) -> str:
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']:g} to {bounds['le']:g}"
    words = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}
    return " and".join(f" {words[name]} {bound:g}" for name, bound in bounds.items())


def type_words(field: FieldInfo, homes: Homes | None = None, bounded: bool = True) -> str:
    """What a field accepts, in short: `int > 0`, `spatial | temporal`, `[int, int, int]`, `float in [0, 1]`."""
    kinds = {int: "int", float: "float", str: "str", bool: "true | false", NoneType: "null"}
    variants, annotation = variants_of(field), field.annotation
    if len(sections_of(field)) > 1:
        home = (homes or {}).get(tuple(sections_of(field)), "mapping")
        return home.removesuffix(".NAME").rpartition(".")[2]
    if len(variants) > 1:
        return " | ".join(type_words(variant, homes, bounded) for variant in variants)
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
        names = ["..." if arg is ... else type_words(FieldInfo.from_annotation(arg), homes, False) for arg in args]
        return f"[{', '.join(names + ['...'] * (get_origin(annotation) is list))}]"
    return "mapping"


def in_a_word(value: Any) -> str:
    """A value on one line; a string that needs no quotes has none."""
    if value is ABSENT:
        return "absent"
    return value if isinstance(value, str) and value.isprintable() and value else show(value)

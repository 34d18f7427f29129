"""The text of `--help`: every key of the tree with its type, default and meaning."""

import textwrap
from collections.abc import Iterator
from types import NoneType

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stgen.config.node import ANY, KIND
from stgen.config.tree import Group, Homes, groups_of, innermost, namesakes_of, plain_variants, sections_of, variants_of
from stgen.config.wording import in_a_word, type_words


def _forms(key: str, field: FieldInfo, homes: Homes) -> str:
    """The ways to write a member of a union, where it is described; elsewhere a reference."""
    inner = innermost(field)
    home = homes[tuple(sections_of(inner))]
    plain = [type_words(variant, homes) for variant in plain_variants(inner)]
    forms = ["{kind: KIND, ...}"] if plain else ["KIND", "{kind: KIND, ...}"]
    forms = plain + (forms if key == home else [f"as {home}"])
    for kind, child in namesakes_of(inner).items() if key == home else ():
        forms.append(type_words(child, homes) if kind == ANY else f"{{{kind}: {type_words(child, homes)}}}")
    null = NoneType in [variant.annotation for variant in variants_of(inner)]
    return " | ".join(forms + ["null"] * null)


def help_text(schema: type[BaseModel]) -> str:
    """Every key of the tree with its type, default and meaning, section by section, in 120 columns."""
    homes: Homes = {}
    groups = list(groups_of(FieldInfo.from_annotation(schema), homes))
    return "\n\n".join("\n".join([*_head(group), *_rows(group.leaves, homes)]) for group in groups) + "\n"


def _head(group: Group) -> list[str]:
    meaning = textwrap.wrap(group.meaning, 114, break_on_hyphens=False)
    return [line for line in (group.heading, *("    " + line for line in meaning)) if line]


def _rows(leaves: list[tuple[str, FieldInfo]], homes: Homes) -> Iterator[str]:
    """A section's keys in three columns: key, type = default, meaning. A long type pushes the meaning down a line."""
    types = [_forms(k, f, homes) if sections_of(innermost(f)) else type_words(f, homes) for k, f in leaves]
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
    return f" = {in_a_word(default)}"

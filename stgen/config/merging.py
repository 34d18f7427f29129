"""One layer of a config over another, and the short ways to write a member of a union spelled out."""

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stgen.config.node import ANY, KIND, Node, items_of
from stgen.config.tree import child_of, default_kind, namesakes_of, plain_variants, section_of, sections_of


def merge(base: Node, layer: Node, field: FieldInfo | None, settled: bool = True) -> Node:
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
        and section_of(field, base.data) not in (None, section_of(field, layer.data))
    ):
        return layer
    merged = base.data | layer.data
    for key in base.data.keys() & layer.data.keys():
        merged[key] = merge(base.data[key], layer.data[key], child_of(field, merged, key), settled)
    return Node(merged, layer.origin)


def _spell_out(node: Node, field: FieldInfo | None) -> None:
    """Writes a member of a union as a mapping with its kind, where it was written short.

    `full` stands for {kind: full}, a list for {kind: any, any: [...]}, and a kind's namesake alone, as in {all: [...]},
    for {kind: all, all: [...]}.
    """
    if field is None or len(sections_of(field)) < 2:
        return
    namesakes = namesakes_of(field)
    match node.data:
        case str(kind) if not plain_variants(field):
            node.data = {KIND: Node(kind, node.origin, spelled=False)}
        case list(items) if ANY in namesakes:
            node.data = {KIND: Node(ANY, node.origin), ANY: Node(items, node.origin, spelled=False)}
        case dict(held) if len(held) == 1 and held.keys() <= namesakes.keys():
            node.data = {KIND: Node(next(iter(held)), node.origin), **held}


def complete(node: Node, field: FieldInfo | None) -> None:
    """Spells out what is short, and writes the kind of unions that name none and the required sections that are absent.

    An empty section lets the schema say what it lacks, which helps more than `is required`.
    """
    if field is None:
        return
    _spell_out(node, field)
    if isinstance(node.data, dict):
        if len(sections_of(field)) > 1 and (kind := default_kind(field)):
            node.data.setdefault(KIND, Node(kind, node.origin))
        section = section_of(field, node.data)
        for name, child in section.model_fields.items() if section else ():
            if child.is_required() and isinstance(child.annotation, type) and issubclass(child.annotation, BaseModel):
                node.data.setdefault(name, Node({}, node.origin))
    for key, child in items_of(node):
        complete(child, child_of(field, node.data, key))

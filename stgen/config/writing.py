"""A config as YAML, and where two of them differ."""

from collections.abc import Mapping
from io import StringIO
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from stgen.config.node import ANY, KIND, TAG
from stgen.config.tree import child_of, sections_of
from stgen.config.wording import ABSENT, in_a_word


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
        return child_of(field, value, key) or FieldInfo.from_annotation(type(None))

    match value:
        case BaseModel():
            keys = {name: _short_form(getattr(value, name), child) for name, child in type(value).model_fields.items()}
            if len(sections_of(field)) > 1 and list(keys) == [KIND]:
                return keys[KIND]
            if len(sections_of(field)) > 1 and keys.keys() == {KIND, ANY} and keys[KIND] == ANY:
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
    keys = [key for key in (before | after) if before.get(key, ABSENT) != after.get(key, ABSENT)]
    return [f"{key}: {in_a_word(before.get(key, ABSENT))} -> {in_a_word(after.get(key, ABSENT))}" for key in keys]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; a list is one value, unless it holds sections."""
    tree = tree.model_dump(mode="json") if isinstance(tree, BaseModel) else tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value)) if _holds_sections(list(value)) else list(value)
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, BaseModel | Mapping) else {f"{prefix}{key}": value}
    return flat

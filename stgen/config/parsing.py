"""YAML 1.2 text as nodes. What YAML allows but a config should not hold is refused with its line."""

import re
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from stgen.config.node import TAG, ConfigError, Node, fault_line, refuse, short

MAX_DEPTH = 50  # far beyond any real config, well below the limits of Python and of the JSON parser


def parsed(text: str, key: str, origin: Callable[[int], str]) -> Node:
    """The value that a YAML text stands for; `origin` names a line of it, `key` the place it will have."""
    errors: list[str] = []
    try:
        composed = YAML(typ="safe", pure=True).compose(text)
        node = _build(composed, (key,) if key else (), origin, errors) if composed else Node(None, origin(1))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not valid YAML: {error.problem or error.context}{_remedy(error.problem or '')}"
        refuse(key, message, origin(mark.line + 1 if mark else 1))
    except YAMLError as error:
        refuse(key, f"not valid YAML: {str(error).splitlines()[0]}", origin(1))
    except RecursionError:
        refuse(key, "nested too deep", origin(1))
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

    def reject(message: str) -> None:
        errors.append(fault_line(".".join(path), message, origin(node.start_mark.line + 1)))

    built = Node(None, origin(line))
    if node.anchor:
        reject("anchors and aliases (& and *) are not allowed; write the value out, or use extends")
    elif len(path) > MAX_DEPTH:
        reject("nested too deep")
    elif isinstance(node, MappingNode) and node.tag == f"{TAG}map":
        built.data = _build_mapping(node, path, origin, errors)
    elif isinstance(node, SequenceNode) and node.tag == f"{TAG}seq":
        items = enumerate(node.value)
        built.data = [_build(v, (*path, str(i)), origin, errors, v.start_mark.line + 1) for i, v in items]
    elif isinstance(node, ScalarNode):
        try:
            built.data = _scalar(node)
        except OverflowError:
            reject(f"{short(node.value)} is beyond 2^63, the largest whole number that is read")
        except ValueError:
            reject(f"{short(repr(node.value))} cannot be read as a value of type {node.tag.removeprefix(TAG)}")
    else:
        reject(f"the tag {short(str(node.tag))} is not allowed")
    return built


def _build_mapping(
    node: MappingNode, path: tuple[str, ...], origin: Callable[[int], str], errors: list[str]
) -> dict[str, Node]:
    built: dict[str, Node] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == f"{TAG}merge":
            errors.append(fault_line(".".join(path), "merge keys (<<) are not allowed; use extends", origin(line)))
        elif (key := _key(key_node)) is None:
            shown = short(key_node.value) or "none" if isinstance(key_node, ScalarNode) else "a list or mapping"
            message = f"keys are plain or quoted strings, got {shown}"
            errors.append(fault_line(".".join(path), message, origin(line)))
        elif key in built:
            errors.append(fault_line(".".join((*path, key)), "the key is given twice", origin(line)))
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

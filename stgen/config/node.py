"""A config as it was written: values that know where they stand, and the one line that tells a fault."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

KIND = "kind"
ANY = "any"
TAG = "tag:yaml.org,2002:"  # begins the name of every type that YAML knows
MAX_SHOWN = 80  # characters of a value, key or override that a message repeats
MAX_TOLD = 50  # faults told one by one


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


def items_of(node: Node) -> Iterable[tuple[Any, Node]]:
    """What a mapping or list holds, by key or number; nothing for a scalar."""
    match node.data:
        case dict(held):
            return held.items()
        case list(held):
            return enumerate(held)
    return ()


def plain_value(node: Node) -> Any:
    """Nodes as plain values; 1e3 becomes 1000, so that an integer may be written so."""
    match node.data:
        case dict():
            return {key: plain_value(child) for key, child in node.data.items()}
        case list():
            return [plain_value(child) for child in node.data]
        case float(x) if x.is_integer() and abs(x) < 2**53:
            return int(x)
    return node.data


def fault_line(key: str, message: str, origin: str | None) -> str:
    """`config error: key: message (origin)`, on one line whatever the parts contain."""
    return one_line(f"config error: {short(key) + ': ' if key else ''}{message}{f' ({origin})' if origin else ''}")


def one_line(text: str) -> str:
    """A text that a terminal shows on one line, whatever it holds: what moves the cursor or cannot be shown is escaped."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def refuse(key: str, message: str, origin: str | None) -> NoReturn:
    raise ConfigError([fault_line(key, message, origin)]) from None


def short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def show(value: Any) -> str:
    """A value as it would be written in a config, but with strings in quotes."""
    value = plain_value(value) if isinstance(value, Node) else value
    if isinstance(value, float):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(repr(value), repr(value))
    return short(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

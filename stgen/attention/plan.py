"""The plan: how mixers are arranged over depth, written as a short string.

Tightest first: `*n` repeats, `|` splits the heads, `+` adds branches on one input, `>` takes them in turn, a space
starts the next layer; parentheses group. Spaces round an operator do not count.

    "spatial temporal"        two layers, each with its own MLP            (Latte variant 1, arXiv:2401.03048)
    "spatial*6 temporal*6"    late fusion                                  (Latte variant 2)
    "spatial>temporal"        one layer: spatial, then temporal, then MLP  (Latte variant 3; divided space-time)
    "spatial|temporal"        one layer, half of the heads each            (Latte variant 4)
"""

import re
from dataclasses import dataclass

LONGEST = 1000  # characters; keeps nesting far from Python's recursion limit

Branch = tuple[str, ...]  # mixers that share the heads of one attention: ("spatial",) or ("spatial", "temporal")


@dataclass(frozen=True)
class Term:
    """Branches on one normed input, their outputs added."""

    branches: tuple[Branch, ...]

    def __str__(self) -> str:
        return " + ".join("|".join(branch) for branch in self.branches)


@dataclass(frozen=True)
class Layer:
    """Terms taken in turn, each with its own norm, gate and residual; the MLP follows."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return " > ".join(str(term) for term in self.terms)


def parse(plan: str, depth: int) -> tuple[Layer, ...]:
    """The layers that `plan` describes for a model of `depth` layers.

    A plan without `*` is tiled over depth; one with `*` must give exactly `depth` layers.
    Raises ValueError, in one sentence, for a plan that cannot be read or does not fit.
    """
    layers = _Reader(plan).read()
    if "*" in plan:
        if len(layers) != depth:
            raise ValueError(f"plan: {plan!r} gives {len(layers)} layers but depth is {depth}")
        return layers
    if depth % len(layers):
        raise ValueError(f"plan: {plan!r} has {len(layers)} layers, which do not tile depth {depth}")
    return layers * (depth // len(layers))


def names(layers: tuple[Layer, ...]) -> list[str]:
    """Mixer names in order of first use."""
    used = (name for layer in layers for term in layer.terms for branch in term.branches for name in branch)
    return list(dict.fromkeys(used))


def splits(layers: tuple[Layer, ...]) -> set[int]:
    """The numbers of mixers among which some layer splits its heads."""
    return {len(branch) for layer in layers for term in layer.terms for branch in term.branches}


class _Reader:
    """Recursive descent over the tokens of one plan; each method reads one level of binding."""

    def __init__(self, plan: str):
        self.plan = plan
        if len(plan) > LONGEST:
            self._refuse(f"longer than {LONGEST} characters; write repetitions as *n")
        compact = re.sub(r"\s*([|+>*])\s*", r"\1", plan.strip())
        compact = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", compact))
        self.tokens = re.findall(r"[A-Za-z_][\w-]*|\d+|\s+|.", compact)
        self.at = 0

    def read(self) -> tuple[Layer, ...]:
        layers = self._layers()
        if self._next() is not None:
            self._refuse(f"{self._next()!r} is not expected there")
        return layers

    def _layers(self) -> tuple[Layer, ...]:
        layers = self._chain()
        while (token := self._next()) is not None and token.isspace():
            self.at += 1
            layers += self._chain()
        return layers

    def _chain(self) -> tuple[Layer, ...]:
        return self._joined(">", self._sum, lambda parts: Layer(tuple(term for p in parts for term in p.terms)))

    def _sum(self) -> tuple[Layer, ...]:
        def add(parts: list[Layer]) -> Layer:
            if any(len(part.terms) > 1 for part in parts):
                self._refuse("'+' adds mixers; it cannot add a group joined by '>'")
            return Layer((Term(tuple(branch for p in parts for branch in p.terms[0].branches)),))

        return self._joined("+", self._split, add)

    def _split(self) -> tuple[Layer, ...]:
        def share(parts: list[Layer]) -> Layer:
            if any(len(p.terms) != 1 or len(p.terms[0].branches) > 1 for p in parts):
                self._refuse("'|' splits heads among mixers; it cannot split a group joined by '>' or '+'")
            shared = [name for p in parts for branch in p.terms[0].branches for name in branch]
            return Layer((Term((tuple(shared),)),))

        return self._joined("|", self._repeated, share)

    def _joined(self, operator, operand, join) -> tuple[Layer, ...]:
        parts = operand()
        if self._next() != operator:
            return parts
        operands = [parts]
        while self._next() == operator:
            self.at += 1
            operands.append(operand())
        if any(len(part) != 1 for part in operands):
            self._refuse(f"{operator!r} joins single layers; write the repetition or the space outside of it")
        return (join([part[0] for part in operands]),)

    def _repeated(self) -> tuple[Layer, ...]:
        layers = self._atom()
        while self._next() == "*":
            self.at += 1
            count = self._next()
            if count is None or not count.isdigit() or not 1 <= int(count) <= LONGEST:
                self._refuse(f"'*' wants a whole number from 1 to {LONGEST} after it")
            self.at += 1
            layers = layers * int(count)
        return layers

    def _atom(self) -> tuple[Layer, ...]:
        token = self._next()
        self.at += 1
        if token == "(":
            layers = self._layers()
            if self._next() != ")":
                self._refuse("a '(' is not closed")
            self.at += 1
            return layers
        if token is None or not re.match(r"[A-Za-z_]", token):
            self._refuse("a mixer's name is missing" + (f" before {token!r}" if token else " at the end"))
        return (Layer((Term(((token,),)),)),)

    def _next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _refuse(self, reason: str):
        shown = self.plan if len(self.plan) <= 80 else self.plan[:77] + "..."
        raise ValueError(f"plan: {shown!r}: {reason}")

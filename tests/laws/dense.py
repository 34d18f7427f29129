"""The dumbest attention there is: each sequence of each clip by itself, every pair of places, in float64.

It shares with stgen the coordinates of tokens and the weights that modules hold, and nothing of folding, supports,
blocks or kernels. Tensors are [B, registers + N, heads, D]. Patterns are told by their names in PATTERNS, unions as
("any", ...) and intersections as ("all", ...).
"""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from patterns import PATTERNS, best, count_of, told

from stgen.attention.pattern import Chosen, Fixed, Frame, Remade
from stgen.attention.patterns import KINDS
from stgen.tokens import Grid, coordinates

FREE = {"joint": (0, 1, 2), "spatial": (1, 2), "temporal": (0,), "height": (1,), "width": (2,)}  # axes of a sequence


class Sequences:
    """Where a layout puts every token of a grid: by hand, one token at a time."""

    def __init__(self, keys: dict, grid: Grid, shift=(0, 0, 0)):
        extents = (grid.t, grid.h, grid.w)
        window = keys["layout"] == "window"
        size = keys["size"] if window else [n if a in FREE[keys["layout"]] else 1 for a, n in enumerate(extents)]
        self.span = [min(s, n) for s, n in zip(size, extents, strict=True)]
        shift = [0 if s >= n else x for s, n, x in zip(size, extents, shift, strict=True)]
        self.tile = [min(a, b) for a, b in zip(keys.get("block", (4, 4, 4)), self.span, strict=True)]
        tiles = [-(-n // b) for n, b in zip(self.span, self.tile, strict=True)]
        tiled = keys.get("order") == "tile"
        self.block = math.prod(self.tile)
        self.length = math.prod(tiles) * self.block if tiled else math.prod(self.span)
        found: dict[tuple, list] = {}
        for token, where in enumerate(coordinates(grid).tolist()):
            moved = [x + s for x, s in zip(where, shift, strict=True)]
            box = tuple(x // n for x, n in zip(moved, self.span, strict=True))
            inside = [x % n for x, n in zip(moved, self.span, strict=True)]
            if tiled:
                outer = [x // b for x, b in zip(inside, self.tile, strict=True)]
                inner = [x % b for x, b in zip(inside, self.tile, strict=True)]
                place = number(outer, tiles) * self.block + number(inner, self.tile)
            else:
                place = number(inside, self.span)
            found.setdefault(box, []).append((place, token, where))
        self.sequences = list(found.values())


def number(x, extents) -> int:
    """Raster number of a position."""
    return (x[0] * extents[1] + x[1]) * extents[2] + x[2]


@dataclass
class Given:
    """What a naive layer leaves for the next: its inputs, its output, and per clip and sequence the map and mask."""

    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    maps: list
    masks: list


def layer(keys: dict, pattern, grid: Grid, heads, q, k, v, taken: Given | None = None, shift=(0, 0, 0)) -> Given:
    """One mixer over q, k, v. `heads` is the module whose weights it holds (`attend.Heads`); None where it has none."""
    what = keys["reuse"]["what"] if taken is not None else "none"
    if what == "output":
        return Given(k, v, taken.out, [], [])
    if what == "kv":
        k, v = taken.k, taken.v
    layout, r = Sequences(keys, grid, shift), heads.registers
    out, maps, masks = torch.zeros_like(v), [], []
    register_outputs = torch.zeros_like(v[:, :r])
    for b in range(len(v)):
        for sequence in layout.sequences:
            places, tokens = [p for p, _, _ in sequence], [t + r for _, t, _ in sequence]
            scene = SimpleNamespace(layout=layout, grid=grid, sequence=sequence, layer=heads.use.layer)

            def laid(x, b=b, places=places, tokens=tokens):
                full = x.new_zeros(layout.length, *x.shape[2:]).index_put((torch.tensor(places),), x[b, tokens])
                return torch.cat([x[b, :r], full]).transpose(0, 1)  # [heads, registers + n, D]

            turn = len(maps)
            ready = taken.maps[turn] if what == "map" else None
            mask = taken.masks[turn] if what == "support" else None
            lines, weights, mask = attend(keys, pattern, heads, laid(q), laid(k), laid(v), scene, ready, mask)
            maps.append(weights)
            masks.append(mask)
            rows = lines.transpose(0, 1)
            out = out.index_put((torch.tensor(b), torch.tensor(tokens)), rows[[r + p for p in places]])
            register_outputs = register_outputs.index_add(0, torch.tensor([b]), rows[None, :r] / len(layout.sequences))
    out = torch.cat([register_outputs, out[:, r:]], dim=1)
    return Given(k, v, out, maps, masks)


def attend(keys, pattern, heads, q, k, v, scene, ready=None, mask=None):
    """One sequence, q, k, v [heads, registers + n, D] -> its rows, its map and the mask of its own places."""
    q, k, v = (approximated(x, keys.get("approximate", {}), name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    r, n, sink = heads.registers, scene.layout.length, heads.sink
    filled = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor([p for p, _, _ in scene.sequence]), True)
    values = v if sink.v is None else torch.cat([sink.v, v], dim=1)
    if ready is not None:
        return ready @ values, ready, None
    if family(pattern) is Remade:
        return remade(keys, pattern, heads, q, k, v, filled, scene), None, None
    if mask is None:
        allowed = (filled[:, None] & filled).expand(len(q), -1, -1)
        if "causal" in names(pattern):  # wherever it stands it binds all
            allowed = allowed & fixed({"kind": "causal"}, scene)
        mask = tree(pattern, q[:, r:], k[:, r:], allowed, scene, iter(heads.selection.choosers))
    every = torch.zeros(len(q), r + n, r + n, dtype=torch.bool)
    every[:, r:, r:], every[:, r:, :r], every[:, :r, :r], every[:, :r, r:] = mask, True, True, filled
    rows = torch.cat([torch.ones(r, dtype=torch.bool), filled])[:, None]  # of tokens and registers
    weights = approximated(weigh(keys, heads, q, k, every) * rows, keys.get("approximate", {}), "map")
    return weights @ values, weights, mask


def remade(keys, pattern, heads, q, k, v, filled, scene):
    """A pattern that makes keys of its own; the oracle of sinkhorn takes one head at a time."""
    config = PATTERNS[pattern]
    oracle, near = told(config), heads.group.pattern.near
    near = None if near is None else fixed(near.model_dump(), scene)
    every = list(range(len(q)))
    outs = []
    for some in [[head] for head in every] if config["kind"] == "sinkhorn" else [every]:

        def dense_attend(q, k, v, mask, some=some):
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool) if mask is None else mask
            mask = mask.expand(*q.shape[:3], k.shape[2])[0]
            values = v[0] if heads.sink.v is None else torch.cat([heads.sink.v[some], v[0]], dim=1)
            weights = weigh(keys, heads, q[0], k[0], mask, some)
            weights = weights * filled[:, None] if len(filled) == q.shape[2] else weights  # sinkhorn's has no padding
            return (approximated(weights, keys.get("approximate", {}), "map") @ values)[None]

        ours = (x[None, some] for x in (q, k, v))
        outs.append(oracle(heads.remade, *ours, filled, scene.layout.block, dense_attend, near)[0])
    return torch.cat(outs)


# ---------------------------------------------------------------------------------------------------------- which keys


def family(pattern):
    if isinstance(pattern, tuple):
        return Chosen if any(family(part) is Chosen for part in pattern[1:]) else Fixed
    kind = KINDS[PATTERNS[pattern]["kind"]]
    return next(f for f in (Fixed, Chosen, Remade) if issubclass(kind, f))


def names(pattern) -> set:
    return {pattern} if isinstance(pattern, str) else set().union(*map(names, pattern[1:]))


def config_of(pattern) -> dict:
    """What a mixer's `pattern` says for a name or a tuple of names."""
    if isinstance(pattern, str):
        return PATTERNS[pattern]
    return {"kind": pattern[0], pattern[0]: [config_of(part) for part in pattern[1:]]}


def tree(pattern, q, k, allowed, scene, choosers):
    """Mask [heads, n, n] of a pattern within `allowed`."""
    if isinstance(pattern, str) and family(pattern) is Fixed:
        return allowed & fixed(PATTERNS[pattern], scene)
    if isinstance(pattern, str):
        chooser, oracle = next(choosers), told(PATTERNS[pattern])
        pairs = zip(q.detach(), k.detach(), allowed, strict=True)
        return torch.stack([oracle(chooser, *pair, scene.layout.block) for pair in pairs])
    joined, *parts = pattern
    parts = [part for part in parts if part != "causal"] or ["causal"]
    if joined == "any":
        return torch.stack([tree(part, q, k, allowed, scene, choosers) for part in parts]).any(0)
    for part in parts:
        if family(part) is Fixed:
            allowed = allowed & tree(part, q, k, allowed, scene, choosers)
    chosen = [tree(part, q, k, allowed, scene, choosers) for part in parts if family(part) is not Fixed]
    return torch.stack([allowed, *chosen]).all(0)


def fixed(config, scene) -> torch.Tensor:
    """Mask [n, n] of a pattern of positions, pair by pair."""
    grid, layout = scene.grid, scene.layout
    frame = Frame((grid.t, grid.h, grid.w), tuple(layout.tile), -(-layout.length // layout.block), scene.layer)
    oracle = told(config)
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for a, _, i in scene.sequence:
        for b, _, j in scene.sequence:
            mask[a, b] = oracle(tuple(i), tuple(j), a // layout.block, b // layout.block, frame)
    return mask


# -------------------------------------------------------------------------------------------------- scores and weights


def weigh(keys, heads, q, k, mask, some=slice(None)):
    """Weights [heads, n, sinks + m] of q [heads, n, D] on k [heads, m, D]; `some`: which heads of the module they are."""
    sink = heads.sink
    if sink.k is not None:
        k = torch.cat([sink.k[some], k], dim=1)
        mask = torch.nn.functional.pad(mask, (sink.count, 0), value=True)
    kind = keys["normaliser"]["kind"]
    if kind == "linear":
        phi_q, phi_k = (features(keys["normaliser"].get("features", "elu"), heads.features, x) for x in (q, k))
        return over((phi_q @ phi_k.transpose(-1, -2)) * mask)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if kind in ("relu", "relu2"):
        weights = scores.clamp(min=0) ** (2 if kind == "relu2" else 1) * mask
        return weights / mask.sum(-1, keepdim=True).clamp(min=1)
    if kind == "poly_logits":
        scores, mask = cubic(keys["normaliser"], heads.polynomial.coefficients[some], scores, mask)
    logit, column = sink.logit(q), (*scores.shape[:2], 1)
    extra = scores.new_full(column, -torch.inf) if logit is None else logit[some][:, None, None].expand(column)
    masked = torch.cat([scores.masked_fill(~mask, -torch.inf), extra], dim=-1)
    return over(exponential(kind, keys["normaliser"], masked))[..., :-1]


def features(name, module, x):
    """phi(x) of linear attention for x [heads, n, D]; what keeps exponentials in range cancels, and is left out."""
    if name == "elu":
        return torch.where(x > 0, x + 1, x.masked_fill(x > 0, 0).exp())
    if name == "relu":
        return x * (x > 0)
    if name == "learned":
        return (1 + (x @ module.weight.transpose(1, 2)).exp()).log()
    y = x / x.shape[-1] ** 0.25
    return (y @ module.projection.transpose(1, 2) - (y**2).sum(-1, keepdim=True) / 2).exp()


def cubic(normaliser, coefficients, scores, mask):
    """Scores of polynomial logits, and of the mask what the best of each row leave, row by row."""
    s, limit = scores, normaliser.get("clamp", 10.0)
    s = torch.where(s > limit, limit, torch.where(s < -limit, -limit, s))
    s = sum(coefficients[:, n, None, None] * s**n for n in range(4))
    kept = torch.zeros_like(mask.expand_as(s))
    for head, row in itertools.product(range(len(s)), range(s.shape[1])):
        allowed = mask.expand_as(s)[head, row]
        count = count_of(normaliser.get("ratio", 1.0), int(allowed.sum()))
        kept[head, row, best(s.detach()[head, row], allowed, count)] = True
    return s, kept


def approximated(x, keys, name):
    """Queries, keys, values or weights [heads, n, m] of a sequence as `approximate` leaves them, row by row; the gradient
    is that of x (straight-through)."""
    instead = x.detach().clone(memory_format=torch.contiguous_format)
    if name in ("q", "k") and keys.get("qk_topk"):
        for row in instead.flatten(0, 1):
            row[sorted(range(len(row)), key=lambda i: -abs(float(row[i])))[keys["qk_topk"] :]] = 0
    if name in keys.get("quantise", ()):
        bits = keys["bits"]
        for head in instead:
            largest = 2**bits - 1 if name == "map" else 2 ** (bits - 1) - 1
            step = 2.0**-bits if keys.get("form") == "fixed" else (float(head.abs().max()) / largest or 1.0)
            head.copy_((head / step).round() * step)
    return x + (instead - x.detach())


def over(weights):
    """Divided by their sum; rows of zeros stay."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def exponential(kind, normaliser, x):
    """exp, or the polynomial that stands for it, relative to the row's maximum, which is a constant."""
    top = x.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    if kind != "poly":
        return (x - top).exp()
    unit, coefficients = 1.0, (0.9996, -0.9922, 0.4626, -0.1025)
    if normaliser.get("base", 2) == 2:
        unit, coefficients = math.log(2), (0.999945, -0.691341, 0.230887, -0.039543)
        top = (top / unit).ceil() * unit
    absent = x == -torch.inf
    below = (top - x.masked_fill(absent, 0)) / unit
    whole = below.detach().floor()
    fraction = below - whole
    cubic = sum(c * fraction**n for n, c in enumerate(coefficients))
    cut = normaliser.get("cut")
    absent = absent if cut is None else absent | (below > -cut / unit)
    return (cubic * torch.exp(-whole * unit)).masked_fill(absent, 0)

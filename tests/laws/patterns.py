"""What every pattern means, told a second time and as plainly as possible: one pair, one row or one block at a time.

PATTERNS has for each name a config; `told(config)` is its oracle, by family of the pattern:

    fixed   oracle(i, j, i_block, j_block, frame) -> bool            i, j: (frame, row, column) of query and key
    chosen  oracle(chooser, q, k, allowed, block) -> bool [n, m]     q [n, D], k [m, D], allowed [n, m]: one head, fp64
    remade  oracle(module, q, k, v, filled, block, attend, near) -> [S, heads, n, D]
                filled [n] bool; near [n, n] bool or None; attend(q, k, v, mask) with a mask [n, m], or None for all

A new pattern has a line in ORACLES and one in PATTERNS.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from stgen.attention.pattern import Chosen, Fixed, Frame, Sites
from stgen.attention.patterns import KINDS
from stgen.ops.support import Support
from stgen.tokens import Grid, coordinates

# ------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """One joint sequence over a grid; under order tile the tiles at the far border are filled up with padding."""

    frame: Frame
    where: torch.Tensor  # [n, 3] coordinates
    blocks: torch.Tensor  # [n] number of the block of each place
    filled: torch.Tensor  # [n] bool: places that hold tokens
    block: int  # places of a block

    @property
    def places(self) -> int:
        return len(self.where)

    def support(self, pattern, device="cpu") -> Support:
        """The support of a fixed pattern, among the places that hold tokens."""
        where, blocks, filled = (x.to(device) for x in (self.where, self.blocks, self.filled))
        keys = Sites(*(x[None, None] for x in (*where.unbind(-1), blocks)))

        def allows(i):
            queries = Sites(*(x[i][None, :, None] for x in (*where.unbind(-1), blocks)))
            return pattern.allows(queries, keys, self.frame) & filled[i][:, None] & filled

        return Support.from_predicate(allows, self.places, self.places, (self.block, self.block), device=device)

    def oracle(self, oracle) -> torch.Tensor:
        """The dense mask [n, n] of a fixed pattern's oracle."""
        places = list(zip(map(tuple, self.where.tolist()), self.blocks.tolist(), self.filled.tolist(), strict=True))
        return torch.tensor(
            [[a and b and bool(oracle(i, j, m, n, self.frame)) for j, n, b in places] for i, m, a in places]
        )


def scene(grid: Grid, block=(2, 2, 2), order="raster", layer=0) -> Scene:
    extents = (grid.t, grid.h, grid.w)
    tile = tuple(min(b, n) for b, n in zip(block, extents, strict=True))
    size = math.prod(tile)
    where = coordinates(grid)
    if order == "tile":
        tiles = [range(-(-n // b)) for n, b in zip(extents, tile, strict=True)]
        origins = [(a, b, c) for a in tiles[0] for b in tiles[1] for c in tiles[2]]
        inside = coordinates(Grid(*tile))
        where = torch.cat([torch.tensor(origin) * torch.tensor(tile) + inside for origin in origins])
    filled = (where < torch.tensor(extents)).all(-1)
    where = where * filled[:, None]  # padding stands nowhere
    blocks = torch.arange(len(where)) // size
    return Scene(Frame(extents, tile, int(blocks[-1]) + 1, layer), where, blocks, filled, size)


def build(config: dict):
    return KINDS[config["kind"]](**config)


def family(config: dict) -> str:
    """fixed, chosen or remade."""
    kind = KINDS[config["kind"]]
    return "fixed" if issubclass(kind, Fixed) else "chosen" if issubclass(kind, Chosen) else "remade"


# ------------------------------------------------------------------------------------------------- fixed: pair by pair


def three(value):
    return (value,) * 3 if isinstance(value, int) else value


def full(i, j, i_block, j_block, frame):
    return True


def causal(i, j, i_block, j_block, frame):
    return j[0] <= i[0]


def local(radius):
    def oracle(i, j, i_block, j_block, frame):
        return all(abs(a - b) <= r for a, b, r in zip(i, j, three(radius), strict=True))

    return oracle


def local_clamped(radius):
    """Of all boxes of 2r + 1 places that fit into the axis, the one whose middle is nearest to the query."""

    def oracle(i, j, i_block, j_block, frame):
        for a, b, r, extent in zip(i, j, three(radius), frame.grid, strict=True):
            starts = range(max(1, extent - 2 * r))
            start = min(starts, key=lambda s, a=a, r=r: abs(s + r - a))
            if not start <= b <= start + 2 * r:
                return False
        return True

    return oracle


def strided(stride):
    def oracle(i, j, i_block, j_block, frame):
        return all(b in range(a % s, n, s) for a, b, s, n in zip(i, j, three(stride), frame.grid, strict=True))

    return oracle


def global_(frames=0, tokens=()):
    def oracle(i, j, i_block, j_block, frame):
        return any(place[0] in range(frames) or place in tokens for place in (i, j))

    return oracle


def scattered(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46CA68B5)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def random_(blocks, seed):
    def drawn(frame, query, key):
        x = 0
        for word in (seed, frame.layer, query, key):
            x = scattered(x ^ word)
        return x // 2, key

    def oracle(i, j, i_block, j_block, frame):
        order = sorted(range(frame.blocks), key=lambda key: drawn(frame, i_block, key))
        return j_block in order[:blocks]

    return oracle


def sliding_tile(window):
    """Of all windows that fit among the tiles, the one whose middle tile is nearest to the query's."""

    def oracle(i, j, i_block, j_block, frame):
        for a, b, size, tile, extent in zip(i, j, window, frame.block, frame.grid, strict=True):
            tiles = math.ceil(extent / tile)
            starts = range(max(1, tiles - size + 1))
            start = min(starts, key=lambda s, a=a, size=size, tile=tile: abs(s + (size - 1) // 2 - a // tile))
            if b // tile not in range(start, start + size):
                return False
        return True

    return oracle


def radial(density=1, sink_frames=1):
    def oracle(i, j, i_block, j_block, frame):
        (_, h, w), distance = frame.grid, abs(i[0] - j[0])
        if j[0] < sink_frames or distance <= 1:
            return True
        halvings = next(g for g in range(99) if 2 ** (g + 1) > distance)
        area = Fraction(density) * h * w / 2**halvings
        if area < 1:
            period = next(2**n for n in range(99) if 2**n * area >= 1)
            return i[1:] == j[1:] and distance % period == 0
        for a, b, side in ((i[1], j[1], h), (i[2], j[2], w)):
            odd = [m for m in range(1, side + 1, 2) if m == 1 or (m * m * h * w <= side * side * area and m <= area)]
            if abs(a - b) > odd[-1] // 2:
                return False
        return True

    return oracle


def recent(sinks, window):
    def oracle(i, j, i_block, j_block, frame):
        return j[0] in (*range(sinks), *range(i[0] - window + 1, i[0] + 1)) and j[0] <= i[0]

    return oracle


def checkerboard(i, j, i_block, j_block, frame):
    return sum(i) % 2 == sum(j) % 2


# -------------------------------------------------------------------------------------------------- chosen: row by row


def count_of(ratio, number):
    return max(1, math.floor(Fraction(str(ratio)) * number)) if number else 0


def best(scores, allowed, count):
    """Indices of the `count` largest of a list of scores, ties to the lower index."""
    return sorted((j for j in range(len(scores)) if allowed[j]), key=lambda j: (-float(scores[j]), j))[:count]


def runs(n, block):
    return [range(a, min(a + block, n)) for a in range(0, n, block)]


def means(x, filled, block):
    rows = [[x[i] for i in run if filled[i]] for run in runs(len(x), block)]
    return torch.stack([torch.stack(r).mean(0) if r else torch.zeros_like(x[0]) for r in rows])


def pooled(q, k, allowed, block):
    """Scores of blocks, and which pairs of blocks hold an allowed pair of places."""
    scores = means(q, allowed.any(1), block) @ means(k, allowed.any(0), block).T * q.shape[1] ** -0.5
    pairs = [[bool(allowed[list(a)][:, list(b)].any()) for b in runs(len(k), block)] for a in runs(len(q), block)]
    return scores, pairs


def places_of(kept, allowed, block):
    """The mask of the kept pairs of blocks, given as the key blocks of each query block."""
    mask = torch.zeros_like(allowed)
    for a, row in enumerate(kept):
        for b in row:
            mask[a * block : (a + 1) * block, b * block : (b + 1) * block] = True
    return mask & allowed


def topk_tokens(ratio):
    def oracle(chooser, q, k, allowed, block):
        mask = torch.zeros_like(allowed)
        for i in range(len(q)):
            mask[i, best(q[i] @ k.T, allowed[i], count_of(ratio, int(allowed[i].sum())))] = True
        return mask

    return oracle


def topk_blocks(ratio):
    def oracle(chooser, q, k, allowed, block):
        scores, pairs = pooled(q, k, allowed, block)
        rows = zip(scores, pairs, strict=True)
        return places_of([best(s, p, count_of(ratio, sum(p))) for s, p in rows], allowed, block)

    return oracle


def entropy(ratio):
    def oracle(chooser, q, k, allowed, block):
        scores, pairs = pooled(q, k, allowed, block)
        most = [sum(p) for p in pairs]
        total = max(round(ratio * sum(most)), sum(m > 0 for m in most))
        need = []
        for s, p in zip(scores, pairs, strict=True):
            weights = [math.exp(x - max(s.tolist())) if ok else 0.0 for x, ok in zip(s.tolist(), p, strict=True)]
            weights = [x / (sum(weights) or 1) for x in weights]
            need.append(math.exp(-sum(x * math.log(x) for x in weights if x > 0)))
        low, high = 0.0, 1e6
        for _ in range(200):
            factor = (low + high) / 2
            shares = [min(max(factor * n, min(m, 1)), m) for n, m in zip(need, most, strict=True)]
            low, high = (low, factor) if sum(shares) >= total else (factor, high)
        counts = [math.floor(x) for x in shares]
        for i in sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))[: total - sum(counts)]:
            counts[i] += 1
        rows = zip(scores, pairs, counts, strict=True)
        return places_of([best(s, p, c) for s, p, c in rows], allowed, block)

    return oracle


def unit(x):
    return [row / row.norm() for row in x]


def bucket(x, centroids):
    return max(range(len(centroids)), key=lambda c: float(x @ centroids[c]))


def fitted(points, clusters, iterations):
    centroids = [max(points, key=lambda x: float(x @ sum(points)))]
    while len(centroids) < clusters:
        centroids.append(max(points, key=lambda x: min(1 - float(x @ c) for c in centroids)))
    for _ in range(iterations):
        taken = [bucket(x, centroids) for x in points]
        members = [[x for x, t in zip(points, taken, strict=True) if t == c] for c in range(clusters)]
        centroids = [sum(m) / sum(m).norm() if m else old for m, old in zip(members, centroids, strict=True)]
    return centroids


def hashed(width, clusters, seed):
    drawn = torch.randn(clusters, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return unit(drawn)


def cluster(clusters, iterations=4, neighbours=0, seed=None):
    def oracle(chooser, q, k, allowed, block):
        tokens_q, tokens_k = allowed.any(1), allowed.any(0)
        mask = torch.zeros_like(allowed)
        if not allowed.any():
            return mask
        points = unit(q[tokens_q]) + unit(k[tokens_k])
        centroids = fitted(points, clusters, iterations) if seed is None else hashed(q.shape[1], clusters, seed)
        taken = {j: bucket(k[j] / k[j].norm(), centroids) for j in range(len(k)) if tokens_k[j]}
        for i in range(len(q)):
            order = sorted(set(taken.values()), key=lambda c: -float(q[i] @ centroids[c]))
            mask[i, [j for j, c in taken.items() if c in order[: 1 + neighbours]]] = True
        return mask & allowed

    return oracle


def learned(ratio):
    def oracle(chooser, q, k, allowed, block):
        _, pairs = pooled(q, k, allowed, block)
        mapped_q = means(q, allowed.any(1), block) @ chooser.to_q.weight.detach().T
        mapped_k = means(k, allowed.any(0), block) @ chooser.to_k.weight.detach().T
        rows = zip(mapped_q @ mapped_k.T, pairs, strict=True)
        return places_of([best(s, p, count_of(ratio, sum(p))) for s, p in rows], allowed, block)

    return oracle


# ---------------------------------------------------------------------------------------------- remade: block by block


def linformer(module, q, k, v, filled, block, attend, near):
    tokens = [j for j in range(len(filled)) if filled[j]]
    keys = sum(module.E[:, j, None] * k[..., j, None, :] for j in tokens)
    values = sum(module.F[:, j, None] * v[..., j, None, :] for j in tokens)
    return attend(q, keys, values, None)


def convolution(module, q, k, v, filled, block, attend, near):
    cuts = [[j for j in run if filled[j]] for run in runs(len(filled), block)]

    def compress(x, weight):
        parts = [sum(x[:, :, j] * weight[:, j % block] for j in cut) / len(cut) for cut in cuts if cut]
        return torch.stack(parts, dim=2)

    return attend(q, compress(k, module.for_k), compress(v, module.for_v), None)


def sinkhorn(temperature, iterations):
    def sorting(scores):
        matrix = (scores / temperature).exp()
        for _ in range(iterations):
            matrix = matrix / matrix.sum(1, keepdim=True)
            matrix = matrix / matrix.sum(0, keepdim=True)
        return matrix

    def one(q, k, v, filled, block, attend):
        cuts = [list(run) for run in runs(len(filled), block) if filled[list(run)].any()]
        allowed = filled[:, None] & filled
        scores = means(q, filled, block) @ means(k, filled, block).T * q.shape[-1] ** -0.5
        present = [bool(filled[list(run)].any()) for run in runs(len(filled), block)]
        matrix = sorting(scores[present][:, present])
        out = torch.zeros_like(v)
        for b, cut in enumerate(cuts):
            keys, values = [k[j] for j in cut if filled[j]], [v[j] for j in cut if filled[j]]
            for p in range(block):
                held = [(a, other[p]) for a, other in enumerate(cuts) if p < len(other) and filled[other[p]]]
                if held:
                    keys.append(sum(matrix[b, a] * k[j] for a, j in held))
                    values.append(sum(matrix[b, a] * v[j] for a, j in held))
            mask = allowed[cut].any(1)[:, None].expand(-1, len(keys))
            given = (x[None, None] for x in (q[cut], torch.stack(keys), torch.stack(values)))
            out[cut] = attend(*given, mask)[0, 0]
        return out

    def oracle(module, q, k, v, filled, block, attend, near):
        heads = zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True)
        return torch.stack([one(*head, filled, block, attend) for head in heads]).view_as(q)

    return oracle


def three_way(branches, ratio):
    def oracle(module, q, k, v, filled, block, attend, near):
        allowed = filled[:, None] & filled
        cuts = [[j for j in run if filled[j]] for run in runs(len(filled), block)]
        out = torch.zeros_like(v)
        for b, name in enumerate(branches):
            gate = torch.sigmoid((v[..., None] * module.gate[:, None]).sum(3)[..., b] + module.gate_bias[..., b])
            if name == "compress":
                keys, values = (torch.stack([x[:, :, c].mean(2) for c in cuts if c], dim=2) for x in (k, v))
                branch = attend(q, keys, values, None)
            elif name == "slide":
                branch = attend(q, k, v, near & allowed)
            else:
                chosen = topk_blocks(ratio)
                heads = zip(q.detach().flatten(0, 1), k.detach().flatten(0, 1), strict=True)
                masks = torch.stack([chosen(None, a, b, allowed, block) for a, b in heads])
                branch = attend(q, k, v, masks.view(*q.shape[:2], *allowed.shape))
            out = out + gate[..., None] * branch
        return out

    return oracle


# -------------------------------------------------------------------------------------------------------- all of them

ORACLES = {
    "full": lambda p: full,
    "causal": lambda p: causal,
    "local": lambda p: local_clamped(p.radius) if p.border == "clamp" else local(p.radius),
    "strided": lambda p: strided(p.stride),
    "global": lambda p: global_(p.frames, p.tokens),
    "random": lambda p: random_(p.blocks, p.seed),
    "sliding_tile": lambda p: sliding_tile(p.window),
    "radial": lambda p: radial(p.density, p.sink_frames),
    "recent": lambda p: recent(p.sinks, p.window),
    "checkerboard": lambda p: checkerboard,
    "topk": lambda p: topk_blocks(p.ratio) if p.level == "block" else topk_tokens(p.ratio),
    "entropy": lambda p: entropy(p.ratio),
    "cluster": lambda p: cluster(p.clusters, p.iterations, p.neighbours, p.seed if p.method == "lsh" else None),
    "learned": lambda p: learned(p.ratio),
    "linformer": lambda p: linformer,
    "convolution": lambda p: convolution,
    "sinkhorn": lambda p: sinkhorn(p.temperature, p.iterations),
    "three_way": lambda p: three_way(p.branches, p.ratio),
}


def told(config: dict):
    """The oracle of the pattern that a config describes."""
    return ORACLES[config["kind"]](build(config))


PATTERNS = {
    "full": {"kind": "full"},
    "causal": {"kind": "causal"},
    "local": {"kind": "local", "radius": 1},
    "local, per axis": {"kind": "local", "radius": (0, 2, 1)},
    "local, clamped": {"kind": "local", "radius": (1, 1, 2), "border": "clamp"},
    "strided": {"kind": "strided", "stride": 2},
    "strided, per axis": {"kind": "strided", "stride": (1, 3, 2)},
    "global": {"kind": "global", "frames": 1},
    "global, tokens": {"kind": "global", "tokens": [(0, 0, 0), (1, 2, 1)]},
    "random": {"kind": "random", "blocks": 2, "seed": 7},
    "sliding_tile": {"kind": "sliding_tile", "window": (3, 1, 1)},
    "sliding_tile, even": {"kind": "sliding_tile", "window": (1, 2, 2)},
    "radial": {"kind": "radial"},
    "radial, sparse": {"kind": "radial", "density": 0.25, "sink_frames": 0},
    "recent": {"kind": "recent", "sinks": 1, "window": 2},
    "checkerboard": {"kind": "checkerboard"},
    "topk": {"kind": "topk", "ratio": 0.4},
    "topk, tokens": {"kind": "topk", "ratio": 0.29, "level": "token"},
    "entropy": {"kind": "entropy", "ratio": 0.5},
    "cluster": {"kind": "cluster", "clusters": 4},
    "cluster, neighbours": {"kind": "cluster", "clusters": 5, "neighbours": 1},
    "cluster, lsh": {"kind": "cluster", "clusters": 4, "method": "lsh", "seed": 3},
    "learned": {"kind": "learned", "ratio": 0.4, "width": 3},
    "linformer": {"kind": "linformer", "keys": 5},
    "convolution": {"kind": "convolution"},
    "sinkhorn": {"kind": "sinkhorn"},
    "sinkhorn, sharp": {"kind": "sinkhorn", "temperature": 0.1, "iterations": 3},
    "three_way": {"kind": "three_way", "ratio": 0.4, "radius": 1},
    "three_way, compress": {"kind": "three_way", "branches": ["compress"]},
    "three_way, select": {"kind": "three_way", "branches": ["select"], "ratio": 0.3},
    "three_way, slide": {"kind": "three_way", "branches": ["slide"], "radius": (0, 1, 1)},
}

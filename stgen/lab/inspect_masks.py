"""What the heads of a plan may attend, as arrays to draw: a plane of tokens or blocks, and the view of single queries.

Fixed patterns are read off their supports. Patterns chosen from the data are shown by one example: on the queries and
keys handed in, or on random ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from stgen.attention.attend import Heads, Mixer
from stgen.attention.layout import Layout, places
from stgen.attention.pattern import Remade
from stgen.attention.patterns import is_fixed
from stgen.attention.patterns.full import Full
from stgen.model import VideoTransformer
from stgen.ops.support import ALL, SOME, Support
from stgen.tokens import Grid

DRAWN_TOKENS = 512  # up to so many tokens a plane shows every pair, beyond it pairs of blocks
DRAWN_BLOCKS = 1024  # cells of a plane along one side, at most
EXAMPLE_PAIRS = 1 << 25  # pairs of places, all sequences and heads, that an example may look at


@dataclass(frozen=True)
class View:
    """What one query sees."""

    query: tuple[int, int, int]  # frame, row, column
    seen: Tensor  # [frames, rows, columns] share of the heads that may attend the token


@dataclass(frozen=True)
class Drawing:
    """What some heads may attend."""

    plane: Tensor  # [rows, columns] 0 nothing to 1 everything; the share of heads where they choose differently
    of: str  # what its rows and columns are
    views: tuple[View, ...]
    frames: int  # of the grid that is drawn: lines between frames where the plane shows all tokens
    note: str = ""  # what the drawing is an example of


Chosen = tuple[Tensor, Tensor]  # queries and keys [1, N, heads, D] of the tokens of one clip


def mixers_of(transformer: VideoTransformer) -> list[Mixer]:
    """Every use of a mixer, in the order of the plan: that of their numbers."""
    return [module for module in transformer.modules() if isinstance(module, Mixer)]


def runs_of(mixer: Mixer) -> list[Heads]:
    """The runs of heads that do the same."""
    return [run for run in mixer.runs if isinstance(run, Heads)]


def draw(heads: Heads, grid: Grid, chosen: Chosen | None = None) -> Drawing:
    """What `heads` may attend on `grid`. `chosen`: queries and keys to choose with; None draws random ones.

    Masks come from real positions, also where the weights of `heads` hold no numbers (a model built in fake mode).
    """
    pattern = heads.group.pattern
    if is_fixed(pattern):
        return _drawing(_fixed_support(heads, grid), heads.layout, grid)
    if isinstance(pattern, Remade):
        near = pattern.near
        support = _every(heads, grid) if near is None else heads.selection.fixed(near, grid, "cpu")
        what = "the tokens that its keys are made of" if near is None else f"its branch of {near.kind} keys"
        return _drawing(support, heads.layout, grid, f"{pattern.kind} attends keys made from the data; drawn is {what}")
    if chosen is not None:
        support = heads.selection(*(heads.layout.fold(x.float().cpu(), grid) for x in chosen), grid)
        return _drawing(support, heads.layout, grid, "chosen from the data: an example, of one clip and time")
    small = example_grid(heads, grid)
    q, k, fresh = _random(heads, small)
    where = "" if small == grid else f", on a smaller grid of {small}"
    note = f"chosen from the data: an example on random queries and keys{where}"
    return _drawing(fresh.selection(q, k, small), heads.layout, small, note)


def example_grid(heads: Heads, grid: Grid) -> Grid:
    """The grid, its longest axes halved until an example of a chosen pattern is small enough to look at every pair."""
    t, h, w = grid.t, grid.h, grid.w

    def pairs() -> int:
        sequences, length = heads.layout.sequence(Grid(t, h, w))
        return heads.group.count * sequences * length**2

    while pairs() > EXAMPLE_PAIRS:
        if t >= max(h, w):
            t = -(-t // 2)
        else:
            h, w = -(-h // 2), -(-w // 2)
    return Grid(t, h, w)


def support_rows(support: Support, groups: Tensor, rows: Tensor) -> Tensor:
    """The mask of some rows of some groups, without building the rest.

    Args:
        groups: [s] int64.
        rows: [s, r] int64, places of the queries.

    Returns:
        [s, heads, r, m] bool.
    """
    (bq, bk), at = support.block, rows // support.block[0]
    codes = support.table[groups].gather(2, at[:, None, :, None].expand(-1, support.heads, -1, support.table.shape[3]))
    slots = support.slots[groups].gather(2, at[:, None, :, None].expand_as(codes))
    mask = (codes == ALL).unsqueeze(-1).repeat(1, 1, 1, 1, bk)  # [s, heads, r, key blocks, block keys]
    some = codes == SOME
    within = (rows % bq)[:, None, :, None].expand_as(codes)
    mask[some] = support.bits[slots[some], within[some]]
    return mask.flatten(3)[..., : support.keys]


# ------------------------------------------------------------------------------------------------------------ supports


def _fixed_support(heads: Heads, grid: Grid) -> Support:
    """The support of a fixed pattern, shared with `density`, which has built it already."""
    selection = heads.selection
    if isinstance(selection.pattern, Full):
        return _every(heads, grid)
    return selection.fixed(selection.pattern, grid, "cpu", extended=True)


def _every(heads: Heads, grid: Grid) -> Support:
    """Every token of the sequence."""
    if heads.layout.key_mask(grid, torch.device("cpu")) is not None:
        return heads.selection.fixed(Full(), grid, "cpu")
    setting = heads.setting(grid)
    return Support.full(setting.places, setting.places, (setting.block, setting.block))


def _random(heads: Heads, grid: Grid) -> tuple[Tensor, Tensor, Heads]:
    """Folded random queries and keys, and heads like these with weights of their own, all of one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Heads(heads.use, heads.group, heads.head_dim, grid, registers=0)
        shape = (1, grid.tokens, heads.group.count, heads.head_dim)
        q, k = (heads.layout.fold(torch.randn(shape), grid) for _ in range(2))
    return q, k, fresh


# ------------------------------------------------------------------------------------------------------------ drawings


def _drawing(support: Support, layout: Layout, grid: Grid, note: str = "") -> Drawing:
    """`support` may have registers and sinks before its places; only tokens are drawn."""
    support = support.unordered()
    where, filled = places(layout, grid)  # [sequences, n, 3], [sequences, n]
    centre = (grid.t // 2, grid.h // 2, grid.w // 2)
    views = tuple(_view(support, where, filled, grid, query) for query in dict.fromkeys((centre, (0, 0, 0))))
    plane, of = _plane(support, where, filled, grid, centre)
    return Drawing(plane, of, views, grid.t, note)


def _view(support: Support, where: Tensor, filled: Tensor, grid: Grid, query: tuple[int, int, int]) -> View:
    sequence, place = _find(where, filled, query)
    front, n = support.queries - where.shape[1], where.shape[1]
    group = torch.tensor([sequence % support.groups])
    row = support_rows(support, group, torch.tensor([[front + place]]))[0, :, 0, -n:]  # [heads, n]
    seen = torch.zeros(grid.t, grid.h, grid.w)
    at = where[sequence][filled[sequence]]
    seen[at.unbind(-1)] = row.float().mean(0)[filled[sequence]]
    return View(query, seen)


def _plane(
    support: Support, where: Tensor, filled: Tensor, grid: Grid, centre: tuple[int, int, int]
) -> tuple[Tensor, str]:
    """All pairs of tokens, or those of the sequence of the centre token, or its pairs of blocks."""
    n = where.shape[1]
    if grid.tokens <= DRAWN_TOKENS:
        numbers = where @ torch.tensor([grid.h * grid.w, grid.w, 1])  # of tokens, [sequences, n]
        mask = support.dense()[..., -n:, -n:].float().mean(1)  # [groups, n, n]
        plane = torch.zeros(grid.tokens, grid.tokens)
        for s, (number, there) in enumerate(zip(numbers, filled, strict=True)):
            own = number[there]
            plane[own[:, None], own] = mask[s % support.groups][there][:, there]
        return plane, f"all {grid.tokens} tokens of the clip"
    sequence = _find(where, filled, centre)[0] % support.groups
    of_one = "" if len(where) == 1 else f", one of {len(where)} sequences"
    if n <= DRAWN_TOKENS:
        rows = torch.arange(support.queries - n, support.queries)[None]
        return support_rows(support, torch.tensor([sequence]), rows)[0, ..., -n:].float().mean(0), f"{n} tokens{of_one}"
    blocks = -(-n // support.block[0])
    plane = support.table[sequence, :, -blocks:, -blocks:].float().mean(0) / ALL
    if blocks > DRAWN_BLOCKS:
        plane = adaptive_avg_pool2d(plane[None], DRAWN_BLOCKS)[0]
    return plane, f"{blocks} blocks of {support.block[0]} tokens{of_one}"


def _find(where: Tensor, filled: Tensor, query: tuple[int, int, int]) -> tuple[int, int]:
    """Sequence and place of a token."""
    found = (where == torch.tensor(query)).all(-1) & filled
    sequence, place = torch.nonzero(found)[0].tolist()
    return sequence, place

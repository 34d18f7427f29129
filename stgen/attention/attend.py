"""Attention over a video's tokens, as the plan's mixers say.

    out_i = sum over j in S(i) of f(s_ij) v_j / (mass_i + sink_i)

One attention projects queries, keys and values, shares its heads among the mixers of a branch, and projects what they
put out. A mixer's heads go through the rooms in turn: layout (fold), pattern (S), sink, normaliser (f, mass), layout
(unfold). What a mixer takes from an earlier layer comes in by the carry; what later layers take goes out by it.
"""

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from stgen.attention import layout, normalisers, spec
from stgen.attention.approximate import Approximation
from stgen.attention.cascade import PRUNED, place_apart
from stgen.attention.memory import Infini, Ring, RingState, State
from stgen.attention.packed import Packed
from stgen.attention.pattern import Frame, Pattern, PatternError, Remade, Setting
from stgen.attention.patterns import AllOf, is_fixed, leaves
from stgen.attention.patterns.causal import Causal
from stgen.attention.patterns.full import Full
from stgen.attention.patterns.recent import Recent
from stgen.attention.reuse import Carry, Kept, Use
from stgen.attention.selection import EVERY, Selection, across
from stgen.attention.sinks import Sink
from stgen.attention.spec import AttentionMixer, HeadGroup, Linear
from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.boxes import Boxes
from stgen.ops.column_mass import column_mass
from stgen.ops.cost import Work, attention_flops, linear_attention_flops, linear_flops
from stgen.ops.dense_attention import attention_map, dense_attention
from stgen.ops.linear_attention import linear_attention
from stgen.ops.norm_rope import norm_rope
from stgen.ops.normaliser import Normaliser
from stgen.ops.rms_norm import rms_norm
from stgen.ops.short_attention import apply_map, short_attention, takes_kernels
from stgen.ops.support import Support
from stgen.tokens import Grid, coordinates, rotate

PROJECTED = {"none": "qkv", "support": "qkv", "kv": "q", "map": "v", "output": ""}  # by what a mixer takes


class HeadNorm(nn.Module):
    """RMS norm of queries or keys per head, with a gain (Henry et al. 2020; ViT-22B, arXiv:2302.05442)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """x normed; without x the gain, for what norms and does more in one pass.

        The gain too is read by a call: what offloads weights brings those of a module back when it is called, and away
        afterwards (hence a view, which stays).
        """
        return self.gain.view_as(self.gain) if x is None else rms_norm(x, self.gain)


class Heads(nn.Module):
    """Heads of a mixer that do the same. Sequences carry `registers` global tokens before their own."""

    def __init__(self, use: Use, group: HeadGroup, head_dim: int, grid: Grid, registers: int):
        super().__init__()
        self.use, self.group, self.head_dim, self.registers = use, group, head_dim, registers
        keys = use.keys
        self.layout = _layout(keys, use.shift)
        setting = self.setting(grid)
        self.sink = Sink(group.sink, group.normaliser, group.count, head_dim, weighs=use.takes != "map")
        if self.sink.count > setting.places:
            raise PatternError(
                f"sink: {self.sink.count} tokens are more than the {setting.places} places of a "
                f"sequence; write count: {setting.places} or less"
            )
        seed = torch.initial_seed() + 64 * use.number + group.first
        built = normalisers.build(group.normaliser, group.count, head_dim, seed=seed)
        self.features = built if isinstance(built, normalisers.Features) else None  # of linear attention
        self.polynomial = built if isinstance(built, normalisers.Polynomial) else None
        self.normaliser = built if isinstance(built, Normaliser) else Normaliser()
        self.selection = Selection(group.pattern, self.layout, setting, registers, self.sink.count)
        self.approximation = None if keys.approximate.is_exact else Approximation(keys.approximate)
        self.remade: Any = self.pattern.mixer(setting) if isinstance(self.pattern, Remade) else None
        self.without_support = self.features is not None or isinstance(group.pattern, Full | Remade)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, support: Support | None = None
    ) -> tuple[Tensor, Support | None]:
        """What the heads put out for q, k, v [B, N, heads, D], in the same shape, and the support they used.

        `support` is one taken from an earlier layer.
        """
        if (boxes := self._boxes(q, grid)) is not None:
            support = support or self._support_in_place(q, k, grid)
            return self._in_place(q, k, v, boxes, support), support
        q, k, v = (self._entering(x, name, grid) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        if isinstance(q, FakeTensor):
            # A dry run has no numbers to choose by; dense attention keeps tensors of the same size for the backward.
            return self._unfold(dense_attention(q, k, v), grid), None
        if self.remade is not None:
            return self._unfold(self._remake(self.pattern, q, k, v, grid), grid), None
        if self.features is not None:
            return self._unfold(self._sum_features(self.features, q, k, v, grid), grid), None
        support = support or self._support(q, k, grid)
        return self._unfold(self._weigh(q, k, v, support, self._key_mask(grid, q), self._rows(grid, q)), grid), support

    def with_map(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """What the heads put out [B, N, heads, D], and the weights that they used [S, heads, n, m]."""
        if (boxes := self._boxes(q, grid)) is not None:
            return self._in_place(q, k, v, boxes, self._support_in_place(q, k, grid), return_map=True)
        weights = self.map(q, k, grid)
        return self.apply_map(weights, v, grid), weights

    def map(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """The weights themselves: [S, heads, n, m], sink tokens and then registers first among the m keys."""
        q, k = self._entering(q, "q", grid), self._entering(k, "k", grid)
        support = self._support(q, k, grid)
        k = self._with_sink(k, self.sink("k"), support)
        return self._map(q, k, support, self._key_mask(grid, q), self._rows(grid, q))

    def apply_map(self, weights: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Weights, of this layer or an earlier one, on values [B, N, heads, D] -> the same shape."""
        if (boxes := self._boxes(v, grid)) is not None:
            return apply_map(weights, v, boxes, self.sink("v"))
        v = self._entering(v, "v", grid)
        v = self.sink.before(v, self.sink("v"), weights.shape[-1] - v.shape[2])
        return self._unfold(weights.to(v.dtype) @ v, grid)

    def column_mass(self, q: Tensor, k: Tensor) -> Tensor:
        """What each token receives of the weights of q, k [B, N, heads, D] under joint layout and full pattern: [B, N]."""
        q, k = (x.detach().transpose(1, 2) for x in (q, k))  # in whatever order: all attend all
        if self.approximation is not None:
            q, k = self.approximation(q, "q"), self.approximation(k, "k")
        k = self._with_sink(k, self.sink("k"), None)
        return column_mass(q, k, self.normaliser, self.sink.logit(q))[:, self.sink.count :]

    def on_ring(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, ring: Ring, state: RingState) -> Tensor:
        """What the heads put out for a chunk's q [B, N, heads, D] on the keys and values of a ring's slots."""
        plain, slots = layout.Plain(self.use.keys.layout), Grid(state.k.shape[1], grid.h, grid.w)
        q, k, v = (plain.fold(x, g) for x, g in ((q, grid), (k, slots), (v, slots)))
        if self.approximation is not None:
            q, k, v = (self.approximation(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        if (support := state.memo.get((self, grid))) is None:
            support = state.memo[self, grid] = self._ring_support(plain, slots, grid, ring, state)
        return plain.unfold(self._weigh(q, k, v, support, None), grid)

    def _ring_support(self, plain: layout.Plain, slots: Grid, grid: Grid, ring: Ring, state: RingState) -> Support:
        """Which slots a chunk's queries attend."""
        queries, keys = coordinates(grid, state.k.device), ring.where(state, grid)
        queries[:, 0] += state.frames
        queries, keys = (plain.fold(x[None, :, None], g)[:, 0] for x, g in ((queries, grid), (keys, slots)))
        pattern = AllOf(all=[Recent(sinks=ring.sinks, window=ring.window), self.pattern])
        frame = Frame((state.frames + grid.t, grid.h, grid.w), (1, 1, 1), 1, self.use.layer)
        support = across(pattern, queries, keys, frame, self.setting(grid).block)
        if support.groups > 1 and ((mask := support.dense()) == mask[:1]).all():  # alike for all pixels: kept once
            support = Support.from_mask(mask[:1], support.block)
        return support.extended(0, self.sink.count) if self.sink.count else support

    # ------------------------------------------------------------------------------------------ from room to room

    def _support(self, q: Tensor, k: Tensor, grid: Grid) -> Support | None:
        """What folded queries and keys attend; None for every place that holds a token."""
        if self.without_support or isinstance(q, FakeTensor):
            return None
        front = self._front(grid)
        return self.selection(q[:, :, front:], k[:, :, front:], grid)

    def _weigh(
        self, q: Tensor, k: Tensor, v: Tensor, support: Support | None, mask: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        """q [S, heads, n, D] on k, v [S, heads, m, D] and the sink -> [S, heads, n, D]."""
        k, v = self._with_sink(k, self.sink("k"), support), self._with_sink(v, self.sink("v"), support)
        if self.makes_map:
            return self._map(q, k, support, mask, rows) @ v
        if support is None:
            return dense_attention(q, k, v, mask, normaliser=self.normaliser, sink=self.sink.logit(q))
        return block_sparse_attention(q, k, v, support, self.normaliser, self.sink.logit(q))

    def _in_place(
        self, q: Tensor, k: Tensor, v: Tensor, boxes: Boxes, support: Support | None, return_map: bool = False
    ) -> Any:
        """The same for tokens [B, N, heads, D] that stay where they are: short sequences by kernels."""
        mask = None if support is None else self._mask(support, len(q) * boxes.count)
        sink_k, sink_v, logit = self.sink("k"), self.sink("v"), self.sink.logit(q)
        return short_attention(
            q, k, v, boxes, self.normaliser, logit, sink_k=sink_k, sink_v=sink_v, mask=mask, return_map=return_map
        )

    def _support_in_place(self, q: Tensor, k: Tensor, grid: Grid) -> Support | None:
        """The support for tokens that are not folded otherwise; one of positions alone looks at none of them."""
        if self.without_support or is_fixed(self.pattern):
            return self._support(q, k, grid)
        return self._support(self._fold(q, grid), self._fold(k, grid), grid)

    def _mask(self, support: Support, sequences: int) -> Tensor:
        """A support as a mask of the sequences' own keys [sequences or 1, heads or 1, n, n]."""
        if (known := support.memo.get((Heads, sequences))) is not None:
            return known
        mask = support.dense()[..., support.keys - support.queries :]  # without the columns of the sink
        if is_fixed(self.pattern) and (mask == mask[:1]).all():
            mask = mask[:1]
        if len(mask) > 1:
            mask = mask.repeat(sequences // len(mask), 1, 1, 1)
        support.memo[Heads, sequences] = mask
        return mask

    def _boxes(self, x: Tensor, grid: Grid) -> Boxes | None:
        """The sequences as boxes, if kernels attend them where their tokens x [B, N, heads, D] lie."""
        plain = self.features is None and self.remade is None and self.approximation is None and not self.makes_map
        boxes = self.layout.boxes(grid) if plain and not self.registers else None
        return boxes if boxes is not None and takes_kernels(x, boxes, self.sink.v) else None

    def _map(
        self, q: Tensor, k: Tensor, support: Support | None, mask: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        """The weights of q [S, heads, n, D] on keys k [S, heads, m, D], the sink's among them: [S, heads, n, m]."""
        weights = attention_map(q, k, mask, support, self.normaliser, self.sink.logit(q), self.polynomial)
        if self.approximation is None:
            return weights
        if rows is not None:  # what padding attends has no part in how the others are rounded
            weights = weights.masked_fill(~rows.repeat(len(weights) // len(rows), 1)[:, None, :, None], 0)
        return self.approximation(weights, "map")

    @property
    def makes_map(self) -> bool:
        """Whether the weights are made whole, for what is done to them."""
        return self.polynomial is not None or (self.approximation is not None and self.approximation.needs_map)

    def _sum_features(self, phi: nn.Module, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """The same by sums over all keys (linear attention); under `causal` frame by frame."""
        k, v = self._with_sink(k, self.sink("k"), None), self._with_sink(v, self.sink("v"), None)
        causal = any(isinstance(leaf, Causal) for leaf in leaves(self.group.pattern))
        chunk = math.prod(self.layout.extents(grid)[1:]) if causal else None  # places of a frame
        mask = self._key_mask(grid, q)
        return linear_attention(phi(q, True), phi(k, False), v, key_mask=mask, chunk=chunk, prefix=self.sink.count)

    def _remake(self, pattern: Any, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """The same for a pattern that makes keys of its own."""

        def attend(q: Tensor, k: Tensor, v: Tensor, support: Support | None) -> Tensor:
            if support is not None and self.sink.count:
                support = support.extended(0, self.sink.count)
            return self._weigh(q, k, v, support, None, self._rows(grid, q))

        if self.selection.numbers.schedules:
            self.remade.become(pattern)
        near = None if pattern.near is None else self.selection.fixed(pattern.near, grid, q.device)
        return self.remade(q, k, v, self.selection.fixed(EVERY, grid, q.device), attend, near)

    def _with_sink(self, x: Tensor, rows: Tensor | None, support: Support | None) -> Tensor:
        """Keys or values with the sink's rows before them, in whole blocks where there are blocks."""
        block = 1 if support is None else support.block[1]
        return self.sink.before(x, rows, -(-self.sink.count // block) * block)

    @property
    def pattern(self) -> Pattern:
        """The pattern of the heads, its scheduled numbers as they are now."""
        return self.selection.pattern

    # ----------------------------------------------------------------------------------------------------- layout

    def setting(self, grid: Grid) -> Setting:
        tile = self.use.keys.block
        block = math.prod(min(a, b) for a, b in zip(tile, self.layout.extents(grid), strict=True))
        return Setting(self.group.count, self.head_dim, self.layout.sequence(grid)[1], block, tile, self.use.layer)

    def _front(self, grid: Grid) -> int:
        """Places before those of the tokens: the registers, in whole blocks where there are blocks."""
        block = 1 if self.without_support else self.setting(grid).block
        return -(-self.registers // block) * block

    def _entering(self, x: Tensor, name: str, grid: Grid) -> Tensor:
        """Queries, keys or values as sequences, and as exact as the mixer takes them."""
        x = self._fold(x, grid)
        return x if self.approximation is None else self.approximation(x, name)

    def _fold(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, registers + N, heads, D] -> [S, heads, n, D]; every sequence sees the registers."""
        own = self.layout.fold(x[:, self.registers :], grid)
        if not self.registers:
            return own
        shared = x[:, : self.registers].transpose(1, 2).repeat_interleave(len(own) // len(x), 0)
        return torch.cat([pad(shared, (0, 0, 0, self._front(grid) - self.registers)), own], dim=2)

    def _unfold(self, x: Tensor, grid: Grid) -> Tensor:
        """The way back; a register's outputs in the sequences of a clip are averaged."""
        own = self.layout.unfold(x[:, :, self._front(grid) :], grid)
        if not self.registers:
            return own
        shared = x[:, :, : self.registers].unflatten(0, (len(own), -1)).mean(1).transpose(1, 2)
        return torch.cat([shared, own], dim=1)

    def _key_mask(self, grid: Grid, q: Tensor) -> Tensor | None:
        """Which keys of each sequence are there, where no support says so: [S, m]; None for all."""
        mask = self.layout.key_mask(grid, q.device) if self.without_support else None  # [sequences of a clip, n]
        if mask is None:
            return None
        return pad(mask, (self.sink.count + self.registers, 0), value=True).repeat(len(q) // len(mask), 1)

    def _rows(self, grid: Grid, q: Tensor) -> Tensor | None:
        """Which rows of a map that is rounded are those of tokens or registers: [sequences of a clip, n]; None for all."""
        if self.approximation is None or not self.approximation.needs_map:
            return None
        present, front = self.layout.key_mask(grid, q.device), self._front(grid)
        if present is None and front == self.registers:
            return None
        present = q.new_ones(1, q.shape[2] - front, dtype=torch.bool) if present is None else present
        return pad(pad(present, (front - self.registers, 0)), (self.registers, 0), value=True)

    # ------------------------------------------------------------------------------------------------------- cost

    def work(self, grid: Grid) -> Work:
        """Operations of a forward pass over one clip, as executed and as full attention in this layout would cost."""
        sequences, setting = self.layout.sequence(grid)[0], self.setting(grid)
        queries = setting.places + self.registers
        dense = attention_flops(queries, queries + self.sink.count, setting.width)
        if self.use.takes == "map":
            executed = dense // 2  # P v alone
        elif "map" in self.use.lends or self.makes_map:
            executed = dense + self.selection.choosing_flops(setting)  # a map that is kept is made whole
        elif isinstance(pattern := self.pattern, Remade):
            executed = pattern.flops(setting)
        elif isinstance(self.group.normaliser, Linear):
            features = self.group.normaliser.size or self.head_dim
            executed = linear_attention_flops(
                queries, queries + self.sink.count, features, self.head_dim, setting.heads
            )
        else:
            executed = int(self.density(grid)[1] * dense)
            executed += 0 if self.use.takes == "support" else self.selection.choosing_flops(setting)
        return Work(sequences * executed, sequences * dense)

    def density(self, grid: Grid) -> tuple[float, float]:
        """Share of the pairs of tokens in a sequence that is kept, and of the pairs of blocks that is computed.

        Exact for fixed patterns; for those chosen from the data what they are set to keep, about; for those that make
        keys of their own, what they cost of full attention.
        """
        if isinstance(pattern := self.pattern, Remade):
            setting = self.setting(grid)
            share = pattern.flops(setting) / attention_flops(setting.places, setting.places, setting.width)
            return share, share
        return (1.0, 1.0) if self.without_support else self.selection.density(grid, self.setting(grid))


def _layout(keys: AttentionMixer, shift: tuple[int, int, int]) -> layout.Layout:
    """The layout in which a mixer's heads attend: the segments of a memory are windows in time."""
    if not isinstance(keys.memory, spec.Infini):
        return layout.build(keys.layout, keys.size, shift, keys.order, keys.block)
    side = sys.maxsize if keys.layout == "joint" else 1
    return layout.build("window", (keys.memory.segment, side, side), order=keys.order, tile=keys.block)


def _memory(use: Use, grid: Grid) -> Infini | Ring | None:
    """What a use carries over time; one that takes an earlier layer's output carries nothing."""
    keys: spec.Memory = use.keys.memory
    if isinstance(keys, spec.NoMemory) or use.takes == "output":
        return None
    spec.check_segment(keys, grid.t)
    if isinstance(keys, spec.Ring):
        return Ring(keys, grid.t)
    return Infini(keys, use.heads, normalisers.Fixed(normalisers.elu_plus_one))


class Mixer(nn.Module):
    """One use of a mixer in the plan: its share of the heads, in runs that do the same."""

    def __init__(self, use: Use, head_dim: int, grid: Grid, registers: int):
        super().__init__()
        self.use = use
        self.head_dim, self.registers = head_dim, registers
        runs = use.keys.head_groups(use.heads) if use.takes != "output" else []
        try:
            self.memory = _memory(use, grid)
            self.runs: Any = nn.ModuleList(Heads(use, run, head_dim, grid, registers) for run in runs)
        except PatternError as error:
            raise PatternError(f"mixers.{use.name}.{error}") from None

    def forward(self, q: Any, k: Any, v: Any, grid: Grid, carry: Carry) -> tuple[Tensor, Kept]:
        """q, k, v [B, N, heads, D], None where it needs none -> its heads' output, and what it leaves."""
        use = self.use
        taken: Any = None if use.source is None else carry[use.source]
        if use.takes == "output":
            return taken.output, Kept()
        if use.takes == "kv":
            k, v = taken.k, taken.v
        outputs, maps, supports = [], [], []
        for i, heads in enumerate(self.runs):
            own = slice(heads.group.first, heads.group.first + heads.group.count)
            if use.takes == "map":
                maps.append(taken.maps[i])
                outputs.append(heads.apply_map(maps[-1], v[:, :, own], grid))
            elif "map" in use.lends:
                out, weights = heads.with_map(*(x[:, :, own] for x in (q, k, v)), grid)
                outputs.append(out)
                maps.append(weights)
            else:
                given = taken.supports[i] if use.takes == "support" else None
                out, support = heads(*(x[:, :, own] for x in (q, k, v)), grid, given)
                outputs.append(out)
                supports.append(support)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        lends, pair = use.lends, "kv" in use.lends
        return out, Kept(
            k=k if pair else None,
            v=v if pair else None,
            output=out if "output" in lends else None,
            maps=maps if "map" in lends else [],
            supports=supports if "support" in lends else [],
        )

    def with_memory(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, rope: tuple[Tensor, Tensor] | None, carry: Carry
    ) -> tuple[Tensor, Kept]:
        """The same with a memory, for q and k that `rope` has not yet turned.

        Where the carry holds a memory of earlier frames, they are seen too, and what is left holds the next.
        """
        before = carry[self.use.number].memory if self.use.number in carry else None
        placed = (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))
        if isinstance(self.memory, Ring) and before is not None:
            out, after = self._on_ring(self.memory, placed[0], k, v, grid, rope is not None, before)
            kept = Kept(k=placed[1], v=v) if "kv" in self.use.lends else Kept()
        else:
            out, kept = self(*placed, v, grid, carry)
            after = None
        if isinstance(self.memory, Infini):
            out, after = self._recalled(self.memory, out, q, k, v, grid, before)
        output = out if "output" in self.use.lends else None
        return out, replace(kept, output=output, memory=None if before is None else after)

    def _recalled(
        self, memory: Infini, local: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: Grid, before: State | None
    ) -> tuple[Tensor, State]:
        """What the segments put out, mixed with what the memory yields; registers are of no time and stay as they are."""
        plain, r = layout.Plain(self.use.keys.layout), self.registers
        q, k, v = (plain.fold(x[:, r:], grid) for x in (q, k, v))  # [S, heads, n, D]
        places = min(memory.keys.segment, grid.t) * math.prod(plain.extents(grid)[1:])
        recalled, after = memory.recall(q, k, v, places, before)
        own = memory(local[:, r:], plain.unfold(recalled, grid))
        return (torch.cat([local[:, :r], own], dim=1) if r else own), after

    def _on_ring(
        self, ring: Ring, q: Tensor, k: Tensor, v: Tensor, grid: Grid, placed: bool, state: RingState
    ) -> tuple[Tensor, RingState]:
        """What a chunk's queries put out on the ring with the chunk in it."""
        ring.write(state, k, v, grid)
        keys, values = (x.to(q.dtype) for x in ring.read(state, grid, placed))
        outputs = []
        for heads in self.runs:
            own = slice(heads.group.first, heads.group.first + heads.group.count)
            outputs.append(heads.on_ring(*(x[:, :, own] for x in (q, keys, values)), grid, ring, state))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return out, RingState(state.k, state.v, state.frames + grid.t)

    def new_memory(self, batch: int, chunk: Grid, like: Tensor) -> State | RingState | None:
        """The memory of a video that has not begun, for chunks of at most `chunk` tokens; None without one."""
        if isinstance(self.memory, Ring):
            return self.memory.new(batch, chunk, self.use.heads, self.head_dim, like)
        if isinstance(self.memory, Infini):
            if chunk.t % (segment := self.memory.keys.segment):
                raise ValueError(
                    f"a chunk of {chunk.t} frames of tokens is no whole number of the segments of {segment} in "
                    f"mixers.{self.use.name}.memory; take a multiple of {segment}"
                )
            sequences = batch * layout.Plain(self.use.keys.layout).sequence(chunk)[0]
            return self.memory.new(sequences, self.use.heads, self.head_dim, like)
        return None

    def work(self, grid: Grid) -> Work:
        """Operations of a forward pass over one clip."""
        work = sum((heads.work(grid) for heads in self.runs), Work())
        if not isinstance(self.memory, Infini):
            return work
        plain, width = layout.Plain(self.use.keys.layout), self.use.heads * self.head_dim
        sequences, places = plain.sequence(grid)
        reads = places * (2 if self.memory.keys.delta else 1)  # the delta rule asks for keys what it holds of them
        recall = linear_attention_flops(reads, places, self.head_dim, self.head_dim, self.use.heads)
        every = places + self.registers
        return Work(work.executed + sequences * recall, sequences * attention_flops(every, every, width))


class MixersProcessor:
    """How `Attention` computes: each of its mixers on its share of the projections, their outputs side by side."""

    def __call__(
        self, attn: "Attention", x: Tensor, grid: Grid, rope: tuple[Tensor, Tensor] | None, carry: Carry
    ) -> tuple[Tensor, Carry]:
        parts = attn.project(x).split(attn.sizes, dim=-1) if attn.pieces else [x] * len(attn.sizes)
        outputs = []
        for mixer, part in zip(attn.mixers, parts, strict=True):
            q, k, v = attn.projected(part, PROJECTED[mixer.use.takes], rope if mixer.memory is None else None)
            if PRUNED in carry:  # no layer takes from another then
                out, carry = carry[PRUNED].mixed(mixer, q, k, v, grid, carry)
            else:
                if mixer.memory is None:
                    out, kept = mixer(q, k, v, grid, carry)
                else:
                    out, kept = mixer.with_memory(q, k, v, grid, rope, carry)
                leaves_some = mixer.use.lends or kept.memory is not None
                carry = {**carry, mixer.use.number: kept} if leaves_some else carry
            outputs.append(out)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return attn.to_out(out.flatten(2)), carry


class Attention(nn.Module, Packed):
    """Self-attention whose heads are shared evenly by the mixers of a branch (one mixer: all heads)."""

    _default_processor_cls = MixersProcessor
    _available_processors = [MixersProcessor]
    is_cross_attention = False
    packed = "to_qkv"

    def __init__(
        self, width: int, heads: int, uses: tuple[Use, ...], grid: Grid, qk_norm: bool = True, registers: int = 0
    ):
        super().__init__()
        head_dim = width // heads
        self.heads, self.head_dim, self.registers = heads, head_dim, registers
        self.mixers: Any = nn.ModuleList(Mixer(use, head_dim, grid, registers) for use in uses)
        self.sizes = [use.heads * head_dim * len(PROJECTED[use.takes]) for use in uses]
        self.pieces = [(name, use.heads * head_dim) for use in uses for name in PROJECTED[use.takes]]
        projected = "".join(PROJECTED[use.takes] for use in uses)
        self.to_qkv = nn.Linear(width, sum(self.sizes)) if projected else None
        self.q_norm = HeadNorm(head_dim) if qk_norm and "q" in projected else None
        self.k_norm = HeadNorm(head_dim) if qk_norm and "k" in projected else None
        self.to_out = nn.Linear(width, width)
        self.processor = MixersProcessor()

    def forward(self, x: Tensor, grid: Grid, rope: tuple[Tensor, Tensor] | None, carry: Carry) -> tuple[Tensor, Carry]:
        """x [B, registers + N, C] -> the same shape, and the carry with what this layer leaves for later ones.

        `rope` holds the tables of `tokens.rope_tables` for the grid, with a row that turns nothing for each register.
        """
        return self.processor(self, x, grid, rope, carry)

    def new_memories(self, batch: int, chunk: Grid, like: Tensor) -> dict[int, Any]:
        """What its mixers carry over time, of a video that has not begun, by number of the use."""
        new = {mixer.use.number: mixer.new_memory(batch, chunk, like) for mixer in self.mixers}
        return {number: memory for number, memory in new.items() if memory is not None}

    def projected(self, part: Tensor, names: str, rope: tuple[Tensor, Tensor] | None) -> Any:
        """Queries, keys and values [B, registers + N, heads, D], normed and placed; None for those not in `names`."""
        if not names:
            return None, None, None
        packed = part.unflatten(-1, (len(names), -1, self.head_dim))  # [B, registers + N, 3, heads, D]
        if names == "qkv":
            gain_q, gain_k = (None if norm is None else norm() for norm in (self.q_norm, self.k_norm))
            if rope is not None and rope[0].ndim == 3:
                return place_apart(norm_rope, packed, gain_q, gain_k, rope)
            return norm_rope(packed, gain_q, gain_k, rope)
        given = dict(zip(names, packed.unbind(2), strict=True))
        q, k = self._placed(given.get("q"), self.q_norm, rope), self._placed(given.get("k"), self.k_norm, rope)
        return q, k, given.get("v")

    @staticmethod
    def _placed(x: Any, norm: HeadNorm | None, rope: tuple[Tensor, Tensor] | None) -> Tensor | None:
        if x is not None and norm is not None:
            x = norm(x)
        return x if x is None or rope is None else rotate(x, rope)

    def work(self, grid: Grid) -> Work:
        """Operations of a forward pass over one clip."""
        tokens, width = self.registers + grid.tokens, self.to_out.in_features
        projections = linear_flops(tokens, width, sum(self.sizes) + width)
        return sum((mixer.work(grid) for mixer in self.mixers), Work(projections, projections))


class PromptProcessor:
    """How `CrossAttention` computes: every token attends the words that are not masked."""

    def __call__(self, attn: "CrossAttention", x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        q = attn.to_q(x).unflatten(-1, (attn.heads, attn.head_dim))  # [B, N, heads, D]
        k, v = attn.project(text).unflatten(-1, (2, attn.heads, attn.head_dim)).unbind(2)  # [B, L, heads, D]
        q, k = attn.q_norm(q), attn.k_norm(k)
        out = dense_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), text_mask)
        return attn.to_out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module, Packed):
    """Tokens attend the prompt; masked prompt places have no effect."""

    _default_processor_cls = PromptProcessor
    _available_processors = [PromptProcessor]
    is_cross_attention = True
    packed = "to_kv"

    def __init__(self, width: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.pieces = [("k", width), ("v", width)]
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.q_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(width, width)
        self.processor = PromptProcessor()

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """x [B, N, C], text [B, L, C], text_mask [B, L] or None for all -> [B, N, C]."""
        return self.processor(self, x, text, text_mask)

    def flops(self, tokens: int, text_tokens: int) -> int:
        width = self.heads * self.head_dim
        return (
            2 * linear_flops(tokens, width, width)
            + linear_flops(text_tokens, width, 2 * width)
            + attention_flops(tokens, text_tokens, width)
        )

"""Memory over time: what attention keeps of the frames that came before, in a space that does not grow.

infini: a state of fixed size that every segment of frames reads before it is written to (Infini-attention,
arXiv:2404.07143, section 2.1). Queries and keys enter it without positions (figure 1 there), so that it knows what was
seen and not when, and the number of segments is free.

ring: keys and values of the first frames and of the last ones (StreamingLLM, arXiv:2309.17453, section 3.2) in buffers
that are written in place. Keys lie in them before RoPE and are placed anew for every chunk, so that no distance is
longer than those of a training clip.

What a memory holds is handed in and returned; modules keep none of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stgen.attention import spec
from stgen.ops.linear_attention import linear_attention_segments
from stgen.tokens import Grid, coordinates, rope_tables_at, rotate

State = tuple[Tensor, Tensor]  # M [S, heads, D, D] and z [S, heads, D]

START = -2.0  # of the gate before its sigmoid: a memory first enters with a share of 0.12


@dataclass(frozen=True)
class Past:
    """What a model remembers of a video of which some frames are made, to go on with the next chunk of them.

    It is used up once the chunk after the next is begun, since rings are written in place; until then it may serve any
    number of forward passes over the next chunk.
    """

    frames: int  # of tokens that came before
    chunk: Grid  # the longest chunk there is room for
    batch: int
    memories: Mapping[int, Any]  # by number of the use: State, RingState, or what a mixer without a map carries

    def check(self, batch: int, grid: Grid) -> None:
        """Raise ValueError for a chunk that there is no room for."""
        if (grid.h, grid.w) != (self.chunk.h, self.chunk.w) or grid.t > self.chunk.t or batch != self.batch:
            raise ValueError(
                f"past has room for {self.batch} chunks of at most {self.chunk} tokens, not for {batch} of {grid}; begin "
                "with new_past for those"
            )

    def numel(self) -> int:
        """Numbers kept."""
        return sum(x.numel() for x in _tensors(self.memories))


def _tensors(kept: Any) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    if isinstance(kept, RingState):
        return [kept.k, kept.v]
    parts = kept.values() if isinstance(kept, Mapping) else kept
    return [x for part in parts for x in _tensors(part)]


def first_place(frames: int, chunk: int, trained: int) -> int:
    """Where a chunk after `frames` frames is placed in time, so that its last frame lies within a training clip."""
    return max(0, min(frames, trained - chunk))


# -------------------------------------------------------------------------------------------------------------- infini


class Infini(nn.Module):
    """Segments that read a compressive memory of all before them; a gate for each head mixes it in."""

    no_decay = ("gate",)

    def __init__(self, keys: spec.Infini, heads: int, features: nn.Module):
        super().__init__()
        self.keys, self.features = keys, features
        self.gate = nn.Parameter(torch.full((heads,), START))

    def recall(self, q: Tensor, k: Tensor, v: Tensor, segment: int, state: State | None) -> tuple[Tensor, Any]:
        """What the memory yields for each of q, k, v [S, heads, n, D], in segments of so many places, and the memory after
        them all. Gradient is cut after every truncate + 1 segments."""
        phi_q, phi_k, truncate = self.features(q, True), self.features(k, False), self.keys.truncate
        reach = q.shape[2] if truncate is None else (truncate + 1) * segment
        out = []
        for q, k, u in zip(*(x.split(reach, dim=2) for x in (phi_q, phi_k, v)), strict=True):
            recalled, (m, z) = linear_attention_segments(q, k, u, segment, state, delta=self.keys.delta)
            state = m.detach(), z.detach()
            out.append(recalled)
        return out[0] if len(out) == 1 else torch.cat(out, dim=2), state

    def forward(self, local: Tensor, recalled: Tensor) -> Tensor:
        """g recalled + (1 - g) local, both [B, N, heads, D]."""
        return torch.lerp(local, recalled, self.gate.sigmoid().to(local.dtype)[:, None])

    def new(self, sequences: int, heads: int, head_dim: int, like: Tensor) -> State:
        """An empty memory, float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        m = like.new_zeros(sequences, heads, head_dim, head_dim, dtype=dtype)
        return m, like.new_zeros(m.shape[:3], dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------- ring


@dataclass(frozen=True)
class RingState:
    """Frames of keys and values in slots: the first frames, then a ring of the last ones and of the chunk to come."""

    k: Tensor  # [B, slots, h * w, heads, D] after norm, before RoPE
    v: Tensor
    frames: int  # that came before the chunk
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)  # what is derived for the passes over the chunk


class Ring:
    """Where frames lie in a ring's slots, and where they stand in time when the chunk's queries look at them.

    A chunk lies in the ring at its own slots, where the last pass over it has put it: to remember it is to count on.
    """

    def __init__(self, keys: spec.Ring, trained: int):
        self.sinks, self.trained = keys.sinks, trained
        self.window = min(keys.window, trained)  # frames farther away were never seen

    def new(self, batch: int, chunk: Grid, heads: int, head_dim: int, like: Tensor) -> RingState:
        """Empty slots, of the type and on the device of `like`. Raises ValueError for a chunk that is too long."""
        if self.sinks + chunk.t > self.trained:
            raise ValueError(
                f"a chunk of {chunk.t} frames of tokens and the {self.sinks} first frames that a ring keeps are more than the "
                f"{self.trained} of a training clip; take shorter chunks"
            )
        shape = (batch, self.sinks + self.window - 1 + chunk.t, chunk.h * chunk.w, heads, head_dim)
        return RingState(like.new_zeros(shape), like.new_zeros(shape), 0)

    def write(self, state: RingState, k: Tensor, v: Tensor, grid: Grid) -> None:
        """Put a chunk's keys and values [B, N, heads, D] into its slots."""
        if ("slots", grid) not in state.memo:
            frames = torch.arange(state.frames, state.frames + grid.t, device=k.device)
            around = self.sinks + (frames - self.sinks) % (state.k.shape[1] - self.sinks)
            state.memo["slots", grid] = torch.where(frames < self.sinks, frames, around)
        for slots, x in ((state.k, k), (state.v, v)):
            slots.index_copy_(1, state.memo["slots", grid], x.unflatten(1, (grid.t, -1)).to(slots.dtype))

    def read(self, state: RingState, grid: Grid, placed: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots as tokens [B, slots * h * w, heads, D], turned by RoPE where `placed`."""
        k, v = state.k.flatten(1, 2), state.v.flatten(1, 2)
        if placed:
            if ("rope", grid) not in state.memo:
                where = self.where(state, grid)
                moved = state.frames - first_place(state.frames, grid.t, self.trained)
                where[:, 0] -= moved * (where[:, 0] >= self.sinks)  # the first frames stay where they were learned
                state.memo["rope", grid] = rope_tables_at(where, k.shape[-1])
            k = rotate(k, state.memo["rope", grid])
        return k, v

    def where(self, state: RingState, grid: Grid) -> Tensor:
        """Frame, row and column of every token of the slots: [slots * h * w, 3]; frame -1 where a slot is empty."""
        after, slots = state.frames + grid.t, state.k.shape[1]
        where = coordinates(Grid(slots, grid.h, grid.w), state.k.device)
        slot, around = where[:, 0], slots - self.sinks
        last = after - 1 - (after - 1 - slot) % around  # the last frame that was put into a slot of the ring
        frame = torch.where(slot < self.sinks, slot, last)
        empty = (frame >= after) | (frame < 0) | ((slot >= self.sinks) & (frame < self.sinks))
        where[:, 0] = frame.masked_fill(empty, -1)
        return where

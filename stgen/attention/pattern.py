"""What a pattern is: the three kinds there are, and the words in which they speak.

Patterns and specs load without torch, because `--help` and config errors read the keys that stand in them; what needs
torch is imported where it runs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from stgen.schedules import FALLS, check_schedules, or_schedule
from stgen.section import Section

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from stgen.ops.support import Support

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Extent3D = tuple[PositiveInt, PositiveInt, PositiveInt]
Offset3D = tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]
PerAxis = NonNegativeInt | Offset3D
"""One number for all axes, or one each for frames, rows and columns."""
if TYPE_CHECKING:
    KeepRatio: TypeAlias = float
    Radius: TypeAlias = int | tuple[int, int, int]
    WholeNumber: TypeAlias = int
    Bits: TypeAlias = int
else:  # what a pattern computes with is a number: see `Selection`
    KeepRatio = Annotated[or_schedule(Share), FALLS]
    """A share that is kept; over training it may only fall (progressive sparse attention)."""
    Radius = or_schedule(PerAxis)
    WholeNumber = or_schedule(NonNegativeInt)
    Bits = Annotated[or_schedule(Annotated[int, Field(ge=2, le=32)]), FALLS]


def per_axis(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """One number for all axes, written out."""
    return (value, value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Sites:
    """Where the places of a sequence stand: integer tensors that broadcast against those of the other side.

    Queries come as [groups, a, 1] and keys as [groups, 1, m]; `groups` is the number of sequences of one clip.
    """

    t: Tensor  # frame, row and column on the token grid
    h: Tensor
    w: Tensor
    block: Tensor  # number of the block of the sequence that holds the place


@dataclass(frozen=True)
class Frame:
    """What a fixed pattern may know beside the places."""

    grid: tuple[int, int, int]  # frames, rows and columns of the token grid
    block: tuple[int, int, int]  # extents of a block, in tokens, where blocks are tiles
    blocks: int  # blocks of a sequence
    layer: int  # number of the layer, from 0


class PatternError(ValueError):
    """A pattern that does not fit the sequences it is given; one sentence that says what to do."""


class Pattern(Section):
    """Which keys each query may attend. A pattern is one file of `stgen.attention.patterns`, one subclass of this."""

    kind: str

    @model_validator(mode="after")
    def _schedules_fit(self):
        check_schedules(self)
        return self

    by_blocks: ClassVar[bool] = False  # the meaning of the pattern, not only its cost, depends on the blocks
    needs_tiles: ClassVar[bool] = False  # blocks must be boxes of the grid (order: tile)


class Fixed(Pattern):
    """A pattern that is a predicate on two places."""

    @abstractmethod
    def allows(self, q: Sites, k: Sites, frame: Frame) -> Tensor:
        """Bool tensor, true where the query at `q` may attend the key at `k`."""


def kept_share(ratio: float, number: int) -> float:
    """Share of `number` that is kept of them at a ratio: rounded down, but at least one."""
    return max(1, int(ratio * number + 1e-9)) / number


@dataclass(frozen=True)
class Setting:
    """What the chooser or mixer of a pattern is built for."""

    heads: int
    head_dim: int
    places: int  # of a sequence, padding included
    block: int  # places of a block
    tile: tuple[int, int, int]  # extents of a block as the config gives them
    layer: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Blocks of a sequence."""
        return -(-self.places // self.block)


class Chosen(Pattern):
    """A pattern chosen from queries and keys."""

    sees_all_queries: ClassVar[bool] = False  # what one query keeps depends on other queries: never causal

    @abstractmethod
    def shares(self, setting: Setting) -> tuple[float, float]:
        """Share of the allowed pairs that is kept, about, and share of the pairs of blocks that is then computed."""

    @abstractmethod
    def choosing_flops(self, setting: Setting) -> int:
        """Operations of choosing for one sequence, all heads."""

    @abstractmethod
    def chooser(self, setting: Setting) -> nn.Module | Callable[[Tensor, Tensor, Support], Support]:
        """A function choose(q, k, allowed) -> Support.

        q, k are [S, heads, n, D] after norm and RoPE; `allowed` is what fixed patterns and padding leave
        (`allowed.expand(S, heads)` writes it out), and the result lies within it. A module where there is something
        to learn; it has a method become(pattern), told when a scheduled number has changed.
        """


class Remade(Pattern):
    """A pattern that attends keys made from the given ones; it stands alone, in no list."""

    @property
    def near(self) -> Fixed | None:
        """A fixed pattern whose support the module is handed as `near`."""
        return None

    @abstractmethod
    def flops(self, setting: Setting) -> int:
        """Operations for one sequence, all heads: making the keys and attending them."""

    @abstractmethod
    def mixer(self, setting: Setting) -> nn.Module:
        """A module mix(q, k, v, allowed, attend, near) -> [S, heads, n, D].

        `allowed` is a Support of the places that hold tokens; attend(q, k, v, support or None) applies the mixer's
        normaliser and sink, where None attends every key; `near` is the support of the property `near`, or None. Its
        method become(pattern) is told of scheduled numbers.
        """

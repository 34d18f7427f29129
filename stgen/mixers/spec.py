"""Keys of the mixers without an attention map. Loads without torch."""

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from stgen.attention.pattern import Extent3D
from stgen.section import Section


class Sequences(Section):
    """Over which tokens a mixer runs, and in which order: raster, frame by frame and row by row."""

    kind: str
    layout: Literal["joint", "spatial", "temporal", "height", "width", "window"] = "temporal"
    """Which tokens share a sequence; within it they come frame by frame and row by row."""
    size: Extent3D | None = None
    """Window layout: frames, rows and columns of a window, in tokens."""

    @model_validator(mode="after")
    def _window_has_size(self):
        if self.layout == "window" and self.size is None:
            raise ValueError("layout window needs size: [frames, rows, columns] of a window, in tokens")
        if self.layout != "window" and self.size is not None:
            raise ValueError(f"size belongs to layout window, not to {self.layout}")
        return self

    @property
    def mixes_time(self) -> bool:
        """Whether a sequence holds tokens of several frames."""
        return self.layout in ("joint", "temporal") or (self.size is not None and self.size[0] > 1)

    @property
    @abstractmethod
    def sees_future(self) -> bool:
        """Whether a token's output depends on tokens after it."""


class TCN(Sequences):
    kind: Literal["tcn"] = "tcn"
    """Residual dilated convolutions, two a level (arXiv:1803.01271)."""
    kernel_size: Annotated[int, Field(ge=2)] = 3
    """Tokens that a convolution sees; odd unless causal."""
    levels: PositiveInt = 2
    """Levels of two convolutions; the dilation is 1 in the first and doubles from level to level."""
    causal: bool = False
    """See the tokens before and at a place only, instead of as many on either side."""
    weight_norm: bool = False
    """Learn length and direction of the kernels apart (arXiv:1602.07868)."""

    @model_validator(mode="after")
    def _has_a_centre(self):
        if not self.causal and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} has no middle; write an odd one, or causal: true")
        return self

    @property
    def sees_future(self) -> bool:
        return not self.causal

    @property
    def reach(self) -> int:
        """Tokens that an output may depend on: 1 + 2 (k - 1) (2^levels - 1)."""
        return 1 + 2 * (self.kernel_size - 1) * (2**self.levels - 1)


class Recurrent(Sequences):
    kind: Literal["rnn", "lstm", "gru"] = "rnn"
    """A recurrence by PyTorch's own cells: tanh, LSTM or GRU."""
    bidirectional: bool = True
    """Run once forwards and once backwards, half of the channels each; false sees no token to come."""

    @property
    def sees_future(self) -> bool:
        return self.bidirectional


TokenMixer = TCN | Recurrent
KINDS = ("tcn", "rnn", "lstm", "gru")


def named(name: str) -> TokenMixer | None:
    """The mixer that a plan's name stands for where the config says nothing: tcn, rnn, lstm or gru as they come."""
    if name == "tcn":
        return TCN()
    return Recurrent(kind=name) if name in KINDS else None  # type: ignore[arg-type]

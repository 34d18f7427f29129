"""Global attention: some tokens see all and are seen by all (Longformer, arXiv:2004.05150; BigBird, arXiv:2007.14062)."""

from typing import Literal

from pydantic import model_validator

from stgen.attention.pattern import Fixed, Offset3D, WholeNumber


class Global(Fixed):
    kind: Literal["global"] = "global"
    """Some tokens attend every key and are attended by every query; in a list with other patterns."""
    frames: WholeNumber = 0
    """So many first frames are global; a number or a schedule."""
    tokens: list[Offset3D] = []
    """These tokens are global: [[frame, row, column], ...], counted from 0; a grid may be too small to have one."""

    @model_validator(mode="after")
    def _names_some(self):
        if not self.frames and not self.tokens:
            raise ValueError("global names no token; give frames: the number of first frames, or tokens: [[t, h, w]]")
        return self

    def allows(self, q, k, frame):
        return self._chosen(q) | self._chosen(k)

    def _chosen(self, place):
        chosen = place.t < self.frames
        for t, h, w in self.tokens:
            chosen = chosen | ((place.t == t) & (place.h == h) & (place.w == w))
        return chosen

"""Which attention can be sampled chunk by chunk, and what to write for that which cannot. Loads without torch."""

from __future__ import annotations

from stgen.attention.pattern import Fixed, Pattern
from stgen.attention.patterns import leaves
from stgen.attention.patterns.causal import Causal
from stgen.attention.patterns.checkerboard import Checkerboard
from stgen.attention.patterns.full import Full
from stgen.attention.patterns.local import Local
from stgen.attention.patterns.strided import Strided
from stgen.attention.spec import AttentionMixer, Infini, Memory, NoMemory

BY_DISTANCE = (Full, Causal, Checkerboard, Local, Strided)  # the same wherever in a video the frames are


def refusal(mixer: AttentionMixer, heads: int) -> str | None:
    """Why a mixer of so many heads cannot go on from earlier frames, in one sentence; None where it can."""
    if mixer.layout in ("spatial", "height", "width") or (mixer.size is not None and mixer.size[0] == 1):
        return None
    if isinstance(mixer.memory, NoMemory):
        return (
            f"layout {mixer.layout} sees all frames of a clip at once; write layout: temporal or joint with memory: "
            "{kind: infini, segment: n}, or with memory: {kind: ring, window: n} and pattern: causal"
        )
    patterns = [leaf for group in mixer.head_groups(heads) for leaf in leaves(group.pattern)]
    faults = [f"pattern: {leaf.kind} {fault}" for leaf in patterns if (fault := _fault(leaf, mixer.memory))]
    return faults[0] if faults else None


def _fault(pattern: Pattern, memory: Memory) -> str | None:
    if not isinstance(pattern, Fixed):
        return "chooses keys from all of a clip; write causal, local, strided or several of them"
    if pattern.by_blocks:
        return "goes by the blocks of a clip; write causal, local, strided or several of them"
    if isinstance(pattern, Local) and pattern.border == "clamp":
        return "moves its box at the end of a clip, which a stream does not know; write border: cut"
    if isinstance(memory, Infini) and not isinstance(pattern, BY_DISTANCE):
        return "goes by the frames of a clip, which a segment does not know; write memory: ring, or another pattern"
    return None

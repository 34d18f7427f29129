"""What changes from frame to frame of a clip, uint8 [T, 3, H, W].

None of these tells good from bad by itself: a still clip flickers least. They mean something beside those of real clips.
"""

import torch
from torch import Tensor

UNIT = "grey levels of 255"


def change(frames: Tensor) -> float:
    """Mean absolute difference of a frame and the next, in grey levels of 255; 0 for a still clip.

    What VBench's "temporal flickering" is made of (arXiv:2311.17982, section 3.2), before it is turned round.
    """
    return _mean_size(frames.float().diff(dim=0))


def flicker(frames: Tensor) -> float:
    """Mean absolute second difference in time, in grey levels of 255: what comes and goes again.

    0 for a still clip and for one that brightens evenly; twice `change` for one that alternates.
    """
    return _mean_size(frames.float().diff(n=2, dim=0)) if len(frames) > 2 else 0.0


def consistency(frames: Tensor) -> float:
    """Correlation of the pixels of a frame and the next, a mean over frames: 1 for a still clip, about 0 for noise.

    A frame of one colour correlates with an equal one at 1 and with others at 0.
    """
    x = frames.double().flatten(1)  # [T, P]
    x = x - x.mean(1, keepdim=True)
    size = x.norm(dim=1)
    both = size[1:] * size[:-1]
    alike = (frames[1:] == frames[:-1]).flatten(1).all(1).double()
    found = torch.where(both > 0, (x[1:] * x[:-1]).sum(1) / both.clamp(min=1e-12), alike)
    return float(found.mean()) if len(found) else 1.0


def _mean_size(x: Tensor) -> float:
    return float(x.abs().mean()) if x.numel() else 0.0

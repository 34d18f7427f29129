"""How large the numbers of a config may be: far beyond what any machine can train, so that a slip of the finger ends in
one line and not in a failed allocation, an overflow or a loop without end."""

from collections.abc import Iterator, Mapping
from typing import Any

MOST = 10**12  # of any number that is not named here
MOST_OF = {  # by the last word of a key: what is allocated, counted through or handed to a system call
    "seed": 2**63 - 1, "held_out_seed": 2**63 - 1,
    "num_frames": 100_000, "height": 16_384, "width": 65_536, "depth": 1024, "fps": 10_000, "clips": 10**7, "cache_clips": 10**4,
    "dataloader_num_workers": 1024, "decode_timeout": 10**6, "train_batch_size": 10**6, "fit_clips": 10**7,
    "max_length": 10**6, "ratio": 4096, "registers": 65_536, "num_train_timesteps": 10**6,
    "num_inference_steps": 100_000, "judged_noises": 10**6,
    "levels": 64, "kernel_size": 65_536, "keys": 10**6, "clusters": 10**6, "count": 65_536, "blocks": 10**6,
    "iterations": 10_000, "components": 10**6, "parts": 10**6,
}  # fmt: skip
LEAST_OF = {"fps": 1e-4}  # of numbers above zero


def slip(tree: Mapping[str, Any]) -> str | None:
    """`key: what is wrong with it` for the first number of a config that cannot be meant; None if there is none."""
    for key, number in _numbers(tree):
        leaf = next((word for word in reversed(key.split(".")) if not word.isdecimal()), "")
        if abs(number) > MOST_OF.get(leaf, MOST):
            return f"{key}: {number:g} is beyond {MOST_OF.get(leaf, MOST):g}, the most that is taken"
        if number < LEAST_OF.get(leaf, number):
            return f"{key}: {number:g} is below {LEAST_OF[leaf]:g}, the least that is taken"
    return None


def _numbers(tree: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a tree with its dotted key."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _numbers(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _numbers(value, f"{key}.{i}")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield key, tree

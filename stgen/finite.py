"""Nothing that is not a finite number enters an update or a checkpoint; what a run stops for can be repeated from file."""

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stgen import checkpoint, ranks, shards

Groups = Mapping[str, Mapping[str, Tensor]]


class NotFinite(Exception):
    """A step or a state that holds NaN or infinity; says which, and how to look at it."""


def whole(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers that lie on this rank are finite, in one pass and with one wait for the device."""
    return math.isfinite(float(nn.utils.get_total_norm([shards.local(t) for t in tensors if t.is_floating_point()])))


def spoiled(groups: Groups) -> list[str]:
    """`group/name` of every tensor that holds NaN or infinity on this rank; one pass over all where there is none."""
    if whole(tensor for named in groups.values() for tensor in named.values()):
        return []
    return [
        f"{group}/{name}"
        for group, named in groups.items()
        for name, tensor in named.items()
        if tensor.is_floating_point() and not torch.isfinite(shards.local(tensor)).all()
    ]


def refuse_spoiled(groups: Groups, step: int) -> None:
    """Raise NotFinite before what is spoiled would be saved as a checkpoint."""
    if names := spoiled(groups):
        raise NotFinite(
            f"step {step}: NaN or infinity in {_some(names)}; not saved. Earlier checkpoints are whole: go on from one "
            "with run.resume_from_checkpoint=latest, perhaps with a lower optim.learning_rate and "
            "run.allow_changed_config=true"
        )


def stop(
    run_dir: Path, report: dict[str, Any], tensors: Groups, state: dict[str, Any], dump: Any = checkpoint.dump
) -> NotFinite:
    """Write what a step was computed from to `not-finite-step-N` and return the error that tells of it.

    report: step, loss, grad_norm, files, and the names of what is spoiled. The folder is a checkpoint of the moment before
    the update, with the step's latents, noise and times beside it: a run that starts from it repeats the step.
    """
    step, files = report["step"], report["files"]
    report = {**report, "loss": str(report["loss"]), "grad_norm": str(report["grad_norm"])}
    folder = run_dir / f"not-finite-step-{step}"
    words = (run_dir / "config.yaml", f"run.resume_from_checkpoint={folder}", f"run.output_dir={run_dir}-again")
    again = shlex.join(["python", "train.py", *map(str, words)])
    try:
        dump(folder, step, tensors, {**state, "not_finite": report})
        look = f"repeat the step with: {again}"
    except checkpoint.CheckpointError as error:
        look = f"its tensors could not be kept ({error})"
    with suppress(OSError):  # what the run stops for is the number, not the disk
        if ranks.is_first():
            (run_dir / f"{folder.name}.json").write_text(json.dumps({**report, "repeat": again}, indent=2) + "\n")
    # What is upstream says more: of a loss that is spoiled all gradients are.
    named = [
        name for name in report["spoiled"] if not name.startswith("gradient/") or math.isfinite(float(report["loss"]))
    ]
    where = f", NaN or infinity in {_some(named)}" if named else ""
    return NotFinite(
        f"step {step}: loss {report['loss']}, gradient norm {report['grad_norm']}{where}; stopped before the update. "
        f"Clips of the batch: {_some(files)} (all in {folder}.json); {look}. Go on from an earlier checkpoint with a lower "
        "optim.learning_rate and run.allow_changed_config=true, or without these clips"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

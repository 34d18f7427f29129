"""Checkpoints by all ranks of a run: whole tensors from the first, shards from whoever holds them, one manifest over all.

The ranks must see one file system. What `stgen.checkpoint` promises of a checkpoint holds here too: it is whole or absent.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from stgen import checkpoint, ranks, shards
from stgen.shards import Groups


def save(run_dir: Path, step: int, tensors: Groups, state: dict[str, Any], total_limit: int) -> Path:
    """`checkpoint.save` by all ranks at once; raises as that does."""
    mine, whole = _split(tensors)
    if ranks.is_first():
        checkpoint.save(run_dir, step, whole, state, total_limit, lambda folder: _meet(folder, mine))
    else:
        _meet(run_dir, mine)
    return run_dir / f"checkpoint-{step}"


def dump(folder: Path, step: int, tensors: Groups, state: dict[str, Any]) -> Path:
    """`checkpoint.dump` by all ranks at once; raises as that does."""
    mine, whole = _split(tensors)
    if ranks.is_first():
        return checkpoint.dump(folder, step, whole, state, lambda made: _meet(made, mine))
    _meet(folder.parent, mine)
    return folder


def resolve(run_dir: Path, which: str) -> checkpoint.Loaded | None:
    """`checkpoint.resolve`, in which the first rank chooses for all; raises as that does."""
    found = checkpoint.resolve(run_dir, which) if ranks.is_first() else None
    (path, *_) = ranks.gather(None if found is None else str(found.path))
    return found if ranks.is_first() or path is None else checkpoint.load(path)


def _split(tensors: Groups) -> tuple[dict[str, dict], dict[str, dict]]:
    """What this rank writes of groups that are cut, by the name of its file; and the groups that are not."""
    mine, whole = {}, {}
    for group, named in tensors.items():
        if (place := shards.place(named)) is None:
            whole[group] = named
            continue
        shard, of, copy = place
        if copy == 0:
            kept = {n: shards.local(t) for n, t in named.items() if shard == 0 or shards.is_cut(t)}
            mine[shards.group_of(group, shard, of)] = {n: t.detach().cpu().contiguous() for n, t in kept.items()}
    return mine, whole


def _meet(folder: Path, mine: dict[str, dict]) -> None:
    """Write this rank's files into the temporary folder that the first rank has made, and wait for those of all.

    folder: on the first rank that folder, on others the one that it lies in. Raises OSError on all if one cannot write.
    """
    (name, *_) = ranks.gather(folder.name if ranks.is_first() else None)
    temporary, fault = folder if ranks.is_first() else folder / name, None
    try:
        for file, named in mine.items():
            save_file(named, temporary / f"{file}.safetensors")
    except (OSError, SafetensorError) as error:
        fault = str(error)
    for number, told in enumerate(ranks.gather(fault)):
        if told is not None:
            raise OSError(f"rank {number}: {told}")

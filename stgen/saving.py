"""Checkpoints by all ranks of a run: whole tensors from the first, shards from whoever holds them, one manifest over all.

The ranks must see one file system. What `stgen.checkpoint` promises of a checkpoint holds here too: it is whole or absent.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stgen import checkpoint, ranks, shards
from stgen.shards import Groups


def save(run_dir: Path, step: int, tensors: Groups, state: dict[str, Any], total_limit: int) -> Path:
    """`checkpoint.save` by all ranks at once; raises as that does."""
    mine, whole = _split(tensors)
    final = run_dir / f"checkpoint-{step}"
    if ranks.is_first():
        return checkpoint.save(run_dir, step, whole, state, total_limit, lambda made: _meet(final, mine, made))
    _meet(final, mine)
    return final


def dump(folder: Path, step: int, tensors: Groups, state: dict[str, Any]) -> Path:
    """`checkpoint.dump` by all ranks at once; raises as that does."""
    mine, whole = _split(tensors)
    if ranks.is_first():
        return checkpoint.dump(folder, step, whole, state, lambda made: _meet(folder, mine, made))
    _meet(folder, mine)
    return folder


def resolve(run_dir: Path, which: str) -> checkpoint.Loaded | None:
    """`checkpoint.resolve`, in which the first rank chooses and verifies for all; raises as that does."""
    found = checkpoint.resolve(run_dir, which) if ranks.is_first() else None
    (path, *_) = ranks.gather(None if found is None else str(found.path))
    return found if ranks.is_first() or path is None else checkpoint.load(path, hashes=False)


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
            mine[shards.group_of(group, shard, of)] = kept
    return mine, whole


def _meet(final: Path, mine: dict[str, dict], made: Path | None = None) -> dict[str, checkpoint.Entry]:
    """Write this rank's files of the checkpoint `final` where the first rank has made a folder for all, and wait for those
    of all; what the manifest says of them.

    made: on the first rank that folder. Raises CheckpointError on all if one cannot write.
    """
    (name, *_) = ranks.gather(made and made.name)
    files, fault = {}, None
    try:
        files = checkpoint.write(final.with_name(name), mine)
    except (OSError, SafetensorError) as error:
        fault = f"rank {ranks.rank()}: {checkpoint.refusal(final, error, mine)}"
    told = ranks.gather([files, fault])
    for _, fault in told:
        if fault is not None:
            raise checkpoint.CheckpointError(fault)
    return {name: entry for files, _ in told for name, entry in files.items()}

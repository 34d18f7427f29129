"""The processes of a run under torchrun: who they are, what they tell one another, and how all end when one fails.

Without torchrun there is one rank, and everything here is nothing to do. What ranks are is torch.distributed's to know;
words pass between them as JSON, never pickled.
"""

import json
import logging
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

Item = TypeVar("Item")

FAILED = "failed"  # the store's key under which the first rank that fails says so
POLL_SECONDS = 0.5  # between looks at it
GRACE_SECONDS = 5.0  # that the others have to end by themselves, and that a lost connection waits for its reason
# What errors of torch.distributed speak of when another rank is gone.
LOST = ("gloo", "NCCL", "Connection", "connection")


class RankError(Exception):
    """The ranks of a run cannot work together; one sentence that says what to do."""


# -------------------------------------------------------------------------------------------------------- who is here


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def size() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this rank is the one that writes."""
    return rank() == 0


def say(words: str) -> None:
    """Print to the terminal, above a progress bar; on the first rank alone."""
    if is_first():
        tqdm.write(words)


# ------------------------------------------------------------------------------------------------ what ranks exchange


def gather(value: Any) -> list[Any]:
    """What every rank gave, in their order; anything that JSON can hold. All must call it."""
    if size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [int(length) for length in _all(torch.tensor([len(text)]))]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = text
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(_all(padded), lengths, strict=True)]


def wait() -> None:
    """Go on when all have come here."""
    gather(None)


def in_turn(do: Callable[[], Item]) -> Item:
    """Do it on the first rank and then on the others, which find what it has made."""
    if not is_first():
        wait()
    done = do()
    if is_first():
        wait()
    return done


def total(*numbers: float) -> list[float]:
    """The sum of each number over all ranks, in float64, the same on each."""
    if size() == 1:
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(summed)
    return summed.tolist()


def agreed(value: str | None) -> str | None:
    """The value of the first rank that has one."""
    if size() == 1 or total(value is not None) == [0]:
        return value
    return next(given for given in gather(value) if given is not None)


def merged(found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Each list with the words of all ranks, in their order."""
    told = gather(found)
    return {name: [word for each in told for word in each[name]] for name in found}


def broadcast(tensors: Mapping[str, Tensor]) -> None:
    """Give every rank the first one's numbers, in place."""
    if size() > 1:
        for name in sorted(tensors):
            distributed.broadcast(tensors[name].detach(), 0)


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's share of a list: as many on every rank, so that the last ones may hold the list's last item again."""
    if size() == 1 or not items:
        return items
    each = -(-len(items) // size())
    return [items[min(i, len(items) - 1)] for i in range(rank() * each, (rank() + 1) * each)]


def joined(tensors: list[Tensor], number: int) -> list[Tensor]:
    """What the ranks made of their shares of a list of `number`, in its order: tensors on the CPU, all of one shape."""
    if size() == 1 or not tensors:
        return tensors
    return [tensor for stack in _all(torch.stack(tensors)) for tensor in stack][:number]


def _all(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank; those of all have one shape."""
    found = [torch.empty_like(tensor) for _ in range(size())]
    distributed.all_gather(found, tensor)
    return found


class Shared:
    """A sampler of batches, of each equal part of which this rank has its share; all else is the sampler's own."""

    def __init__(self, sampler: Any, parts: int):
        self._sampler, self._parts, self.start_step = sampler, parts, sampler.start_step

    def samples(self, step: int) -> list[Any]:
        """This rank's clips of a step, part after part."""
        keys = self._sampler.samples(step)
        part = len(keys) // self._parts
        each = part // size()
        starts = range(rank() * each, len(keys), part)
        return [key for start in starts for key in keys[start : start + each]]

    def __iter__(self) -> Iterator[list[Any]]:
        return map(self.samples, count(self.start_step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def shared(sampler: Any, parts: int) -> Any:
    """The sampler, whose batches are computed in `parts`, as this rank has it."""
    return sampler if size() == 1 else Shared(sampler, parts)


def check_same(told: Mapping[str, Any]) -> None:
    """Raise RankError, on all ranks, that names the first thing which a rank has otherwise than the first rank."""
    found = gather({"host": platform.node(), **told})
    for number, other in enumerate(found):
        for key in told:
            if other[key] != found[0][key]:
                where = f"rank {number} ({other['host']}) disagrees with rank 0 ({found[0]['host']}) on"
                raise RankError(
                    f"{where} {_difference(key, found[0][key], other[key])}; start all with the same command on the same code, "
                    "packages and data"
                )


def _difference(key: str, left: Any, right: Any) -> str:
    """What is not alike, as `key: value of the first -> value here`."""
    while isinstance(left, dict) and isinstance(right, dict):
        name = next(name for name in {**left, **right} if left.get(name) != right.get(name))
        key, left, right = f"{key}.{name}", left.get(name), right.get(name)
    return f"{key}: {left} -> {right}"


# ---------------------------------------------------------------------------------------------------- begin and end


@contextmanager
def together(device: torch.device, timeout: float) -> Iterator[None]:
    """Join the ranks that torchrun started, if it did; within it the functions above work.

    When one rank fails, it says why and the others end within seconds, quietly. Raises RankError when there is no GPU
    for this rank.
    """
    if not started() or distributed.is_initialized():
        yield
        return
    store = _join(device, timeout)
    watch = _Watch(store)
    try:
        yield
        wait()
    except BaseException as error:
        if watch.tell(error):
            raise RankError(_lost(error, timeout)) from error
        raise
    watch.end()
    distributed.destroy_process_group()


def _lost(error: BaseException, timeout: float) -> str:
    """What an error of torch.distributed means, and what it said: of several faults none tells more."""
    said = (str(error).strip().splitlines() or [""])[0]
    if re.search(r"time(d|[- ])?[- ]?out", str(error), re.IGNORECASE):
        reason = f"waited in vain for another rank; if it was at long work, raise distributed.timeout (now {timeout:g} s), and"
    else:
        reason = "lost touch with another rank, which ended without a word: killed, perhaps for memory, or its machine is gone;"
    return f"{reason} go on with run.resume_from_checkpoint=latest ({said})"


def _join(device: torch.device, timeout: float) -> distributed.Store:
    local, backend = int(os.environ.get("LOCAL_RANK", 0)), "gloo"
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise RankError(
                f"rank {os.environ['RANK']} has no GPU: {platform.node()} has {torch.cuda.device_count()}; start as many "
                "processes a node with --nproc_per_node, or none on GPUs with run.device=cpu"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store, number, world = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    distributed.init_process_group(
        backend, store=store, rank=number, world_size=world, timeout=timedelta(seconds=timeout)
    )
    if number > 0:
        logging.getLogger("stgen").setLevel(logging.ERROR)
    return store


class _Watch:
    """Looks every half second whether another rank has failed, and then ends this process, wherever it is waiting."""

    def __init__(self, store: distributed.Store):
        self._store, self._over = store.clone(), threading.Event()
        self._number = distributed.get_rank()
        self._thread = threading.Thread(target=self._look, name="ranks", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def tell(self, error: BaseException) -> bool:
        """Say to the others that this rank ends by an error; whether that is but the loss of another one, which is silent.

        If another rank failed before, its error is the reason, and this one ends at once, quietly.
        """
        self.end()
        if threading.current_thread() is threading.main_thread():
            # From torchrun, which has seen a rank end: it would cut off the word.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
        # The one that is lost has a reason to say, unless it was killed.
        deadline = time.monotonic() + (GRACE_SECONDS if lost else 0)
        while not self._failed() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
        if self._store.compare_set(FAILED, "", str(self._number)).decode() != str(self._number):
            leave(1)
        said = f"\nrank {self._number} on {platform.node()} ends the run:"  # below a progress bar
        print(said, file=sys.stderr, flush=True)
        return lost

    def _failed(self) -> bool:
        return self._store.check([FAILED])

    def _look(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                failed = self._failed()
            except RuntimeError:  # the store's process is gone, and with it the run
                failed = True
            if failed and not self._over.wait(GRACE_SECONDS):
                leave(1)


def leave(code: int) -> NoReturn:
    """End this process at once: gloo's threads at times abort a process that ends in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""What `test_ranks.py` starts on each rank: several tiny runs, one after another, since a start costs seconds.

    torchrun … ranks_worker.py JOBS.json

JOBS.json: [{name, overrides, and at most one fault}]. Each job's outcome on each rank is written beside it.
"""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import torch

from stgen import checkpoint, config, ranks, schema, train
from stgen.objective import Objective


def main(path: Path) -> None:
    torch.set_num_threads(1)
    with ranks.together(torch.device("cpu"), 100):
        for job in json.loads(path.read_text()):
            told = run(path.with_name("empty.yaml"), job)
            path.with_name(f"{job['name']}-{ranks.rank()}.json").write_text(json.dumps(told))
    ranks.leave(0)


def run(empty: Path, job: dict) -> dict:
    """The job's outcome: the run's summary, or its error."""
    mine = job.get("of_rank", {}).get(str(ranks.rank()), [])
    cfg = config.load(empty, [*job["overrides"], *mine], schema.Config)
    undo = FAULTS[job["fault"]]() if "fault" in job else lambda: None
    try:
        return train.train(cfg)
    except Exception as error:
        if job.get("fault") in ("raise", "kill"):
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        undo()


def at_step(step: int, of_rank: int, do):
    """Have `do` called before a step on one rank; returns what undoes it."""
    honest = train.make_step

    def make_step(run, *args):
        if run.progress.step == step and ranks.rank() == of_rank:
            do()
        return honest(run, *args)

    train.make_step = make_step
    return lambda: setattr(train, "make_step", honest)


def nan_loss():
    """From step 3 on rank 1's clips give NaN."""
    honest = Objective.loss

    def spoil():
        Objective.loss = lambda *args: honest(*args) * float("nan")  # pyright: ignore[reportAttributeAccessIssue]

    undo = at_step(3, 1, spoil)
    return lambda: (undo(), setattr(Objective, "loss", honest))


def full_disk():
    """Rank 1 cannot write what it holds."""
    honest = checkpoint.save_file

    def save_file(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if ranks.rank() == 1:
        checkpoint.save_file = save_file
    return lambda: setattr(checkpoint, "save_file", honest)


def nan_on_full_disk():
    undo = nan_loss(), full_disk()
    return lambda: [each() for each in undo]


def failing():
    raise train.TrainingError("rank one stumbled")


def elsewhere():
    """Rank 1 stands in another folder, where a relative path leads to other videos."""
    home = os.getcwd()
    os.chdir(Path(os.environ["STGEN_TEST_HOME"]) / f"from-{ranks.rank()}")
    return lambda: os.chdir(home)


FAULTS = {
    "nan": nan_loss,
    "terminate": lambda: at_step(4, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "raise": lambda: at_step(2, 1, failing),
    "kill": lambda: at_step(7, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "elsewhere": elsewhere,
    "full": full_disk,
    "nan_full": nan_on_full_disk,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))

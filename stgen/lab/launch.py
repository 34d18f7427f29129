"""`stgen launch`: the command line, or the SLURM script, that trains a config on many GPUs. Nothing of it is run by a shell."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from stgen import schema
from stgen.distributed_spec import unequal

PORT = 29500
# Seconds that torchrun gives ranks to end their step and to save, of the 300 that SLURM gives; versions that do not know
# the variable give 30.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270"}


class LaunchError(ValueError):
    """What cannot be started; one sentence that says what to do."""


def torchrun(config: Path, overrides: Sequence[str], nodes: int, processes: int) -> list[str]:
    """The command of one node, its rendezvous on one machine alone or, on several, at $HEAD of the script."""
    meeting = (
        ["--standalone"]
        if nodes == 1
        else [f"--nnodes={nodes}", "--rdzv_backend=c10d", "--rdzv_id=$SLURM_JOB_ID", f"--rdzv_endpoint=$HEAD:{PORT}"]
    )
    return [
        "-m",
        "torch.distributed.run",
        *meeting,
        f"--nproc_per_node={processes}",
        "-m",
        "stgen",
        "train",
        str(config),
        *overrides,
    ]


def line(command: Sequence[str]) -> str:
    """The command as a shell takes it, $HEAD and $SLURM_JOB_ID being its variables."""
    return " ".join(word if word.startswith("--rdzv_") else shlex.quote(word) for word in ("python", *command))


def script(cfg: schema.Config, command: Sequence[str], nodes: int, processes: int) -> str:
    """A SLURM script: one task a node, which starts a process a GPU. Submitted again it goes on from the last checkpoint."""
    named = any(word.startswith("run.resume_from_checkpoint=") for word in command)
    command = command if named else [*command, "run.resume_from_checkpoint=latest"]
    gpus = [] if cfg.run.device == "cpu" else [f"#SBATCH --gpus-per-node={processes}"]
    workers = processes * (1 + cfg.data.dataloader_num_workers)
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={shlex.quote(cfg.output_dir.name)}",
            f"#SBATCH --nodes={nodes}",
            "#SBATCH --ntasks-per-node=1",
            *gpus,
            f"#SBATCH --cpus-per-task={workers}",
            "# Before the time is up the run is told, saves itself and ends.",
            "#SBATCH --signal=TERM@300",
            "# The run folder and the videos must lie where all nodes see them.",
            'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            *(f"export {name}={seconds}" for name, seconds in PATIENCE.items()),
            f"srun {line(command)}",
        ]
    )


def launch(
    cfg: schema.Config, config: Path, overrides: Sequence[str], nodes: int, processes: int, dry_run: bool
) -> None:
    """Print how the config is trained on `nodes` of `processes` each, or, on this node alone, train it.

    Raises LaunchError for a batch that so many ranks cannot share, and for several nodes that are not only to be printed.
    """
    batch, parts = cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps
    if not cfg.data.buckets and (fault := unequal(batch, parts, nodes * processes)):
        raise LaunchError(fault)
    command = torchrun(config, overrides, nodes, processes)
    if dry_run:
        print(
            f"# {_where(nodes)}\n{_patient()} {line(command)}\n\n# as a SLURM script: save it and submit it with sbatch\n"
        )
        print(script(cfg, command, nodes, processes))
    elif nodes > 1:
        raise LaunchError(
            f"--nodes {nodes}: from here only this machine can be started; add --dry-run, and submit the script that it prints"
        )
    else:
        _run(command)


def _patient() -> str:
    return " ".join(f"{name}={seconds}" for name, seconds in PATIENCE.items())


def _where(nodes: int) -> str:
    if nodes == 1:
        return "on this machine"
    return (
        f"on each of the {nodes} nodes, HEAD being the name of one of them and SLURM_JOB_ID any word, the same on all"
    )


def _run(command: Sequence[str]) -> NoReturn:
    """Run the launcher and end as it does. It tells its ranks to save when it is stopped, so that it is not to be cut off."""
    process = subprocess.Popen([sys.executable, *command], env={**PATIENCE, **os.environ})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    code = process.wait()
    sys.exit(128 - code if code < 0 else code)

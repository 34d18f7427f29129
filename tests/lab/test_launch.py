"""`stgen launch`: the lines it prints are those that torchrun and a shell take, and what cannot be started is told."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stgen import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "some config.yaml"
    path.write_text("train: {train_batch_size: 32, max_train_steps: 5}\nrun: {output_dir: runs/big}\n")
    return str(path)


def printed(capsys, *arguments: str) -> tuple[str, str]:
    """The command and the script."""
    cli.main(["launch", *arguments, "--dry-run"])
    command, script = capsys.readouterr().out.split("\n\n", 1)
    return command.splitlines()[-1], script[script.index("#!") :]


def test_one_node_meets_by_itself_and_words_survive_the_shell(config, capsys):
    prompt = "validation.prompts=['a $HEAD `x`; \"y\"']"
    command, script = printed(capsys, config, "--gpus-per-node", "4", prompt)
    words = shlex.split(command)
    patience, *words = words
    assert patience == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270" and f"export {patience}" in script.splitlines()
    assert words[:4] == ["python", "-m", "torch.distributed.run", "--standalone"]
    assert words[4:] == ["--nproc_per_node=4", "-m", "stgen", "train", config, prompt]
    assert shlex.split(script.splitlines()[-1])[1:] == [*words, "run.resume_from_checkpoint=latest"]
    for part in (
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --job-name=big",
        "#SBATCH --cpus-per-task=12",
    ):
        assert part in script.splitlines(), part


def test_several_nodes_meet_at_the_first_and_a_shell_fills_in_its_name(config, capsys, tmp_path):
    keep = f"run.resume_from_checkpoint={tmp_path}"
    command, script = printed(capsys, config, "--gpus-per-node", "8", "--nodes", "2", keep)
    assert "--rdzv_endpoint=$HEAD:29500" in shlex.split(command) and "--nnodes=2" in shlex.split(command)
    assert script.count("run.resume_from_checkpoint") == 1 and "#SBATCH --nodes=2" in script
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho first\necho second\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "-u"], input=script, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert "<--rdzv_endpoint=first:29500>" in said and "<--rdzv_id=77>" in said and f"<{config}>" in said


def test_processes_on_cpus_ask_for_no_gpus(config, capsys):
    _, script = printed(capsys, config, "--gpus-per-node", "2", "run.device=cpu")
    assert "gpus-per-node" not in script


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--gpus-per-node", "3"],
            "train.train_batch_size: 32 clips cannot be shared equally by 3 ranks; write a multiple of 3",
        ),
        (
            ["--gpus-per-node", "8", "--nodes", "2"],
            "--nodes 2: from here only this machine can be started; add --dry-run",
        ),
        (
            ["--gpus-per-node", "4", "model.widht=3"],
            "config error: model.widht: unknown key; did you mean model.width?",
        ),
    ],
)
def test_what_cannot_be_started_is_told_in_a_line(config, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", config, *arguments])
    assert stop.value.code in (1, 2) and said in capsys.readouterr().err


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (1, 1), (-15, 143)])
def test_without_dry_run_torchrun_is_run_and_its_end_is_ours(config, monkeypatch, ended, code):
    started = []

    class Process:
        def __init__(self, words, env):
            started.append(words)
            assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "270" and env["PATH"] == os.environ["PATH"]

        def wait(self):
            return ended

    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", config, "--gpus-per-node", "2", "run.device=cpu"])
    assert stop.value.code == code
    ((program, *words),) = started
    assert program == sys.executable
    assert words == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "stgen", "train", config,
                     "run.device=cpu"]  # fmt: skip


@pytest.mark.slow
def test_ranks_that_cannot_start_end_with_one_line_first(config):
    command = [
        sys.executable,
        "-m",
        "stgen",
        "launch",
        config,
        "--gpus-per-node",
        "2",
        "data.train_data_dir=/no/such/folder",
    ]
    rest = ["run.device=cpu", f"run.output_dir={Path(config).parent / 'run'}"]
    done = subprocess.run([*command, *rest], capture_output=True, text=True, cwd=ROOT, timeout=150)
    said = done.stderr[done.stderr.index("ends the run:") :].splitlines()
    assert done.returncode == 1 and said[1].startswith("error: ") and "/no/such/folder" in said[1]
    assert done.stderr.count("/no/such/folder") == 1

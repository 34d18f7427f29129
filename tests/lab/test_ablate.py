"""The runner: what is done is not done again, failures stop nothing, kills lose nothing, folders are not mixed up."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stgen import build, cli, config, schema, step, train
from stgen.lab import ablate, forecast, plan, report, runner, study

ROOT = Path(__file__).parents[2]
BASE = """
data: {num_frames: 4, height: 16, width: 16, shapes: {clips: 48}, dataloader_num_workers: 0, cache: memory}
codec: {patch_size: [2, 8, 8], components: 6, fit_clips: 8}
text: {width: 16, caption_dropout: 0.3}
model: {width: 16, depth: 2, heads: 2, plan: joint}
train: {train_batch_size: 4, max_train_steps: 40}
optim: {lr_warmup_steps: 2}
validation: {steps: null, num_inference_steps: 2}
log: {every: 1, wandb: disabled}
"""
STUDY = """
about: Does factorising matter?
base: base.yaml
axes: {model.plan: {factorised: spatial temporal, spatial: spatial}}
seeds: [0, 1]
"""
# Stands for training and for measuring: says what it was asked, obeys the files that a test lays beside the run folder.
FAKE = """
import fcntl, json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
trains = "train" in words
run = Path(words[-1]).with_suffix("") if trains else Path(words[-1])
run.mkdir(parents=True, exist_ok=True)
with (run / "calls").open("a") as file:
    file.write(f"{'train' if trains else 'measure'} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if run.with_name(run.name + ".break").exists():
    print("all is well so far")
    sys.exit("something broke")
if run.with_name(run.name + ".slow").exists():
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    time.sleep(60)
if trains:
    (run / "env.json").write_text(json.dumps({"device": "cpu", "threads": 1}))
    (run / "metrics.jsonl").write_text(json.dumps({"global_step": 40}) + "\\n")
    (run / "summary.json").write_text(json.dumps({"steps": 40, "seconds": {"total": 3.0}}))
else:
    loss = float(len(run.parent.name) + int(run.name[-1]))
    measures = {"held_out": {"mean": loss, "per_clip": [[loss]]}, "accuracy": {"held_out": 0.5}, "seconds": 1.0}
    (run / "measures.json").write_text(json.dumps(measures))
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Speeds are given, not measured; the page is not drawn."""
    monkeypatch.setattr(
        plan._Stopwatch, "_measured", lambda self, files: ({"step": 0.1, "forward": 0.01} for _ in files)
    )
    monkeypatch.setattr(report, "write", lambda results, folder: folder / "report.html")


def ablated(home, *, launcher=None, **options) -> int:
    path = home / "study.yaml"
    launcher = launcher or f"{sys.executable} {home / 'fake.py'} {{command}}"
    chosen = plan.Options(home / "out", launcher=launcher, **options)
    return ablate.ablate(path, study.read(path), study.load(path, []), chosen)


def calls(home) -> dict[str, list[str]]:
    """What was asked of each run, in order."""
    files = sorted((home / "out" / "cells").glob("*/*/calls"))
    return {f"{f.parts[-3]} {f.parts[-2]}": [line.split()[0] for line in f.read_text().splitlines()] for f in files}


def twice(runs) -> dict[str, list[str]]:
    return {run: ["train", "measure"] for run in runs}


RUNS = [f"{cell} seed-{seed}" for cell in ("base", "factorised", "spatial") for seed in (0, 1)]


# ---------------------------------------------------------------------------------------------------------- the runner


def test_every_run_is_trained_and_measured_once(home, capsys):
    assert ablated(home) == 0
    assert calls(home) == twice(RUNS)
    assert "6 runs (3 cells x 2 seeds)" in capsys.readouterr().out
    table = _table(home)
    assert table["factorised", "held-out loss"][2:5] == [10.5, pytest.approx(0.5**0.5), 6.0]  # mean, spread, difference
    assert ablated(home) == 0  # again: nothing is left to do
    assert _table(home) == table
    assert calls(home) == twice(RUNS)
    assert "6 of them done; about 0.0 s" in capsys.readouterr().out


def _table(home) -> dict:
    """What the study's W&B run is given: cell and measure to the row, once."""
    lines = [json.loads(line) for line in (home / "out" / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line["study/table"] for line in lines if "study/table" in line]
    return {(row[0], row[1]): row for row in found["rows"]}


def test_runs_read_the_shapes_of_their_seed_and_say_who_they_are(home):
    ablated(home)
    cfgs = {
        (cell, seed): config.load(home / "out" / "cells" / cell / f"seed-{seed}.yaml", [], schema.Config)
        for cell in ("base", "factorised") for seed in (0, 1)
    }  # fmt: skip
    for (cell, seed), cfg in cfgs.items():
        assert cfg.data.train_data_dir == str(home / "out" / "data" / f"seed-{seed}")
        assert (home / "out" / "data" / f"seed-{seed}" / "00047.mp4").exists()
        assert (cfg.run.seed, cfg.log.group, cfg.log.name) == (seed, "study", f"{cell}-seed{seed}")
        assert cfg.run.resume_from_checkpoint == "latest" and cfg.checkpoint.steps == 4
    assert cfgs["base", 0].model.plan == "joint" and cfgs["factorised", 1].model.plan == "spatial temporal"
    changed = config.differences(cfgs["base", 0], cfgs["factorised", 0])
    assert [line.split(":")[0] for line in changed] == ["run.output_dir", "model.plan", "log.name"]


def test_a_failure_is_told_and_stops_nothing(home, capsys):
    broken = home / "out" / "cells" / "factorised" / "seed-0.break"
    broken.parent.mkdir(parents=True)
    broken.touch()
    made = ablate.planned(home / "study.yaml", *_study(home), plan.Options(home / "new"))
    made.save(home / "out")  # a folder that is known
    assert ablated(home) == 1
    told = capsys.readouterr().err
    assert "failed: factorised, seed 0: training ended with exit status 1: something broke" in told
    assert "all is well so far" in told and "seed-0.log" in told
    results = ablate.collect(made, home / "out")
    status = {(cell.name, run.seed): run.status for cell in results.cells for run in cell.runs}
    assert status.pop(("factorised", 0)) == "failed" and set(status.values()) == {"done"}
    assert results.cells[1].runs[0].reason.startswith("training ended with exit status 1")
    broken.unlink()
    assert ablated(home) == 0  # tried again, and only it
    assert calls(home)["factorised seed-0"] == ["train", "train", "measure"]
    assert calls(home)["base seed-0"] == ["train", "measure"]
    results = ablate.collect(made, home / "out")
    assert {run.status for cell in results.cells for run in cell.runs} == {"done"}
    loss = {one.cell: one.mean for one in results.comparison.differences if one.measure == "held-out loss"}
    assert loss == {"factorised": 6.0, "spatial": 3.0}  # what FAKE measures: the length of the name


def _study(home):
    return study.read(home / "study.yaml"), study.load(home / "study.yaml", [])


def test_half_written_files_are_not_taken_for_results(home):
    ablated(home)
    cells = home / "out" / "cells"
    (cells / "base" / "seed-0" / "measures.json").write_text('{"held_out": {"me')
    (cells / "base" / "seed-1" / "summary.json").write_text("")
    (cells / "spatial" / "seed-0" / "measures.json").unlink()
    assert ablated(home) == 0
    again = {name: asked[2:] for name, asked in calls(home).items() if asked[2:]}
    assert again == {"base seed-0": ["measure"], "base seed-1": ["train"], "spatial seed-0": ["measure"]}


def test_only_named_cells_run(home):
    assert ablated(home, only=["spatial"]) == 0
    assert list(calls(home)) == ["spatial seed-0", "spatial seed-1"]


def test_jobs_threads_and_devices_reach_the_runs(home):
    ablated(home, threads=3, devices=["4", "5"])
    said = {f.read_text().splitlines()[0] for f in (home / "out" / "cells").glob("*/*/calls")}
    assert said == {"train 3 4", "train 3 5"}
    with pytest.raises(study.StudyError, match=r"--threads 2: .* was begun with 3 a run"):
        ablated(home, threads=2)
    assert ablated(home) == 0  # 3 again, as the folder began


def test_a_launcher_gets_words_or_text():
    job = plan.Job(None, type("Row", (), {"slug": "a"}), 3, Path("/out"))  # type: ignore[arg-type]
    command = ["python", "-m", "x", "a file.yaml"]
    assert runner.launched(None, command, job) == command
    assert runner.launched("srun -J {name} --gpus=1 {command}", command, job) == [
        "srun",
        "-J",
        "a-seed3",
        "--gpus=1",
        *command,
    ]
    assert runner.launched("ssh host 'cd x && {command}'", command, job) == [
        "ssh",
        "host",
        "cd x && python -m x 'a file.yaml'",
    ]
    for wrong, words in (("srun", "has no {command}"), ("srun 'x {command}", "No closing quotation")):
        with pytest.raises(study.StudyError, match=words):
            runner.check_launcher(wrong)


def begun(home) -> subprocess.Popen:
    """The runner as a process, with one run that does not come to an end."""
    slow = home / "out" / "cells" / "factorised" / "seed-0.slow"
    slow.parent.mkdir(parents=True, exist_ok=True)
    slow.touch()
    path = home / "study.yaml"
    made = ablate.planned(path, *_study(home), plan.Options(home / "new"))
    made.save(home / "out")
    script = (
        "import signal, sys; from pathlib import Path; from stgen.lab import plan, runner\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it from the start
        f"home = Path({str(home)!r})\n"
        f"options = plan.Options(home / 'out', jobs=2, launcher=f'{{sys.executable}} {{home}}/fake.py {{{{command}}}}')\n"
        "runner.run(plan.recorded(home / 'out', 'study'), options)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: (home / "out" / "cells" / "factorised" / "seed-0" / ".lock").exists() and len(done(home)) == 5)
    return process


def done(home):
    return sorted((home / "out" / "cells").glob("*/*/measures.json"))


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def child_of(home) -> int:
    """The process that trains factorised seed 0."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        if b"factorised/seed-0" in words and str(home).encode() in words:
            return int(line.parts[2])
    return 0


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_runner_that_ends_takes_its_runs_along_and_can_be_started_again(home, number):
    process = begun(home)
    assert child_of(home)
    process.send_signal(number)
    assert process.wait(30) != 0
    until(lambda: not child_of(home))
    assert not list((home / "out" / "cells").glob("*/*.failed")) and len(done(home)) == 5
    (home / "out" / "cells" / "factorised" / "seed-0.slow").unlink()
    assert ablated(home, threads=None) == 0
    assert calls(home)["factorised seed-0"] == ["train", "train", "measure"]
    assert all(asked == ["train", "measure"] for name, asked in calls(home).items() if name != "factorised seed-0")


def test_a_run_that_outlived_its_runner_is_waited_for(home):
    """Where the system cannot end it with its runner, another process may hold the run folder."""
    folder = home / "out" / "cells" / "base" / "seed-0"
    folder.mkdir(parents=True)
    ablate.planned(home / "study.yaml", *_study(home), plan.Options(home / "new")).save(home / "out")
    hold = f"import fcntl, time; file = open({str(folder / '.lock')!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    script = f"{hold}; print(1, flush=True); time.sleep(2)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    assert ablated(home) == 0
    assert other.poll() is not None  # base seed 0 began after the other process had ended
    assert calls(home)["base seed-0"] == ["train", "measure"]


# ------------------------------------------------------------------------------------------------------------ folders


def test_folders_are_not_mixed_up(home):
    ablated(home)
    path = home / "study.yaml"
    shutil.copy(path, home / "other.yaml")
    with pytest.raises(study.StudyError, match=r"holds the study study, not other; name another --output_dir"):
        plan.recorded(home / "out", "other")
    (home / "full").mkdir()
    (home / "full" / "thesis.tex").touch()
    with pytest.raises(study.StudyError, match="holds something else"):
        plan.recorded(home / "full", "study")
    (home / "old").mkdir()
    (home / "old" / "plan.json").write_text('{"study": "study", "rows": [{"name": "base"}]}')
    with pytest.raises(study.StudyError, match="of another version of stgen"):
        plan.recorded(home / "old", "study")
    with pytest.raises(study.StudyError, match="is a file"):
        plan.recorded(path, "study")
    with (home / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(study.StudyError, match="another stgen ablate is at work there"):
            ablated(home)
    assert [p.name for p in (home / "full").iterdir()] == ["thesis.tex"]


def test_a_cell_that_changed_is_not_taken_for_the_old_one(home):
    ablated(home)
    before = sorted((p, p.stat().st_mtime_ns) for p in (home / "out").rglob("*") if p.is_file() and p.name != ".lock")
    (home / "study.yaml").write_text(STUDY.replace("spatial: spatial", "spatial: temporal"))
    with pytest.raises(
        study.StudyError, match=r"spatial/seed-0 is of another config \(model.plan: spatial -> temporal\)"
    ):
        ablated(home)
    assert before == sorted(
        (p, p.stat().st_mtime_ns) for p in (home / "out").rglob("*") if p.is_file() and p.name != ".lock"
    )
    (home / "study.yaml").write_text(STUDY.replace("spatial: spatial}", "spatial: spatial, temporal: temporal}"))
    assert ablated(home) == 0  # a new cell joins the old ones
    assert calls(home) == twice([*RUNS, "temporal seed-0", "temporal seed-1"])


def test_timed_steps_are_measured_once_and_kept(home, monkeypatch):
    (home / "study.yaml").write_text(STUDY + "match: time\n")
    speeds = iter([0.1, 0.05, 0.2, 9.0, 9.0, 9.0])
    monkeypatch.setattr(
        plan._Stopwatch, "_measured", lambda self, files: ({"step": next(speeds), "forward": 1} for _ in files)
    )
    for _ in range(2):
        assert ablated(home) == 0
        made = plan.recorded(home / "out", "study")
        assert made is not None and [row.steps for row in made.rows] == [40, 80, 20]
        assert "Not repeatable" in made.budget.words


def test_a_forecast_learns_from_finished_runs(home):
    path = home / "study.yaml"
    new = plan.make(path, *_study(home), plan.Options(home / "out"), None)
    clips = 2 * 4 + 2 * 8 * 8
    expected = 40 * 0.1 + clips * 2 * 2 * 0.01  # steps; inference steps x guidance
    assert forecast.Forecast(new, home / "out").seconds(new.rows[0]) == pytest.approx(expected)
    ablated(home, only=["base"])
    guess = forecast.Forecast(new, home / "out")
    assert guess.seconds(new.rows[0]) == pytest.approx(4.0)  # what FAKE says
    assert guess.seconds(new.rows[1]) == pytest.approx(4.0) and "2 finished runs" in guess.words


# ----------------------------------------------------------------------------------------------------------- the door


def test_the_door_refuses_in_one_line(home, capsys):
    broken = {
        ("--only", "spatiel"): "study error: --only: .* has no cell 'spatiel'",
        ("--report",): "study error: .* holds no results of study yet",
        ("--launcher", "srun"): "study error: --launcher: 'srun' has no {command}",
        ("model.widht=3",): "config error: model.widht: unknown key; did you mean model.width?",
    }
    for words, told in broken.items():
        with pytest.raises(SystemExit) as ended:
            cli.main(["ablate", str(home / "study.yaml"), *words, "--output_dir", str(home / "out")])
        assert ended.value.code == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert re.match(told, error), error
    assert not (home / "out").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(home, capsys):
    cli.main(
        ["ablate", str(home / "study.yaml"), "--dry-run", "--output_dir", str(home / "out"), "train.train_batch_size=2"]
    )
    out = capsys.readouterr().out
    assert "factorised" in out and "model.plan spatial temporal" in out and "Predicted from three timed steps" in out
    assert not (home / "out").exists()


# ------------------------------------------------------------------------------------------------ common random numbers


def seen(monkeypatch, cfg) -> list[tuple]:
    """What a run of the config draws: files, noise, times and captions of each step."""
    found, draw = [], step.draw

    def spy(cfg, objective, batch, first):
        noise, times, captions = draw(cfg, objective, batch, first)
        found.append((first, tuple(Path(f).name for f in batch.files), noise.clone(), times.clone(), tuple(captions)))
        return noise, times, captions

    monkeypatch.setattr(step, "draw", spy)
    train.train(cfg)
    monkeypatch.setattr(step, "draw", draw)
    return found


def test_cells_see_the_same_clips_noise_times_and_captions(home, monkeypatch):
    text = """
base: base.yaml
steps: 6
axes:
  model.plan: {latte: spatial temporal}
  model.width: {wide: 32}
  model.mixers.joint.pattern: {random: {kind: random, blocks: 1}}
  model.mixers.joint.normaliser: {favor: {kind: linear, features: favor}}
  model.registers: {registers: 2}
"""
    (home / "study.yaml").write_text(text)
    made = plan.make(home / "study.yaml", *_study(home), plan.Options(home / "out"), None)
    jobs = [job for job in made.jobs(home / "out") if job.seed == 0]
    for job in jobs:
        job.prepare()
    runner._render(jobs)
    base, *others = [seen(monkeypatch, job.cfg) for job in jobs]
    assert len(base) == 6 and len(others) == 5
    assert "" in {caption for _, _, _, _, captions in base for caption in captions}  # some were dropped
    for other in others:
        for mine, theirs in zip(base, other, strict=True):
            assert mine[:2] == theirs[:2] and mine[4] == theirs[4]
            assert torch.equal(mine[2], theirs[2]) and torch.equal(mine[3], theirs[3])


def test_initial_weights_follow_the_seed():
    def weights(seed, plan="joint"):
        cfg = schema.Config.model_validate(
            {"run": {"seed": seed}, "model": {"width": 16, "plan": plan}, "train": {"max_train_steps": 1}}
        )
        return build.build_parts(cfg, ["a red circle"]).transformer.state_dict()

    one, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


# ----------------------------------------------------------------------------------------------------- the real thing


def started(home, folder) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "stgen",
        "ablate",
        str(home / "study.yaml"),
        "--output_dir",
        str(folder),
        "--jobs",
        "2",
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_killed_twice_in_the_middle_of_cells_no_number_changes(home):
    (home / "study.yaml").write_text(STUDY.replace(", spatial: spatial", "") + "steps: 600\n")
    whole = started(home, home / "whole")
    assert whole.wait(500) == 0, whole.stderr.read() if whole.stderr else ""
    for reached in (100, 350):
        cut = started(home, home / "cut")
        until(lambda least=reached: any(_steps(run) >= least for run in (home / "cut").glob("cells/*/*")), 300)
        cut.kill()
        for child in _training(home / "cut"):
            os.kill(child, signal.SIGKILL)
        cut.wait()
        until(lambda: not _training(home / "cut"))
    assert not list((home / "cut").rglob("measures.json"))
    cut = started(home, home / "cut")
    assert cut.wait(500) == 0, cut.stderr.read() if cut.stderr else ""
    same(home / "whole", home / "cut")


def _steps(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def _training(folder) -> list[int]:
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in words and any(word.startswith(str(folder).encode()) for word in words):
            found.append(int(line.parts[2]))
    return found


def same(whole: Path, cut: Path) -> None:
    """Weights, losses and measures of two studies are the same to the last bit."""
    runs = sorted(path.parent.relative_to(whole) for path in whole.rglob("measures.json"))
    assert len(runs) == 4
    for run in runs:
        for file in sorted((whole / run / "final").rglob("*.safetensors")):
            left, right = load_file(file), load_file(cut / file.relative_to(whole))
            assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), file
        for keys in (("train/loss",), ("val/loss",)):
            assert _metrics(whole / run, *keys) == _metrics(cut / run, *keys) != []
        left, right = (json.loads((folder / run / "measures.json").read_text()) for folder in (whole, cut))
        assert left.pop("cost")["parameters"] == right.pop("cost")["parameters"]
        left.pop("seconds"), right.pop("seconds")
        assert json.dumps(left).replace(str(whole), "") == json.dumps(right).replace(str(cut), "")


def _metrics(run, *keys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["global_step"], *(row[key] for key in keys)) for row in rows if all(key in row for key in keys)]

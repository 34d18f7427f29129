"""The story of a run: exact resume, equal accumulation, limits, guards, any folder of videos."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stgen import config, schema, shapes, source, step, video
from stgen import train as story
from stgen.build import build_parts, load_pipeline
from stgen.checkpoint import CheckpointError
from stgen.dataset import DataError
from stgen.finite import NotFinite
from stgen.objective import Objective
from stgen.progress import Progress
from stgen.train import TrainingError, train

ROOT = Path(__file__).parents[2]
TINY = [
    "data.num_frames=4", "data.height=16", "data.width=16", "data.shapes.clips=24", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,8,8]", "codec.components=6", "codec.fit_clips=8", "text.width=16",
    "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=4", "optim.lr_warmup_steps=2",
    "validation.steps=null", "validation.num_inference_steps=2", "log.every=1", "log.wandb=disabled",
    "checkpoint.total_limit=99",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A function that makes the config of a tiny run from overrides."""

    def make(*overrides: str, folder="run", limit="train.max_train_steps=6", other_codec=False) -> schema.Config:
        path = tmp_path / "tiny.yaml"
        path.write_text("{}\n")
        base = [key for key in TINY if not (other_codec and key.startswith("codec."))]
        return config.load(path, [*base, f"run.output_dir={tmp_path / folder}", limit, *overrides], schema.Config)

    return make


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.stem}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same_checkpoint(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys() and len(left) > 50
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def metrics_of(run: Path, *keys: str) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in ("global_step", *keys)) for row in rows if all(key in row for key in keys)]


def write_videos(folder: Path, count: int, frames: int = 8, size: int = 24, captions: bool = True) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        combo = shapes.ALL[i * 7 % len(shapes.ALL)]
        video.write(folder / f"{i}.mp4", video.Clip(shapes.render(combo, frames, size, size, i), 8.0))
        if captions:
            (folder / f"{i}.txt").write_text(combo.prompt)
    return folder


# ------------------------------------------------------------------------------------------------------ exactness


SCHEDULES = """{block: [1, 1, 1], approximate: {quantise: [q, k], bits: {kind: linear, start: 8, end: 3, steps: 4, every: 2}},
    pattern: [{kind: topk, ratio: {kind: plateau, start: 1.0, end: 0.25, parts: 3, patience: 1}},
              {kind: local, radius: {kind: linear, start: 1, end: 0, steps: 3}},
              {kind: global, frames: {kind: stairs, values: [2, 1, 0], at_steps: [2, 5]}}]}""".replace("\n", " ")
NOISE = "{block: [1, 1, 1], pattern: {kind: learned, ratio: 0.5, gumbel: 1.0}}"
PRUNING = """{heads: {kind: stairs, values: [1, 0.5], at_steps: [4]},
    tokens: {kind: linear, start: 1, end: 0.4, steps: 5}}""".replace("\n", " ")
CHANGING = {
    "nothing": (1, [], []),
    "schedules": (3, [f"model.mixers.spatial={SCHEDULES}"], ["any.0.ratio", "any.1.radius", "any.2.frames", "bits"]),
    "noise": (3, [f"model.mixers.spatial={NOISE}"], []),
    "pruning": (5, ["model.plan=joint", f"model.pruning={PRUNING}"], ["pruning/tokens", "pruning/heads"]),
}


@pytest.mark.parametrize("changing", CHANGING)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, changing):
    cut, overrides, told = CHANGING[changing]
    extra = ["checkpoint.steps=1", "train.gradient_accumulation_steps=2", "text.caption_dropout=0.3", "log.every=2"]
    extra += overrides
    train(tiny(*extra, folder="whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for n in range(cut + 1, 7):  # what a kill after step `cut` leaves behind
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{n}")
    train(tiny(*extra, "run.resume_from_checkpoint=latest", folder="cut"))
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6")
    keys = ["train/loss", "train/grad_norm", "train/lr"]
    keys += [name if "/" in name else f"attention/0/{name}" for name in told]
    rows = metrics_of(tmp_path / "whole", *keys)
    assert rows == metrics_of(tmp_path / "cut", *keys) and len(rows) == 3
    assert all(len({row[i] for row in rows}) > 1 for i in range(4, 4 + len(told)))  # each has changed


def test_workers_and_memory_do_not_change_a_decoded_run(tiny, tmp_path):
    """The same folder, read in the process and by two workers, over an epoch's border."""
    folder = write_videos(tmp_path / "videos", 5)
    for name, workers in (("none", 0), ("two", 2)):
        train(tiny(f"data.train_data_dir={folder}", f"data.dataloader_num_workers={workers}", "data.crop=random",
                   folder=name, limit="train.max_train_steps=3"))  # fmt: skip
    assert_same_checkpoint(tmp_path / "none" / "checkpoint-3", tmp_path / "two" / "checkpoint-3")


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny):
    gradients = []
    for parts_count in (1, 2, 4):
        cfg = tiny(f"train.gradient_accumulation_steps={parts_count}", "model.qk_norm=true")
        parts = build_parts(cfg, ["a red circle moving up"])
        for module in parts.trained.values():
            module.double()
        latents = torch.randn(4, 6, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        batch = source.Batch(latents, ["a red circle", "moving up", "circle", ""], ["a", "b", "c", "d"])
        loss = step.accumulate(cfg, parts.transformer, parts, Objective(), batch, step=7)
        gradients.append((loss, [p.grad for m in parts.trained.values() for p in m.parameters() if p.grad is not None]))
    for loss, grads in gradients[1:]:
        assert abs(loss - gradients[0][0]) < 1e-9
        for a, b in zip(grads, gradients[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_draws_depend_on_seed_and_sample_alone(tiny):
    cfg = tiny("text.caption_dropout=0.5")
    batch = source.Batch(torch.zeros(4, 2, 1, 1, 1), list("abcd"), list("abcd"))
    noise, times, captions = step.draw(cfg, Objective(), batch, first=40)
    halves = [step.draw(cfg, Objective(), part, first) for part, first in zip(batch.parts(2), (40, 42), strict=True)]
    assert torch.equal(torch.cat([h[0] for h in halves]), noise)
    assert torch.equal(torch.cat([h[1] for h in halves]), times)
    assert halves[0][2] + halves[1][2] == captions
    other = step.draw(tiny("run.seed=1", "text.caption_dropout=0.5"), Objective(), batch, first=40)
    assert not torch.equal(other[0], noise)
    assert step.draw(tiny("text.caption_dropout=1"), Objective(), batch, 0)[2] == [""] * 4
    assert step.draw(tiny("text.caption_dropout=0"), Objective(), batch, 0)[2] == list("abcd")


def test_validation_does_not_disturb_training(tiny, tmp_path):
    train(tiny("validation.steps=null", folder="without"))
    train(tiny("validation.steps=2", folder="with"))
    assert_same_checkpoint(tmp_path / "without" / "checkpoint-6", tmp_path / "with" / "checkpoint-6")
    assert {f.name for f in (tmp_path / "with" / "samples").iterdir()} >= {"step-000000", "step-000002", "step-000006"}


# --------------------------------------------------------------------------------------------------------- limits


def test_a_run_limited_in_seconds_fixes_its_steps_from_its_speed():
    cfg = config.load(ROOT / "configs" / "quickstart.yaml", ["train.max_train_seconds=10"], schema.Config)
    progress = Progress(total=None)
    for _ in range(49):
        progress.advance(1.0, 1.0, 0.05, cfg)
    assert progress.total is None
    progress.advance(1.0, 1.0, 0.05, cfg)
    assert progress.total == 50 + int(7.5 / 0.05)
    progress.advance(1.0, 1.0, 5.0, cfg)  # a slow step later changes nothing
    assert progress.total == 200


def test_a_budget_of_seconds_shorter_than_fifty_steps_still_ends(tiny):
    summary = train(tiny(limit="train.max_train_seconds=0.2"))
    assert 1 <= summary["steps"] < 50


def test_epochs_count_the_training_videos(tiny):
    assert train(tiny("data.held_out_clips=4", limit="train.num_train_epochs=1"))["steps"] == 6  # 22 videos in fours


# ----------------------------------------------------------------------------------------------------- the outcome


def test_a_run_leaves_what_it_promises(tiny, tmp_path):
    summary = train(tiny("validation.steps=3", "validation.judged_noises=1", "log.wandb=offline"))
    run = tmp_path / "run"
    saved = json.loads((run / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    assert saved["steps"] == 6 and saved["seconds"]["total"] > saved["seconds"]["train"] > 0
    assert set(saved["accuracy"]) == {"seen", "held_out", "real"} and saved["accuracy_detail"]["held_out"]["n"] == 8
    assert saved["loss"]["train"] > 0 and saved["loss"]["held_out"] > 0
    assert config.load(run / "config.yaml", [], schema.Config) == tiny(
        "validation.steps=3", "validation.judged_noises=1", "log.wandb=offline"
    )
    assert (run / "contact_sheet.png").stat().st_size > 1000 and list((run / "wandb").glob("offline-run-*"))
    keys = set().union(*(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()))
    assert keys >= {
        "global_step", "train/loss", "train/lr", "train/grad_norm", "val/loss", "validation/videos",
        "perf/step_time_s", "perf/data_wait_s", "perf/samples_per_s", "perf/tokens_per_s", "perf/tflops",
    }  # fmt: skip
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")]
    ema, raw = load_pipeline(run, "ema"), load_pipeline(run, "raw")
    checkpoint = load_pipeline(run / "checkpoint-6", "ema")
    for a, _, c in zip(
        ema.transformer.parameters(), raw.transformer.parameters(), checkpoint.transformer.parameters(), strict=True
    ):
        assert torch.equal(a, c)
    assert any(
        not torch.equal(a, b) for a, b in zip(ema.transformer.parameters(), raw.transformer.parameters(), strict=True)
    )


def test_pixels_cross_attention_and_diffusion_train_too(tiny):
    cfg = tiny(
        "codec.kind=pixels", "tokens.patch_size=[2,4,4]", "text.conditioning=both",
        "text.kind=bytes", "model.plan=spatial>temporal",
        "objective.path=diffusion", "objective.prediction_type=v_prediction", "objective.snr_gamma=5",
        "train.mixed_precision=bf16", "train.gradient_checkpointing=true", limit="train.max_train_steps=2", other_codec=True,
    )  # fmt: skip
    assert train(cfg)["steps"] == 2


# ------------------------------------------------------------------------------------------------- folders and faults


def test_any_folder_of_videos_trains_and_samples(tiny, tmp_path):
    folder = write_videos(tmp_path / "two", 2, captions=False)
    (folder / "broken.mp4").write_bytes(b"not a video")
    summary = train(tiny(f"data.train_data_dir={folder}", "codec.components=4", limit="train.max_train_steps=2"))
    assert summary["rejects"] == 1 and summary["loss"]["held_out"] is None and "accuracy" not in summary
    assert "broken.mp4" in (tmp_path / "run" / "rejects.jsonl").read_text()
    assert load_pipeline(tmp_path / "run")("anything", output_type="pt").frames.shape == (1, 4, 3, 16, 16)


def test_an_empty_folder_stops_at_once(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        train(tiny(f"data.train_data_dir={tmp_path / 'empty'}"))


def test_nan_stops_before_the_update_and_names_the_clips(tiny, tmp_path, monkeypatch):
    honest = Objective.loss

    def poisoned(self, output, x, noise, t):
        poisoned.calls += 1
        return honest(self, output, x, noise, t) * (float("nan") if poisoned.calls == 4 else 1.0)

    poisoned.calls = 0
    monkeypatch.setattr(Objective, "loss", poisoned)
    with pytest.raises(NotFinite, match=r"step 3: loss nan.*stopped before the update.*\.mp4"):
        train(tiny("checkpoint.steps=3", "data.held_out_clips=0"))
    dump = json.loads((tmp_path / "run" / "not-finite-step-3.json").read_text())
    assert dump["step"] == 3 and len(dump["files"]) == 4
    assert all(
        t.isfinite().all() for t in tensors_of(tmp_path / "run" / "checkpoint-3").values() if t.is_floating_point()
    )


def test_an_earlier_run_is_moved_aside_not_overwritten(tiny, tmp_path, capsys):
    train(tiny(limit="train.max_train_steps=1"))
    train(tiny(limit="train.max_train_steps=2"))
    assert json.loads((tmp_path / "run-old1" / "summary.json").read_text())["steps"] == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_two_processes_cannot_train_into_one_folder(tiny, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="another process is training into"):
            train(tiny())


def test_resume_refuses_another_config_key_by_key(tiny, tmp_path):
    train(tiny(limit="train.max_train_steps=1"))
    with pytest.raises(TrainingError, match=r"optim.learning_rate: 0.0003 -> 0.001"):
        train(tiny("run.resume_from_checkpoint=latest", "optim.learning_rate=1e-3"))
    allowed = tiny("run.resume_from_checkpoint=latest", "optim.learning_rate=1e-3", "run.allow_changed_config=true")
    assert train(allowed)["steps"] == 6


def test_a_key_that_is_younger_than_a_checkpoint_has_its_default_there(tiny, tmp_path, monkeypatch):
    def without_newest(cfg, **options):
        tree = pydantic_dump(cfg, **options)
        tree["model"].pop("registers")
        return tree

    pydantic_dump = schema.Config.model_dump
    with monkeypatch.context() as patched:
        patched.setattr(schema.Config, "model_dump", without_newest)
        train(tiny(limit="train.max_train_steps=1"))
    with pytest.raises(TrainingError, match=r"model.registers: 0 -> 2"):
        train(tiny("run.resume_from_checkpoint=latest", "model.registers=2"))
    assert train(tiny("run.resume_from_checkpoint=latest"))["steps"] == 6


def test_resume_refuses_another_seed_and_another_folder(tiny, tmp_path):
    folder = write_videos(tmp_path / "videos", 12)
    start = [f"data.train_data_dir={folder}", "checkpoint.steps=1"]
    train(tiny(*start, limit="train.max_train_steps=1"))
    goes_on = [*start, "run.resume_from_checkpoint=latest"]
    with pytest.raises(TrainingError, match=r"run.seed: 0 -> 7"):
        train(tiny(*goes_on, "run.seed=7"))
    shutil.copy(folder / "0.mp4", folder / "one_more.mp4")
    with pytest.raises(TrainingError, match="no longer holds the videos"):
        train(tiny(*goes_on))
    (folder / "one_more.mp4").unlink()
    assert train(tiny(*goes_on))["steps"] == 6


def test_a_run_that_goes_on_leaves_no_pipeline_of_earlier_steps(tiny, tmp_path, monkeypatch):
    train(tiny(limit="train.max_train_steps=1"))
    assert (tmp_path / "run" / "final").is_dir()
    monkeypatch.setattr("stgen.checkpoint.save", lambda *_: (_ for _ in ()).throw(CheckpointError("disk full")))
    with pytest.raises(CheckpointError):
        train(tiny("run.resume_from_checkpoint=latest"))
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_from_another_runs_checkpoint_is_a_new_run(tiny, tmp_path):
    train(tiny("data.held_out_clips=0", limit="train.max_train_steps=2"))
    train(tiny(limit="train.max_train_steps=1", folder="other"))
    which = f"run.resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}"
    train(tiny(which, "data.held_out_clips=0", folder="other"))
    assert (tmp_path / "other-old1" / "checkpoint-1").is_dir()
    assert [row[0] for row in metrics_of(tmp_path / "other", "train/loss")] == [3, 4, 5, 6]
    ids = [
        json.loads((tmp_path / r / f"checkpoint-{n}" / "state.json").read_text())["progress"]["wandb_id"]
        for r, n in (("run", 2), ("other", 6))
    ]
    assert ids[0] != ids[1]


def test_a_checkpoint_samples_as_it_was_trained_whatever_the_run_folder_says(tiny, tmp_path):
    train(tiny(limit="train.max_train_steps=1"))
    alone = shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "alone")
    (tmp_path / "run" / "config.yaml").write_text("nonsense: 1\n")
    expected = load_pipeline(tmp_path / "run").clips(["a red circle"], [0], [""])[0]
    assert torch.equal(load_pipeline(alone).clips(["a red circle"], [0], [""])[0], expected)


def test_the_runs_own_clips_are_those_of_its_pipeline(tiny, tmp_path):
    train(tiny("train.mixed_precision=bf16", 'validation.prompts=["a red circle"]'))
    (clip,) = (tmp_path / "run" / "samples" / "final").glob("*.mp4")
    again = load_pipeline(tmp_path / "run").clips(["a red circle"], [0], [""])[0]
    video.write(tmp_path / "again.mp4", video.Clip(again, 8.0))
    assert (tmp_path / "again.mp4").read_bytes() == clip.read_bytes()


def test_resume_refuses_another_architecture_by_name(tiny, tmp_path):
    train(tiny(limit="train.max_train_steps=1"))
    with pytest.raises(CheckpointError, match="another architecture"):
        train(tiny("run.resume_from_checkpoint=latest", "model.width=32", "run.allow_changed_config=true"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, tmp_path):
    train(tiny("checkpoint.steps=2"))
    shutil.copytree(tmp_path / "run", tmp_path / "hurt")
    shutil.rmtree(tmp_path / "hurt" / "checkpoint-6")
    victim = tmp_path / "hurt" / "checkpoint-4" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    train(tiny("checkpoint.steps=2", "run.resume_from_checkpoint=latest", folder="hurt"))
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-6", tmp_path / "hurt" / "checkpoint-6")


# ------------------------------------------------------------------------------------------------ the command line


def run_cli(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def test_sigterm_saves_and_the_run_goes_on_exactly(tiny, tmp_path):
    cfg = tiny("checkpoint.steps=1000", limit="train.max_train_steps=400")
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(cfg))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output and "run.resume_from_checkpoint=latest" in output
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    at = int(saved.name.split("-")[1])
    assert 1 <= at < 400
    whole = train(
        tiny("checkpoint.steps=1000", f"run.output_dir={tmp_path / 'whole'}", limit="train.max_train_steps=400")
    )
    resumed = train(
        tiny("checkpoint.steps=1000", "run.resume_from_checkpoint=latest", limit="train.max_train_steps=400")
    )
    assert whole["loss"] == resumed["loss"]
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-400", tmp_path / "run" / "checkpoint-400")


READING = """
import os, signal, sys, time
from stgen.dataset import StepSampler, VideoFolder, loader
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a trainer, which ends its step first
    folder = VideoFolder(sys.argv[1], num_frames=4, height=16, width=16)
    batches = iter(loader(folder, StepSampler(range(4), 2, 0), 2, 20))
    next(batches)
    os.killpg(0, signal.SIGTERM)
    time.sleep(1)
    print(sum(len(next(batches)["path"]) for _ in range(20)))
    os._exit(0)
"""


def test_sigterm_to_all_processes_leaves_the_trainer_its_workers(tmp_path):
    """As torchrun and SLURM send it: more batches come than were read before."""
    (tmp_path / "reading.py").write_text(READING)
    folder = write_videos(tmp_path / "videos", 4)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "reading.py"), str(folder)], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    assert done.stdout.strip() == "40", done.stderr


def test_others_know_of_a_failure_before_the_logger_is_waited_for(tiny, monkeypatch):
    events = []

    @contextmanager
    def together(*_):
        try:
            yield
        finally:
            events.append("told")

    def fail(run):
        raise TrainingError("stumbled")

    monkeypatch.setattr(story.ranks, "together", together)
    monkeypatch.setattr(story.Logger, "finish", lambda _: events.append("logger closed"))
    monkeypatch.setattr(story, "loop", fail)
    with pytest.raises(TrainingError, match="stumbled"):
        train(tiny())
    assert events == ["told", "logger closed"]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["configs/quickstart.yaml", "model.widht=3"], 2, "config error: model.widht: unknown key; did you mean model.width?"),
        (["configs/quickstart.yaml", "model.plan=spatial tempral"], 2, "no mixer is called 'tempral'"),
        (["configs/nothing.yaml"], 2, "configs/nothing.yaml"),
        (["configs/quickstart.yaml", "data.train_data_dir=/no/such/folder"], 1, "/no/such/folder"),
        (["configs/quickstart.yaml", "text.kind=transformers", "text.path=/no/such/encoder"], 1, "/no/such/encoder"),
        (["configs/quickstart.yaml", "codec.kind=diffusers", "codec.path=/no/such/vae", "data.cache=none"], 1, "/no/such/vae"),
        (["configs/quickstart.yaml", "run.resume_from_checkpoint=/no/such/checkpoint"], 1, "/no/such/checkpoint"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(tmp_path, arguments, code, line):
    small = ["data.shapes.clips=4"] if "configs/nothing.yaml" not in arguments else []
    result = run_cli(
        *arguments, *small, f"run.output_dir={tmp_path / 'run'}", env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == code, result.stderr
    assert line in result.stderr and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert line in last, last


def test_dry_run_tells_the_cost_and_trains_nothing(tmp_path):
    result = run_cli("configs/quickstart.yaml", "--dry-run", f"run.output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    for words in ("learning_rate: 0.004", "parameters", "tokens", "FLOP", "memory", "spatial: 2 sequences of 16"):
        assert words in result.stdout, words
    assert not (tmp_path / "run").exists()


def test_help_names_every_section():
    result = run_cli("--help")
    assert result.returncode == 0
    for key in ("run.output_dir", "model.plan", "optim.learning_rate", "validation.guidance_scale", "codec.components"):
        assert key in result.stdout


ALL = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in ALL if "\nbase:" not in "\n" + path.read_text()]  # the others are studies


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_plans(path):
    from stgen.describe import dry_run

    preset = path.parent.name == "models"  # a preset is extended by a config that says how long to train
    cfg = config.load(path, ["train.max_train_steps=1"] if preset else [], schema.Config)
    words = dry_run(cfg, ["a red circle moving up"])
    assert "parameters" in words and words.count("a clip   ") == cfg.model.depth

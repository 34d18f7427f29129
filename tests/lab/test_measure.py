"""What is measured of a run: the definitions of training's own validation, the same numbers every time, whole files."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from stgen import build, config, dataset, schema, shapes, source, validation, video
from stgen.lab import measure as lab
from stgen.lab.measure import MeasureError, Protocol, measure, measured, peak_flops, read
from stgen.metrics import temporal
from stgen.objective import Objective
from stgen.train import train

SHORT = Protocol(t_bins=3, samples=4, real=12, attention_clips=1, attention_times=2)
TINY = [
    "data.num_frames=4", "data.height=16", "data.width=16", "data.shapes.clips=40", "data.shapes.held_out=2",
    "data.held_out_clips=4", "data.dataloader_num_workers=0", "codec.patch_size=[2,8,8]", "codec.components=6",
    "codec.fit_clips=8", "text.width=16", "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=4",
    "train.max_train_steps=3", "validation.steps=null", "validation.num_inference_steps=2", "validation.judged_noises=0",
    "log.wandb=disabled", "log.every=1",
]  # fmt: skip


def trained(folder: Path, *overrides: str) -> Path:
    (folder.parent / "tiny.yaml").write_text("{}\n")
    train(config.load(folder.parent / "tiny.yaml", [*TINY, f"run.output_dir={folder}", *overrides], schema.Config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that another test must not change."""
    return trained(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def found(run) -> dict:
    return measure(run, protocol=SHORT)


def repeatable(measures: dict) -> dict:
    cost = {key: one for key, one in measures["cost"].items() if key not in measures["cost"]["not_repeatable"]}
    return {**measures, "cost": cost, "seconds": None}


def test_the_same_run_gives_the_same_numbers(run, found, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    torch.manual_seed(99)  # what was drawn before does not matter
    again = measure(tmp_path / "copy", protocol=SHORT)
    assert repeatable(again) == repeatable(found)
    assert read(tmp_path / "copy") == again
    json.dumps(again, allow_nan=False)


def test_the_keys_are_those_of_the_interface(found):
    assert {
        "steps",
        "held_out",
        "accuracy",
        "cost",
        "frechet",
        "mmd",
        "flicker",
        "nearest",
        "attention",
        "seconds",
    } <= found.keys()
    assert found["steps"] == 3
    assert {"mean", "per_clip", "t_bins"} <= found["held_out"].keys()
    assert {"seen", "held_out", "real"} <= found["accuracy"].keys()
    assert {"parameters", "flops_per_step", "dense_flops_per_step", "tokens_per_second", "step_ms", "peak_memory_bytes",
            "tflops", "mfu"} <= found["cost"].keys()  # fmt: skip
    assert {"entropy", "sink_mass", "density"} <= found["attention"].keys()
    # "spatial temporal" on 2 x 2 x 2 tokens: all 4 of a frame, and both of a place.
    assert (found["attention"]["density"], found["attention"]["of_clip"]) == (1, (4 / 8 + 2 / 8) / 2)
    assert not found["protocol"]["features"]["fvd"] and found["frechet"]["name"] == "Fréchet distance"


def opened(run: Path):
    """The config, parts with averaged weights, objective and held-out clips of a run."""
    cfg = config.load(run / "config.yaml", [], schema.Config)
    pipeline = build.load_pipeline(run)
    parts = build.Parts(pipeline.codec, pipeline.text_encoder, pipeline.tokenizer, pipeline.transformer)
    folder, _ = source.open_folder(cfg, run)
    _, held = dataset.split(len(folder), cfg.data.held_out_clips, cfg.run.seed)
    batch = source.Batch.read(folder.within(held), held, parts.codec, torch.device("cpu"))
    return cfg, parts, Objective(**cfg.objective.model_dump()), batch


def test_one_bin_is_the_loss_that_training_reports(run, found, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    cfg, parts, objective, batch = opened(run)
    with validation.evaluating(parts):
        per_clip = validation.held_out_losses(cfg, parts, objective, batch)
    assert float(per_clip.mean()) == pytest.approx(summary["loss"]["held_out"], rel=1e-6)
    shutil.copytree(run, tmp_path / "copy")
    one = measure(
        tmp_path / "copy", protocol=Protocol(t_bins=1, samples=2, real=4, attention_clips=1, attention_times=1)
    )
    assert [row[0] for row in one["held_out"]["per_clip"]] == pytest.approx(per_clip.tolist(), rel=1e-6)
    assert one["held_out"]["mean"] == pytest.approx(summary["loss"]["held_out"], rel=1e-6)
    assert one["held_out"]["t_bins"] == [[0.0, 1.0]]


def test_bins_hold_their_times_and_each_has_noise_of_its_own(run, found, monkeypatch):
    seen = []

    def watched(cfg, forward, parts, objective, batch, noise, t, captions):
        seen.append((noise, t))
        return t

    monkeypatch.setattr(validation, "losses", watched)
    cfg, parts, objective, batch = opened(run)
    for part, (low, high) in enumerate(found["held_out"]["t_bins"]):
        times = validation.held_out_losses(cfg, parts, objective, batch, part, 3)
        assert (times >= low).all() and (times <= high).all() and (times.diff() > 0).all()
    assert not torch.equal(seen[0][0], seen[1][0])
    again = validation.held_out_losses(cfg, parts, objective, batch, 1, 3)
    assert torch.equal(seen[-1][0], seen[1][0]) and torch.equal(again, seen[1][1])  # the same for any model


def test_the_mean_is_that_of_clips_and_bins(found):
    rows = torch.tensor(found["held_out"]["per_clip"], dtype=torch.float64)
    assert rows.shape == (4, 3)
    assert float(rows.mean()) == found["held_out"]["mean"]
    edges = found["held_out"]["t_bins"]
    assert edges[0][0] == 0 and edges[-1][1] == 1
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))


def test_prompts_are_judged_as_training_judges_them(tmp_path):
    run = trained(tmp_path / "run", "validation.judged_noises=2")
    summary = json.loads((run / "summary.json").read_text())
    accuracy = measure(run, protocol=SHORT)["accuracy"]
    assert accuracy["detail"] == summary["accuracy_detail"]
    assert accuracy["detail"]["held_out"]["n"] == 4


def test_a_folder_of_other_videos_has_no_accuracy_and_a_run_without_held_out_clips_no_loss(tmp_path):
    folder = tmp_path / "videos"
    for i in range(5):
        frames = shapes.render(shapes.ALL[i], 4, 16, 16, seed=i)
        video.write(folder / f"{i}.mp4", video.Clip(frames, 8.0))
    run = trained(tmp_path / "run", f"data.train_data_dir={folder}", "data.held_out_clips=0")
    found = measure(run, protocol=SHORT)
    assert found["accuracy"] is None and found["held_out"] is None
    assert found["nearest"]["real"] is None and found["nearest"]["ratio"] is None and found["frechet"]["real"] is None
    assert found["protocol"]["samples"] == 4


@pytest.mark.parametrize(
    "change", ["model.plan=tcn", "model.mixers.spatial={layout: spatial, pattern: {kind: linformer, keys: 2}}"]
)
def test_heads_without_a_map_have_no_statistics(change, tmp_path):
    plan = [] if change.startswith("model.plan") else ["model.plan=spatial"]
    assert measure(trained(tmp_path / "run", change, *plan), protocol=SHORT)["attention"] is None


def test_flicker_is_that_of_the_real_held_out_clips(run, found):
    cfg, *_ = opened(run)
    folder, _ = source.open_folder(cfg, run)
    _, held = dataset.split(len(folder), cfg.data.held_out_clips, cfg.run.seed)
    clips = [folder[i, 0]["frames"].movedim(0, 1) for i in held]
    assert found["flicker"]["real"]["flicker"] == pytest.approx(sum(map(temporal.flicker, clips)) / len(clips))


def test_a_model_that_copies_is_at_no_distance(run, monkeypatch, tmp_path):
    """Sampling gives training clips: the nearest one is at 0, and the features are the clips' own."""
    shutil.copytree(run, tmp_path / "copy")
    cfg, *_ = opened(run)
    folder, _ = source.open_folder(cfg, run)
    ids, _ = dataset.split(len(folder), cfg.data.held_out_clips, cfg.run.seed)
    clips = [folder[i, 0]["frames"].movedim(0, 1) for i in ids]
    monkeypatch.setattr(validation, "sample_clips", lambda pipeline, prompts, seeds, cfg: clips[: len(prompts)])
    protocol = Protocol(t_bins=1, samples=len(ids), attention_clips=1, attention_times=1)
    found = measure(tmp_path / "copy", protocol=protocol)
    assert (found["nearest"]["median"], found["nearest"]["least"], found["nearest"]["ratio"]) == (0, 0, 0)
    assert found["nearest"]["real"]["median"] > 1 and found["nearest"]["looked_at"] == found["nearest"]["of"] == len(
        ids
    )
    assert found["frechet"]["value"] == pytest.approx(0, abs=1e-6) and found["mmd"]["value"] <= 0


def test_costs_are_those_of_the_run(run, found):
    summary = json.loads((run / "summary.json").read_text())
    cost = found["cost"]
    assert (cost["parameters"], cost["flops_per_step"]) == (summary["parameters"], summary["flops_per_step"])
    assert cost["tokens"] == 8 and cost["clips_per_step"] == 4
    assert cost["tflops"] * 1e12 * cost["step_ms"] / 1e3 == pytest.approx(cost["flops_per_step"])
    assert cost["tokens_per_second"] * cost["step_ms"] / 1e3 == pytest.approx(8 * 4)
    assert cost["mfu"] == pytest.approx(cost["tflops"] / cost["peak_tflops"])  # nothing is recomputed
    assert cost["peak_memory_bytes"] > 20 * cost["parameters"] and cost["memory"].startswith("counted")


def test_the_peak_is_measured_in_the_threads_of_training():
    before = torch.get_num_threads()
    assert math.isfinite(peak_flops(torch.device("cpu"), False, 1)) and torch.get_num_threads() == before


def test_what_was_measured_is_kept_until_the_run_or_the_protocol_changes(run, found, monkeypatch, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / lab.FILE).write_text(json.dumps(found))
    calls = []
    monkeypatch.setattr(lab, "measure", lambda run, **how: calls.append(how["protocol"]) or {})
    assert measured(copy, protocol=SHORT) == found and not calls
    measured(copy, protocol=Protocol(samples=5))
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "steps": 6}))
    measured(copy, protocol=SHORT)
    (copy / lab.FILE).write_text(json.dumps(found)[:50])  # cut short
    measured(copy, protocol=SHORT)
    assert calls == [Protocol(samples=5), SHORT, SHORT]


def test_a_failure_leaves_the_old_file_whole(run, found, monkeypatch, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / lab.FILE).write_text(json.dumps(found))
    monkeypatch.setattr(lab, "_attention", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(copy, protocol=SHORT)
    assert read(copy) == found and not list(copy.glob(".*.tmp"))


def test_an_unfinished_run_is_measured_at_its_newest_checkpoint(run, found, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "final")
    (copy / "summary.json").unlink()
    again = measure(copy, protocol=SHORT)
    assert again["steps"] == 3
    for now, before in zip(again["held_out"]["per_clip"], found["held_out"]["per_clip"], strict=True):
        assert now == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("left", [(), ("config.yaml",)])
def test_what_is_no_run_is_told_in_one_line(run, left, tmp_path):
    for name in left:
        shutil.copy(run / name, tmp_path / name)
    with pytest.raises((MeasureError, build.BuildError), match=r"holds no config.yaml|has no checkpoint yet") as error:
        measure(tmp_path)
    assert "\n" not in str(error.value)

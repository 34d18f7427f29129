"""NaN or infinity, wherever it arises: the run stops before the update, names step and clips, and leaves the step on disk.

The dump is a checkpoint of the moment before the update. Where the fault lies in what it holds, a run that starts from it
fails in the same way; where it does not (it was injected from outside), the run goes on as if nothing had happened, which
shows that the dump holds what the uninterrupted run held.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import fault_runs
import pytest
import torch
from fault_runs import write_videos
from safetensors.torch import load_file

from stgen import checkpoint, schema
from stgen import train as story
from stgen.finite import NotFinite
from stgen.train import train

STEP = 3


RUN = ("train.max_train_steps=5", "checkpoint.steps=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


def make(home: Path, folder: Path, *overrides: str) -> schema.Config:
    return fault_runs.make(home, folder, *RUN, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """A run that nothing happens to."""
    home = tmp_path_factory.mktemp("whole")
    train(make(home, folder))
    return home / "run"


@pytest.fixture
def run(monkeypatch):
    """The parts of the run that is on, and a place to hang what is done before and after the gradients of step 3."""
    held = SimpleNamespace(before=lambda held, batch: None, after=lambda held, loss: loss)

    def note(module, name, kept):
        honest = getattr(module, name)

        def noted(*args, **kwargs):
            setattr(held, kept, honest(*args, **kwargs))
            return getattr(held, kept)

        monkeypatch.setattr(module, name, noted)

    note(story, "EMA", "ema")
    note(story.optim, "build", "optimizer")
    honest = story.accumulate

    def accumulate(cfg, forward, parts, objective, batch, step):
        held.parts, held.weights = parts, {}
        if step == STEP:
            held.before(held, batch)
            held.weights = {n: p.detach().clone() for n, p in parts.transformer.named_parameters()}
        loss = honest(cfg, forward, parts, objective, batch, step)
        return held.after(held, loss) if step == STEP else loss

    monkeypatch.setattr(story, "accumulate", accumulate)
    return held


def first(named) -> torch.Tensor:
    """The first matrix of a mapping of tensors or parameters."""
    return next(tensor for name, tensor in named.items() if tensor.ndim == 2).data


def spoil(tensor: torch.Tensor, value: float = math.nan) -> None:
    tensor[tuple(extent // 2 for extent in tensor.shape)] = value


def moments(held, key: str) -> torch.Tensor:
    return next(state[key] for state in held.optimizer.state.values() if state[key].ndim == 2)


def gradient(value: float):
    def after(held, loss):
        spoil(next(p.grad for p in held.parts.transformer.parameters() if p.grad is not None), value)
        return loss

    return after


PLACES = {  # place: (before the gradients, after them, what the message names, whether it lies in what is saved)
    "a clip's latents": (lambda held, batch: spoil(batch.latents[1]), None, "batch/latents", False),
    "infinite latents": (lambda held, batch: spoil(batch.latents[1], math.inf), None, "batch/latents", False),
    "a weight": (
        lambda held, batch: spoil(first(dict(held.parts.transformer.named_parameters()))),
        None,
        "model/transformer.",
        True,
    ),
    "the loss": (None, lambda held, loss: math.nan, "loss nan", False),
    "one gradient": (None, gradient(math.nan), "gradient/transformer.", False),
    "an infinite gradient": (None, gradient(-math.inf), "gradient/transformer.", False),
    "the optimiser's average": (lambda held, batch: spoil(moments(held, "exp_avg")), None, "optimizer/transformer.", True),
    "the optimiser's squares": (
        lambda held, batch: spoil(moments(held, "exp_avg_sq"), math.inf),
        None,
        "optimizer/transformer.",
        True,
    ),
    "the averaged weights": (lambda held, batch: spoil(first(held.ema.state_tensors())), None, "ema/transformer.", True),
}  # fmt: skip


def assert_stopped(home: Path, whole: Path, error: NotFinite, named: str) -> Path:
    """What a stop leaves, whatever it was for; returns the dump."""
    run, told = home / "run", str(error)
    for part in ("step 3: ", named, "stopped before the update", ".mp4", "run.resume_from_checkpoint="):
        assert part in told, f"{part!r} is not in {told!r}"
    assert len(told.splitlines()) == 1
    report = json.loads((run / "not-finite-step-3.json").read_text())
    assert (
        report["step"] == STEP and len(report["files"]) == 4 and set(report["files"]) <= {f"{i}.mp4" for i in range(6)}
    )
    assert str(run / "not-finite-step-3") in report["repeat"]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]  # nothing spoiled is saved as one
    dumped = checkpoint.load(run / "not-finite-step-3")
    assert dumped.step == STEP and dumped.state["not_finite"]["files"] == report["files"]
    assert dumped.tensors["batch"].keys() == {"latents", "noise", "times"}
    last = [json.loads(line)["global_step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last == STEP
    return run / "not-finite-step-3"


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_stops_the_run_before_the_update(tmp_path, folder, whole, run, place, figure):
    before, after, named, saved = PLACES[place]
    run.before, run.after = before or run.before, after or run.after
    with pytest.raises(NotFinite) as stop:
        train(make(tmp_path, folder))
    dump = assert_stopped(tmp_path, whole, stop.value, named)
    for name, parameter in run.parts.transformer.named_parameters():  # the update did not happen
        assert torch.equal(parameter.isnan(), run.weights[name].isnan())
        assert torch.equal(parameter.nan_to_num(), run.weights[name].nan_to_num())

    # The same step again, from file and with nothing injected.
    run.before, run.after = (lambda held, batch: None), (lambda held, loss: loss)
    again = make(tmp_path, folder, f"run.resume_from_checkpoint={dump}", f"run.output_dir={tmp_path / 'again'}")
    if saved:
        with pytest.raises(NotFinite) as repeated:
            train(again)
        assert named in str(repeated.value) and "step 3: " in str(repeated.value)
    else:
        train(again)
        for group in ("model", "ema", "optimizer"):
            left, right = (load_file(r / "checkpoint-5" / f"{group}.safetensors") for r in (tmp_path / "again", whole))
            assert all(torch.equal(left[key], right[key]) for key in right) and left.keys() == right.keys()
    figure(
        f"not finite: stopped before the update, step and clips named, {'repeated' if saved else 'taken back'} from file"
    )


def test_a_codec_that_gives_nan_is_named_with_its_clips(tmp_path, folder, whole, run, monkeypatch):
    """The codec breaks after step 2, so that the latents of step 3 are spoiled; its statistics are in the dump."""
    honest = story.optim.clip_and_check

    def breaking(*args):
        breaking.calls += 1
        if breaking.calls == STEP:
            run.parts.codec.scale.data.fill_(math.nan)
        return honest(*args)

    breaking.calls = 0
    monkeypatch.setattr(story.optim, "clip_and_check", breaking)
    with pytest.raises(NotFinite) as stop:
        train(make(tmp_path, folder, "checkpoint.steps=1000"))
    (tmp_path / "run" / "checkpoint-3").mkdir()  # none was saved in this run
    dump = assert_stopped(tmp_path, whole, stop.value, "batch/latents")
    assert "codec/scale" in json.loads(Path(f"{dump}.json").read_text())["spoiled"]
    again = make(tmp_path, folder, f"run.resume_from_checkpoint={dump}", f"run.output_dir={tmp_path / 'again'}",
                 "checkpoint.steps=1000")  # fmt: skip
    with pytest.raises(NotFinite, match=r"step 3: .*batch/latents"):
        train(again)


def test_spoiled_averages_of_the_last_step_are_not_saved(tmp_path, folder, run, monkeypatch):
    """After the last update no step looks at the averages any more; the save does."""
    honest = story.Progress.advance

    def advance(progress, *args):
        honest(progress, *args)
        if progress.step == 5:
            spoil(first(run.ema.state_tensors()))

    monkeypatch.setattr(story.Progress, "advance", advance)
    with pytest.raises(NotFinite, match=r"step 5: NaN or infinity in ema/transformer\..*; not saved"):
        train(make(tmp_path, folder))
    assert checkpoint.resolve(tmp_path / "run", "latest").step == STEP


def test_a_dump_that_the_disk_refuses_leaves_the_report(tmp_path, folder, run, monkeypatch):
    def full(*_):
        raise checkpoint.CheckpointError("cannot write x: No space left on device")

    run.after = lambda held, loss: math.inf
    monkeypatch.setattr(checkpoint, "dump", full)
    with pytest.raises(
        NotFinite, match=r"step 3: loss inf.*its tensors could not be kept \(cannot write x: No space left"
    ):
        train(make(tmp_path, folder))
    assert json.loads((tmp_path / "run" / "not-finite-step-3.json").read_text())["loss"] == "inf"

"""A run that goes on from any of its steps, under the same config or another.

The run: 20 steps over three epochs, batches that reach over their borders, in two parts each, captions dropped, clips cut
at random places, averaged weights.
"""

import random
import shutil
from pathlib import Path

import fault_lives
import fault_runs
import pytest
from fault_lives import RUN, STEPS, traced

from stgen import schema
from stgen.checkpoint import CheckpointError
from stgen.train import TrainingError, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fault_lives.uninterrupted(tmp_path_factory.getbasetemp())


def config(home: Path, whole: fault_lives.Whole, *overrides: str) -> schema.Config:
    return fault_runs.make(home, whole.folder, *RUN, "run.resume_from_checkpoint=latest", *overrides)


def cut(home: Path, whole: fault_lives.Whole, step: int) -> Path:
    """What a run that ended after `step`, its checkpoint written, leaves: metrics of later steps too."""
    run = home / "run"
    shutil.copytree(whole.run / f"checkpoint-{step}", run / f"checkpoint-{step}")
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(whole.run / name, run)
    return run


def test_the_uninterrupted_run_is_what_it_should_be(whole):
    """Three epochs, batches over their borders, dropped captions, rates that move: else the rest would prove less."""
    draws = [draw for line in whole.steps.values() for draw in line["draws"]]
    files = [file for draw in draws for file in draw["files"]]
    assert len(draws) == 2 * STEPS and len(files) == 4 * STEPS
    epochs = [files[i : i + fault_lives.VIDEOS] for i in range(0, 3 * fault_lives.VIDEOS, fault_lives.VIDEOS)]
    assert all(len({*epoch}) == fault_lives.VIDEOS for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert 4 < sum(caption == "" for draw in draws for caption in draw["captions"]) < 60
    for key in ("noise", "times", "latents"):
        assert len({draw[key] for draw in draws}) == 2 * STEPS, key
    assert len({line["updates"][0]["lr"][0] for line in whole.steps.values()}) > 15
    assert len({line["updates"][0]["weights"] for line in whole.steps.values()}) == STEPS


SOME = {(1, 0), (7, 0), (13, 0), (19, 0)}  # split and workers; 7 and 13 lie beside the borders of epochs
SPLITS = [
    pytest.param(step, workers, marks=[] if (step, workers) in SOME else pytest.mark.slow)
    for step in range(1, STEPS)
    for workers in (0, 1, 2)
]


@pytest.mark.parametrize(("step", "workers"), SPLITS)
def test_a_run_goes_on_from_any_split_with_any_workers(tmp_path, whole, step, workers, figure):
    run = cut(tmp_path, whole, step)
    with traced(tmp_path / "trace.jsonl"):
        train(config(tmp_path, whole, f"data.dataloader_num_workers={workers}"))
    assert whole.assert_same_steps(tmp_path / "trace.jsonl", first=step + 1) == STEPS - step
    whole.assert_same_end(run)
    figure(f"split points of 20 steps from which a run goes on bit by bit, {workers} workers")


# ----------------------------------------------------------------------------------------------------- another config

FREE = (  # what may change without a word
    "checkpoint.steps=3", "checkpoint.total_limit=1", "validation.prompts=[a blue square]", "validation.steps=7",
    "validation.num_inference_steps=2", "validation.guidance_scale=2", "validation.seed=3", "log.project=other",
    "log.group=a", "log.name=b", "data.decode_timeout=99", "run.device=auto",
)  # fmt: skip
SHAPING = (  # what may not, each with another value
    "run.seed=7", "data.crop=center", "data.clip=start", "data.fps=4", "data.num_frames=4", "data.height=24", "data.width=24",
    "data.held_out_clips=2", "data.max_reject_fraction=0.4", "data.cache=memory", "data.shapes.clips=5",
    "data.shapes.held_out=3", "data.train_data_dir=/another", "codec.components=5",
    "codec.patch_size=[1,8,8]", "codec.fit_clips=9", "text.kind=bytes", "text.width=8", "text.max_length=9",
    "text.conditioning=cross", "text.caption_dropout=0.2", "tokens.positions=learned", "tokens.patch_size=[1,2,2]",
    "model.width=32", "model.depth=2", "model.heads=1", "model.plan=temporal", "model.mlp.ratio=2",
    "model.mlp.placement=parallel", "model.qk_norm=false", "model.registers=1", "model.modulation=none",
    "model.mixers.spatial={block: [1, 1, 1]}", "objective.path=diffusion", "objective.prediction_type=sample",
    "objective.timestep_density=uniform", "objective.frame_times=frame", "objective.logit_mean=1", "objective.logit_std=2",
    "objective.shift=2", "optim.learning_rate=1e-3", "optim.lr_scheduler=linear", "optim.lr_warmup_steps=3",
    "optim.lr_min_ratio=0.1", "optim.adam_beta1=0.8", "optim.adam_beta2=0.99", "optim.adam_epsilon=1e-6",
    "optim.adam_weight_decay=0.1", "optim.max_grad_norm=2", "ema.decay=0.9", "train.train_batch_size=8",
    "train.gradient_accumulation_steps=4", "train.mixed_precision=bf16", "train.gradient_checkpointing=true",
)  # fmt: skip
ARCHITECTURE = (
    "codec.components", "codec.patch_size", "text.kind", "text.width", "text.max_length", "text.conditioning",
    "tokens.positions", "tokens.patch_size", "model.width", "model.depth", "model.heads", "model.mlp.ratio",
    "model.mlp.placement", "model.qk_norm", "model.registers", "model.modulation",
)  # fmt: skip


def files_of(run: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}


def assert_refused(home: Path, whole: fault_lives.Whole, changes: tuple[str, ...]) -> None:
    """Each key in its own words, old value and new, no key beside them, and nothing in the run folder touched."""
    run = home / "run"
    before = files_of(run)
    with pytest.raises(TrainingError) as refusal:
        train(config(home, whole, *changes))
    said = str(refusal.value)
    assert len(said.splitlines()) == 1 and "run.allow_changed_config=true" in said
    listed = said.split("another config: ")[1].split(" (restore")[0].split("; ")
    assert all(" -> " in line for line in listed), said
    named = {key for line in listed for key in changed_keys(changes) if line.startswith(key)}
    assert named == {*changed_keys(changes)}, said
    stray = [line for line in listed if not line.startswith(tuple(changed_keys(changes)))]
    assert not stray, said
    assert files_of(run) == before


def changed_keys(changes: tuple[str, ...]) -> list[str]:
    keys = [change.split("=")[0] for change in changes]
    return [key.removesuffix(".kind") for key in keys]  # another kind has other keys


def test_each_key_that_shapes_a_run_is_named_and_refused(tmp_path, whole, figure):
    cut(tmp_path, whole, STEPS - 1)
    for change in SHAPING:
        assert_refused(tmp_path, whole, (change,))
    figure("keys changed on resume: listed with both values, refused, nothing touched", len(SHAPING))


def test_several_changed_keys_are_all_listed(tmp_path, whole):
    cut(tmp_path, whole, STEPS - 1)
    chance = random.Random(2)
    agreeing = [
        change for change in SHAPING if change.startswith(("run", "ema", "optim", "text.c", "data.c", "model.q"))
    ]
    for _ in range(8):
        assert_refused(tmp_path, whole, tuple(chance.sample(agreeing, 4)))


def test_keys_that_do_not_shape_a_run_change_nothing(tmp_path, whole):
    run = cut(tmp_path, whole, STEPS - 3)
    with traced(tmp_path / "trace.jsonl"):
        train(config(tmp_path, whole, *FREE))
    whole.assert_same_steps(tmp_path / "trace.jsonl", first=STEPS - 2)
    left, right = (fault_lives.tensors(folder / f"checkpoint-{STEPS}") for folder in (run, whole.run))
    assert left.keys() == right.keys() and all((left[key] == right[key]).all() for key in right)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=[] if change.startswith(("ema", "model.width")) else pytest.mark.slow)
        for change in SHAPING
        if not change.startswith("data.train_data_dir")
    ],
)
def test_a_changed_key_that_is_allowed_goes_on_or_names_what_does_not_fit(tmp_path, whole, change, figure):
    cut(tmp_path, whole, STEPS - 1)
    allowed = config(tmp_path, whole, "run.allow_changed_config=true", change)
    if change.split("=")[0] in ARCHITECTURE:
        with pytest.raises(
            CheckpointError, match=r"^(model|codec): this checkpoint holds another architecture: \S+ (is|has) "
        ):
            train(allowed)
    else:
        assert train(allowed)["steps"] >= STEPS - 1
    figure("keys changed on resume and allowed: trained on, or refused by the weights that do not fit")

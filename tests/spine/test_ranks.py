"""Runs of several processes (gloo, CPU): the curve of one process, saved and resumed on any number, ended together.

Starting ranks costs seconds, so the tests of a number of ranks share one start. gloo at times aborts a process that has
ended, so what was written is judged, not how the process ended.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stgen import buckets, checkpoint, config, parallel, preflight, ranks, schema, shards, validation
from stgen.build import build_codec, build_parts, load_pipeline
from stgen.dataset import DataError
from stgen.objective import Objective
from stgen.source import Batch
from stgen.train import train

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("ranks_worker.py")
TINY = [
    "data.num_frames=4", "data.height=16", "data.width=16", "data.shapes.clips=30", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,8,8]", "codec.components=6", "codec.fit_clips=8", "text.width=16", "text.caption_dropout=0.3",
    "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=8", "optim.lr_warmup_steps=2",
    "optim.learning_rate=0.003", "train.max_train_steps=10", "validation.steps=null", "validation.num_inference_steps=1",
    "validation.prompts=[a red circle,a blue square moving up,a green triangle]", "log.every=1", "log.wandb=disabled",
    "checkpoint.total_limit=99", "checkpoint.steps=5", "optim.max_grad_norm=0.5", "ema.decay=0.9",
]  # fmt: skip
# Clipped gradients, accumulation, averages of batches over ranks, and a norm that follows the loss of all ranks.
PLATEAU = "{kind: plateau, start: 1.0, end: 0.0, parts: 4, patience: 1}"
PREPBN = [
    "model.modulation=none",
    f"model.norm={{kind: prepbn, gamma: {PLATEAU}}}",
    "train.gradient_accumulation_steps=2",
]
BATCH = ["model.modulation=none", "model.norm={kind: batch}", "train.gradient_accumulation_steps=2"]
HALF = ["train.mixed_precision=bf16", "model.qk_norm=true"]
DDP, FSDP = ["distributed.kind=ddp"], ["distributed.kind=fsdp"]


def overrides(home: Path, name: str, *more: str) -> list[str]:
    return [*TINY, f"run.output_dir={home / name}", *more]


def alone(home: Path, name: str, *more: str) -> Path:
    """The run in this process."""
    (home / "empty.yaml").write_text("{}\n")
    train(config.load(home / "empty.yaml", overrides(home, name, *more), schema.Config))
    return home / name


def start(home: Path, count: int, jobs: list[dict]) -> tuple[subprocess.CompletedProcess, float]:
    """Run jobs on so many ranks; what was printed and how long it took."""
    (home / "empty.yaml").write_text("{}\n")
    (home / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STGEN_TEST_HOME": str(home)}
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(WORKER), str(home / "jobs.json")], env=environment, capture_output=True, text=True, timeout=280
    )
    return done, time.monotonic() - began


def job(home: Path, name: str, *more: str, **keys) -> dict:
    return {"name": name, "overrides": overrides(home, name, *more), **keys}


def told(home: Path, name: str, rank: int = 0) -> dict:
    return json.loads((home / f"{name}-{rank}.json").read_text())


def newest(run: Path) -> int | None:
    """The step of the newest whole checkpoint."""
    found = checkpoint.resolve(run, "latest")
    return found and found.step


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["global_step"]: row["train/loss"] for row in rows if "train/loss" in row}


def assert_same_curve(run: Path, reference: Path, steps=range(1, 11)) -> None:
    """Losses within 1e-5 of each other, relatively, at every step, and the same state in the last checkpoint."""
    found, expected = losses(run), losses(reference)
    assert sorted(found) == sorted(expected) == [*range(1, 11)]
    assert len({round(loss, 3) for loss in expected.values()}) > 5  # it does train
    for step in steps:
        assert found[step] == pytest.approx(expected[step], rel=1e-5), (run.name, step)
    left, right = (checkpoint.load(folder / "checkpoint-10") for folder in (run, reference))
    assert left.tensors.keys() == right.tensors.keys()
    for group in ("model", "ema", "optimizer", "codec"):
        assert left.tensors[group].keys() == right.tensors[group].keys()
        for name, tensor in left.tensors[group].items():
            # As vectors: AdamW moves a weight whose gradient is all rounding as far as any other.
            expected = right.tensors[group][name].double()
            apart = float((tensor.double() - expected).norm())
            assert apart <= 2e-3 * float(expected.norm()) + 1e-9, (run.name, group, name, apart, float(expected.norm()))


# ------------------------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(home) -> Path:
    return alone(home, "one")


@pytest.fixture(scope="module")
def one_prepbn(home) -> Path:
    return alone(home, "one-prepbn", *PREPBN)


@pytest.fixture(scope="module")
def one_batch(home) -> Path:
    return alone(home, "one-batch", *BATCH)


def test_shards_are_put_together_and_what_does_not_fit_is_refused():
    a, b, scalar = torch.arange(6.0).view(3, 2), torch.arange(4.0).view(2, 2), torch.tensor(3.0)
    files = {"ema-0-of-2": {"w": a, "step": scalar, "short": b}, "ema-1-of-2": {"w": b}, "codec": {"w": b}}
    joined = shards.joined(files)
    assert torch.equal(joined["ema"]["w"], torch.cat([a, b])) and torch.equal(joined["ema"]["short"], b)
    assert torch.equal(joined["ema"]["step"], scalar) and torch.equal(joined["codec"]["w"], b)
    for bad in (
        {"ema-0-of-2": {"w": a}},
        {"ema-1-of-2": {"w": a}},
        {"ema-0-of-1": {"w": a}, "ema-2-of-1": {"w": a}},
        {"ema": {"w": a}, "ema-0-of-2": {"w": a}, "ema-1-of-2": {"w": a}},
        {"ema-0-of-2": {"w": a}, "ema-1-of-2": {"w": torch.zeros(2, 3)}},
        {"ema-0-of-2": {"w": a}, "ema-1-of-2": {"w": b.double()}},
        {"ema-0-of-2": {"w": scalar}, "ema-1-of-2": {"w": scalar}},
    ):
        with pytest.raises(ValueError):
            shards.joined(bad)


def test_one_process_has_nothing_to_exchange():
    assert (ranks.size(), ranks.rank(), ranks.is_first()) == (1, 0, True)
    assert ranks.gather("x") == ["x"] and ranks.total(1.5, 2) == [1.5, 2] and ranks.agreed(None) is None
    assert [*ranks.share([1, 2, 3])] == [1, 2, 3] and ranks.joined([torch.ones(1)], 1) == [torch.ones(1)]


def test_a_part_of_a_batch_is_shared_equally(monkeypatch):
    class Sampler:
        start_step, indices = 0, (1, 2)

        def samples(self, step):
            return [step * 100 + i for i in range(12)]

    def of(rank: int, parts: int) -> list[int]:
        monkeypatch.setattr(ranks, "size", lambda: 3)
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        return ranks.shared(Sampler(), parts).samples(0)

    assert [of(rank, 1) for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [of(rank, 2) for rank in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    shared = ranks.shared(Sampler(), 2)
    shared.start_step = 5
    assert next(iter(shared))[0] == 504 and shared.indices == (1, 2)
    assert [[*ranks.share(range(4))] for _ in [monkeypatch.setattr(ranks, "rank", lambda: 2)]] == [[3, 3]]


def test_what_ranks_cannot_share_is_refused_with_its_key(home, monkeypatch):
    (home / "empty.yaml").write_text("{}\n")
    cfg = config.load(home / "empty.yaml", overrides(home, "x", "train.gradient_accumulation_steps=2"), schema.Config)
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(
        ranks.RankError, match=r"train_batch_size: 8 clips in 2 parts .* by 3 ranks; write a multiple of 6"
    ):
        parallel.check_batch(cfg)
    with pytest.raises(config.ConfigError, match="distributed: shards 2 are of kind fsdp"):
        config.load(home / "empty.yaml", overrides(home, "x", "distributed.shards=2"), schema.Config)


def test_an_error_of_a_lost_rank_says_what_is_known():
    def words(said: str) -> str:
        return ranks._lost(RuntimeError(said), 1800.0)

    gone = words("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1\nmore")
    assert "ended without a word: killed, perhaps for memory" in gone and "distributed.timeout" not in gone
    assert gone.endswith("(Connection closed by peer [127.0.0.1]:1)".replace("(", "([gloo/transport/tcp/pair.cc:538] "))
    slow = words("Timed out waiting 1800000ms for recv operation to complete")
    assert "raise distributed.timeout (now 1800 s)" in slow and "killed" not in slow


def test_held_out_clips_are_computed_in_parts_of_training(home, monkeypatch):
    """As many at once as a rank trains on, the loss being that of all."""
    (home / "empty.yaml").write_text("{}\n")

    def cfg(*more: str) -> schema.Config:
        return config.load(home / "empty.yaml", overrides(home, "x", *more), schema.Config)

    parts = build_parts(cfg(), ["a red circle"])
    batch = Batch(torch.randn(7, *parts.codec.latent_shape(4, 16, 16)), ["a red circle"] * 7, [])
    sizes, honest = [], validation.losses
    monkeypatch.setattr(validation, "losses", lambda *args: (sizes.append(len(args[-1])), honest(*args))[1])
    with torch.no_grad():
        whole = validation.held_out_loss(cfg(), parts, Objective(), batch)
        cut = validation.held_out_loss(cfg("train.gradient_accumulation_steps=4"), parts, Objective(), batch)
    assert sizes == [7, 2, 2, 2, 1] and cut == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(ranks, "size", lambda: 4)
    assert validation.at_once(cfg(), parts.codec, batch.latents.shape[1:]) == 2
    bucket = "data.buckets=[{num_frames: 4, height: 16, width: 16, batch_size: 12}]"
    assert validation.at_once(cfg(bucket), parts.codec, batch.latents.shape[1:]) == 3


def test_ranks_that_meet_in_a_pass_do_not_look_for_a_smaller_batch(home, monkeypatch):
    (home / "empty.yaml").write_text("{}\n")
    cfg = config.load(home / "empty.yaml", overrides(home, "x", *BATCH), schema.Config)
    (bucket,) = buckets.plan(cfg, build_codec(cfg))
    tried = []
    monkeypatch.setattr(preflight, "_peak", lambda _, bucket, clips, reserve: tried.append(clips))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 10**9))
    with pytest.raises(DataError, match=r"does not fit.* there; write a lower batch_size there, or raise"):
        preflight.check_cuda(cfg, bucket, lambda *_: None, 0, alone=False)
    assert tried == [8]
    parts = build_parts(cfg, ["a red circle"])
    assert not preflight._meeting(cfg, parts)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    assert preflight._meeting(cfg, parts)
    plain = config.load(home / "empty.yaml", overrides(home, "x"), schema.Config)
    assert not preflight._meeting(plain, build_parts(plain, ["a red circle"]))


def test_the_attempt_is_not_in_the_peak_of_training(monkeypatch):
    called = []
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert preflight._peak(lambda *_: called.append("attempt"), None, 1, 10) == 7  # type: ignore[arg-type]
    assert called == ["reset_peak_memory_stats", "attempt", "synchronize", "empty_cache", "reset_peak_memory_stats"]


def test_layers_travel_in_bfloat16_where_products_are():
    half = parallel.policy("bf16")
    assert (half.param_dtype, half.reduce_dtype, half.cast_forward_inputs) == (torch.bfloat16, torch.float32, False)
    assert parallel.policy("no").param_dtype is None


# ------------------------------------------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two(home) -> tuple[Path, subprocess.CompletedProcess, float]:
    """All runs on two ranks, those with faults after the others; in the last one a rank fails."""
    for rank in (0, 1):
        (home / f"from-{rank}").mkdir()
        alone(home / f"from-{rank}", "x", f"data.shapes.clips={30 + rank}", "train.max_train_steps=1")
        (home / f"from-{rank}" / "x" / "data").rename(home / f"from-{rank}" / "videos")
    done, seconds = start(home, 2, [
        job(home, "ddp2", *DDP),
        job(home, "fsdp2", *FSDP, "validation.steps=5"),
        job(home, "half2", *FSDP, *HALF),
        job(home, "prepbn2", *DDP, *PREPBN),
        job(home, "batch2", *FSDP, *BATCH),
        job(home, "nan2", *FSDP, "data.held_out_clips=0", fault="nan"),
        job(home, "full2", *FSDP, fault="full"),
        job(home, "nanfull2", *FSDP, "data.held_out_clips=0", fault="nan_full"),
        job(home, "stop2", *FSDP, fault="terminate"),
        job(home, "config2", of_rank={"1": ["train.train_batch_size=16"]}),
        job(home, "videos2", "data.train_data_dir=videos", fault="elsewhere"),
        job(home, "scalar2", *FSDP, *PREPBN),
        job(home, "fail2", *FSDP, fault="raise"),
    ])  # fmt: skip
    return home, done, seconds


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_two_ranks_have_the_curve_of_one_process(two, one, name):
    home, *_ = two
    assert told(home, name).get("error") is None, told(home, name)
    assert_same_curve(home / name, one)


def test_weights_sent_in_bfloat16_give_the_losses_of_one_process(two, home):
    assert told(home, "half2").get("error") is None, told(home, "half2")
    found, expected = losses(home / "half2"), losses(alone(home, "one-half", *HALF))
    assert found == pytest.approx(expected, rel=1e-3)
    state = checkpoint.load(home / "half2" / "checkpoint-10").tensors
    assert {t.dtype for group in ("model", "ema") for t in state[group].values() if t.is_floating_point()} == {
        torch.float32
    }


def test_batch_norm_and_schedules_see_the_batch_and_loss_of_all_ranks(two, one_prepbn, one_batch):
    home = two[0]
    assert_same_curve(home / "batch2", one_batch)
    assert_same_curve(home / "prepbn2", one_prepbn)
    state = checkpoint.load(home / "prepbn2" / "checkpoint-10").tensors["model"]
    gammas = [tensor for name, tensor in state.items() if name.endswith("reached")]
    assert gammas and all(float(t.view(torch.float64)[0, 0]) < 1 for t in gammas)  # the plateau was met


def test_a_run_in_shards_leaves_what_one_process_leaves(two, one):
    """The pipeline and the clips, from shards as from whole weights."""
    run = two[0] / "fsdp2"
    assert {f.name for f in (run / "samples" / "final").iterdir()} == {
        f.name for f in (one / "samples" / "final").iterdir()
    }
    assert (run / "samples" / "step-000005").is_dir() and (run / "contact_sheet.png").is_file()
    assert json.loads((run / "summary.json").read_text())["loss"]["held_out"] == pytest.approx(
        json.loads((one / "summary.json").read_text())["loss"]["held_out"], rel=1e-5
    )
    names = {f.name for f in (run / "checkpoint-10").iterdir()}
    assert {"model-0-of-2.safetensors", "optimizer-1-of-2.safetensors"} <= names and "model.safetensors" not in names
    manifest = json.loads((run / "checkpoint-10" / "manifest.json").read_text())
    assert names == {*manifest["files"], "manifest.json"}
    sizes = [(run / "checkpoint-10" / f"optimizer-{i}-of-2.safetensors").stat().st_size for i in (0, 1)]
    assert sizes[1] > 0.6 * sizes[0]
    for weights in ("ema", "raw"):
        found, expected = load_pipeline(run, weights), load_pipeline(one, weights)
        for a, b in zip(found.transformer.parameters(), expected.transformer.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert not list(run.glob(".checkpoint-*")) and not [f for f in run.rglob("*") if f.suffix in (".pt", ".distcp")]


def test_damage_to_any_shard_is_noticed(two, tmp_path):
    run = shutil.copytree(two[0] / "fsdp2", tmp_path / "hurt")
    victim = run / "checkpoint-10" / "ema-1-of-2.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert newest(run) == 5
    victim.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"ema-1-of-2\.safetensors: missing"):
        checkpoint.load(run / "checkpoint-10")


def test_only_the_first_rank_speaks(two):
    out = two[1].stderr + two[1].stdout
    assert out.count("run folder  " + str(two[0] / "fsdp2") + "\n") == 1
    assert "ranks       2, 4 of 8 clips each; weights, moments and averages in 2 shards (FSDP2)" in out
    assert "ranks       2, 4 of 8 clips each; whole weights on each (DDP)" in out


def test_nan_on_one_rank_stops_all_with_its_clips_and_a_dump(two):
    home, *_ = two
    for rank in (0, 1):
        error = told(home, "nan2", rank)["error"]
        assert error.startswith("NotFinite: step 3: loss nan") and "stopped before the update" in error
    report = json.loads((home / "nan2" / "not-finite-step-3.json").read_text())
    assert len(report["files"]) == 8  # those of both
    dump = checkpoint.load(home / "nan2" / "not-finite-step-3")
    assert all(t.isfinite().all() for t in dump.tensors["model"].values() if t.is_floating_point())
    assert not (home / "nan2" / "checkpoint-5").exists()


def test_a_full_disk_under_one_rank_is_told_on_all_and_hides_no_nan(two):
    home, *_ = two
    for rank in (0, 1):
        error = told(home, "full2", rank)["error"]
        assert error.startswith("CheckpointError: rank 1: cannot write") and "No space left on device" in error
        assert "checkpoint-5" in error and "bytes needed" in error and "earlier checkpoints are intact" in error
        error = told(home, "nanfull2", rank)["error"]
        assert error.startswith("NotFinite: step 3") and "its tensors could not be kept (rank 1: cannot write" in error
    assert newest(home / "full2") is None and not [*(home / "full2").glob(".checkpoint-*")]


def test_a_signal_to_one_rank_saves_on_all_and_one_process_goes_on(two, one):
    home, *_ = two
    assert [told(home, "stop2", rank) for rank in (0, 1)] == [{"steps": 5, "stopped": "SIGTERM"}] * 2
    assert_same_curve(alone(home, "stop2", "run.resume_from_checkpoint=latest"), one)


def test_ranks_that_disagree_are_told_before_anything_is_done(two):
    home, *_ = two
    for rank in (0, 1):
        error = told(home, "config2", rank)["error"]
        assert "rank 1 (" in error and "on config.train.train_batch_size: 8 -> 16; start all with the same" in error
        assert "the number of usable videos: 30 -> 31" in told(home, "videos2", rank)["error"]
        assert "distributed.kind: fsdp cannot cut transformer." in told(home, "scalar2", rank)["error"]
    assert not (home / "config2").exists()


def test_a_rank_that_fails_ends_all_within_seconds_and_says_why_first(two):
    home, done, _ = two
    assert done.returncode != 0 and not (home / "fail2-0.json").exists()
    said = done.stderr[done.stderr.index("rank 1 on ") :]
    assert "ends the run:" in said.splitlines()[0] and "rank one stumbled" in said and "rank 0 on" not in said
    assert "Connection closed" not in done.stderr and "lost touch" not in done.stderr


# -------------------------------------------------------------------------------------- killed, and other numbers


@pytest.fixture(scope="module")
def killed(home) -> tuple[Path, subprocess.CompletedProcess]:
    """A run in two shards of which one rank is killed at step 7."""
    done, _ = start(home, 2, [job(home, "killed", *FSDP, fault="kill")])
    return home / "killed", done


def test_a_killed_rank_ends_the_other_one_with_a_word(killed):
    run, done = killed
    assert "rank 0 on " in done.stderr and "lost touch with another rank, which ended without a word" in done.stderr
    assert newest(run) == 5 and sorted(losses(run)) == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_killed_on_two_ranks_goes_on_in_one_process(killed, one, home):
    shutil.copytree(killed[0], home / "killed-one")
    assert_same_curve(alone(home, "killed-one", "run.resume_from_checkpoint=latest"), one)


@pytest.fixture(scope="module")
def four(home, killed, one) -> Path:
    shutil.copytree(killed[0], home / "killed-four")
    shutil.copytree(one, home / "one-four")
    shutil.rmtree(home / "one-four" / "checkpoint-10")
    latest = "run.resume_from_checkpoint=latest"
    start(home, 4, [
        job(home, "ddp4", *DDP),
        job(home, "fsdp4", *FSDP),
        job(home, "hsdp4", *FSDP, "distributed.shards=2"),
        job(home, "batch4", *DDP, *BATCH),
        job(home, "killed-four", *FSDP, latest),
        job(home, "one-four", *FSDP, "distributed.shards=2", latest),
        job(home, "uneven4", *FSDP, "distributed.shards=3"),
    ])  # fmt: skip
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp4", "fsdp4", "hsdp4", "killed-four", "one-four"])
def test_four_ranks_have_the_curve_of_one_process(four, one, name):
    assert told(four, name).get("error") is None, told(four, name)
    assert_same_curve(four / name, one)


@pytest.mark.slow
def test_batch_norm_over_four_ranks(four, one_batch):
    assert_same_curve(four / "batch4", one_batch)


@pytest.mark.slow
def test_copies_in_shards_are_saved_once(four):
    names = {f.name for f in (four / "hsdp4" / "checkpoint-10").glob("model*")}
    assert names == {"model-0-of-2.safetensors", "model-1-of-2.safetensors"}
    assert "distributed.shards: 4 ranks are no multiple of 3 shards" in told(four, "uneven4")["error"]

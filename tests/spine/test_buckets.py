"""Clips of several sizes in one run: which goes where, in which order, at what batch; and that it trains and resumes."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stgen import buckets, codec, config, preflight, schema, shapes, source, video
from stgen.dataset import DataError, VideoFolder
from stgen.samplers import BucketSampler, Order, StepSampler
from stgen.sizes import Size, best
from stgen.train import train

SIZES = [Size(8, 16, 16), Size(4, 16, 32), Size(1, 32, 32)]
BUCKETS = "data.buckets=[" + ", ".join(
    f"{{num_frames: {t}, height: {h}, width: {w}, batch_size: {b}}}"
    for (t, h, w), b in zip(SIZES, (2, 3, 4), strict=True)
) + "]"  # fmt: skip
TINY = [
    "data.num_frames=8", "data.height=16", "data.width=16", "data.dataloader_num_workers=0", BUCKETS,
    "codec.kind=pixels", "tokens.patch_size=[1,8,8]", "text.width=16",
    "model.width=16", "model.depth=2", "model.heads=2", "optim.lr_warmup_steps=2",
    "validation.steps=null", "validation.num_inference_steps=1", "log.every=1", "log.wandb=disabled",
    "checkpoint.total_limit=99", "train.max_train_steps=8", "checkpoint.steps=2", "data.held_out_clips=6",
]  # fmt: skip


def write(folder: Path) -> Path:
    """Twenty square clips of eight frames, ten wide ones of five, ten images, a tall clip and one that is too short."""
    folder.mkdir(parents=True)
    for i in range(20):
        combo = shapes.ALL[i * 7 % len(shapes.ALL)]
        video.write(folder / f"square{i:02d}.mp4", video.Clip(shapes.render(combo, 8, 24, 24, i), 8.0))
        (folder / f"square{i:02d}.txt").write_text(combo.prompt)
    for i in range(10):
        video.write(folder / f"wide{i}.mp4", video.Clip(shapes.render(shapes.ALL[i], 5, 24, 48, i), 8.0))
        Image.new("RGB", (40, 40), (20 * i, 90, 200)).save(folder / f"image{i}.{('jpg', 'png', 'webp')[i % 3]}")
        (folder / f"image{i}.txt").write_text("a plain picture")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture
def tiny(tmp_path, clips):
    """A function that makes the config of a tiny run from overrides."""

    def make(*overrides: str, run: str = "run") -> schema.Config:
        path = tmp_path / "tiny.yaml"
        path.write_text("{}\n")
        base = [*TINY, f"run.output_dir={tmp_path / run}", f"data.train_data_dir={clips}"]
        return config.load(path, [*base, *overrides], schema.Config)

    return make


def open_clips(folder: Path, **options) -> VideoFolder:
    size = {"num_frames": 8, "height": 16, "width": 16}
    return VideoFolder(folder, **size, sizes=options.pop("sizes", SIZES), progress=False, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.stem}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


# --- which bucket


@pytest.mark.parametrize(
    ("frames", "height", "width", "expected"),
    [
        (99, 480, 480, "9x64x64"),  # the largest of its aspect that is not enlarged, and then the longest
        (8, 480, 480, "5x64x64"),  # too short for nine frames
        (99, 40, 40, "9x32x32"),  # 64 rows would be enlarged
        (99, 20, 20, "9x32x32"),  # all are enlarged: the one that is least
        (99, 270, 480, "9x36x64"),  # the aspect ratio before everything
        (99, 480, 270, "9x64x64"),  # tall, and the nearest there is
        (99, 31, 32, "9x32x32"),  # within 5 % of square
        (3, 64, 64, "1x32x32"),  # too short for all but one frame
        (1, 270, 480, "1x32x32"),  # an image, whatever its aspect
    ],
)
def test_a_video_goes_where_it_fits_best(frames, height, width, expected):
    sizes = [Size(1, 32, 32), Size(5, 64, 64), Size(9, 32, 32), Size(9, 64, 64), Size(9, 36, 64), Size(5, 32, 32)]
    found = best(video.Info(frames, 8.0, height, width), sizes, [size.num_frames <= frames for size in sizes])
    assert found is not None and str(sizes[found]) == expected


def test_nothing_fits_a_video_that_is_too_short_for_all():
    assert best(video.Info(2, 8.0, 64, 64), [Size(5, 64, 64)], [False]) is None


def test_a_folder_is_sorted_into_its_buckets_and_nothing_is_lost(clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    video.write(folder / "short.mp4", video.Clip(torch.zeros(3, 3, 24, 24, dtype=torch.uint8), 8.0))
    found = open_clips(folder)
    groups = [{re.split(r"[\d.]", found.name(i))[0] for i in group} for group in found.by_size(range(len(found)))]
    assert groups == [{"square"}, {"wide"}, {"image", "short"}]  # three frames are one at least
    for group, size in zip(found.by_size(range(len(found))), SIZES, strict=True):
        item = found[group[0], 0]
        assert item["frames"].shape == (3, size.num_frames, size.height, size.width)
    picture = next(i for i in range(len(found)) if found.name(i) == "image4.png")
    assert found[picture, 0]["frames"][:, 0, 3, 5].tolist() == [80, 90, 200] and found[picture, 0]["caption"]
    assert found.rate == 8.0 and not found.rejects
    without = open_clips(folder, sizes=SIZES[:2])
    reasons = dict(without.rejects)
    assert len(without) + len(reasons) == 41 and len(without) == 30
    assert "has 3 frames" in reasons["short.mp4"] and "a clip needs 4 (data.buckets" in reasons["short.mp4"]
    assert "is an image; add a bucket of num_frames: 1" in reasons["image0.jpg"]


def test_images_alone_need_one_frame(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    size = {"height": 16, "width": 16, "progress": False}
    with pytest.raises(DataError, match=r"1 images train as clips of one frame, data.num_frames: 1"):
        VideoFolder(tmp_path, num_frames=4, **size)
    assert len(VideoFolder(tmp_path, num_frames=1, **size)) == 1
    with pytest.raises(DataError, match=r"a.png: is an image; add a bucket of num_frames: 1"):
        VideoFolder(tmp_path, num_frames=4, **size, sizes=[Size(4, 16, 16)])


def test_a_damaged_image_is_a_reject_and_a_turned_one_is_upright(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    turned = Image.new("RGB", (48, 24))
    turned.paste((255, 0, 0), (0, 0, 24, 24))  # left, which the tag below turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    found = VideoFolder(tmp_path, num_frames=1, height=48, width=24, progress=False)
    assert [reject.path for reject in found.rejects] == ["broken.jpg"]
    frame = found[0, 0]["frames"][:, 0]  # [3, 48, 24]
    assert frame[0, :24].eq(255).all() and frame[0, 24:].eq(0).all()


def test_a_broken_clip_is_replaced_by_one_of_its_own_size(clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    found = open_clips(folder)
    wide = found.by_size(range(len(found)))[1]
    found.samples[wide[0]].path.write_bytes(b"broken since")
    for epoch in range(6):
        assert found[wide[0], epoch]["frames"].shape == (3, 4, 16, 32)


# --- the order


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 0.5, 1.0, 0.3], [0.2], [7.3, 0.01, 4.0]])
def test_items_come_as_often_as_their_weights_say(weights):
    order, counts, total = Order(weights, 3), Counter(), sum(weights)
    for position in range(400):
        assert order.before(position).tolist() == [counts[i] for i in range(len(weights))]
        item, before = order.at(position)
        assert before == counts[item]
        counts[item] += 1
        passes = (position + 1) / total
        assert all(abs(counts[i] - weight * passes) <= weight + 2 for i, weight in enumerate(weights))
    again = Order(weights, 3)
    assert [again.at(p) for p in (399, 5, 200)] == [order.at(p) for p in (399, 5, 200)]


def sampler(start: int = 0, seed: int = 0) -> BucketSampler:
    sizes = ((range(0, 40), 4), (range(40, 47), 3), (range(47, 60), 5))
    members = [StepSampler(ids, batch, seed, key=(i,)) for i, (ids, batch) in enumerate(sizes)]
    return BucketSampler(members, seed, start)


def test_buckets_take_turns_in_proportion_to_their_clips_and_read_all():
    order, visits, read = sampler(), Counter(), Counter()
    seen = 0
    for step in range(150):
        keys = order.samples(step)
        assert order.seen(step) == seen
        bucket = order.bucket(step)
        assert {order.bucket(step)} == {0 if i < 40 else 1 if i < 47 else 2 for i, _ in keys}  # one bucket a batch
        assert len(keys) == (4, 3, 5)[bucket]
        for i, epoch in keys:  # at an epoch's border a clip may come twice in a batch
            assert epoch == read[i]
            read[i] += 1
        visits[bucket] += 1
        seen += len(keys)
    passes = 150 / (40 / 4 + 7 / 3 + 13 / 5)
    for bucket, often in enumerate((40 / 4, 7 / 3, 13 / 5)):
        assert abs(visits[bucket] - often * passes) < often + 2
    assert len(read) == 60 and max(read.values()) - min(read.values()) <= 3
    assert order.steps_of(3) == 45 and order.clips_per_epoch == 60
    assert sum(order.shares) == pytest.approx(1)


def test_order_of_buckets_is_resumed_at_any_step():
    steps = iter(sampler())
    whole = [next(steps) for _ in range(60)]
    for start in (1, 17, 44):
        resumed = iter(sampler(start))
        assert [next(resumed) for _ in range(60 - start)] == whole[start:]
    assert [next(iter(sampler(seed=1)))] != whole[:1]


def test_each_bucket_gives_its_share_to_the_held_out_clips(clips):
    found = open_clips(clips)
    train_ids, held = found.split(8)
    assert sorted(train_ids + held) == list(range(40))
    assert [len(group) for group in found.by_size(held)] == [2, 1, 1]  # at most a tenth of each
    assert found.split(8) == (train_ids, held)


# --- codec, patches, batches


class Whole:
    """A codec that takes 4n + 1 frames and cells of eight pixels."""

    def latent_shape(self, frames, height, width):
        if (frames - 1) % 4:
            raise codec.CodecError(f"it cannot take num_frames {frames}")
        if height % 8 or width % 8:
            raise codec.CodecError(f"height {height} or width {width} is not divisible by 8")
        return 4, 1 + (frames - 1) // 4, height // 8, width // 8


def planned(tiny, text: str, *more: str) -> list[buckets.Bucket]:
    return buckets.plan(tiny(f"data.buckets={text}", "tokens.patch_size=[1,1,1]", *more), Whole())


def test_frames_that_the_codec_cannot_take_are_left_out_and_it_is_said(tiny):
    found = planned(
        tiny, "[{num_frames: 48, height: 16, width: 16, batch_size: 2}, {num_frames: 1, height: 16, width: 16}]",
        "data.num_frames=45", "train.train_batch_size=6",
    )  # fmt: skip
    assert [str(bucket) for bucket in found] == ["45x16x16", "1x16x16"]
    assert [bucket.batch_size for bucket in found] == [2, 6]
    assert [bucket.grid.tokens for bucket in found] == [12 * 4, 4]
    assert found[0].rule == "48 frames asked, the codec takes 4n+1: 45 read"
    joined = planned(
        tiny, "[{num_frames: 48, height: 16, width: 16}]", "tokens.patch_size=[5,1,1]", "data.num_frames=37"
    )
    assert str(joined[0]) == "37x16x16" and "tokens.patch_size joins 5 latent frames" in joined[0].rule


def test_the_rule_of_patches_is_that_of_multiples(tiny):
    cfg = tiny(
        "data.buckets=[{num_frames: 11, height: 16, width: 16}]", "data.num_frames=9", "tokens.patch_size=[1,1,1]"
    )
    assert (
        buckets.plan(cfg, codec.PatchPCA((3, 8, 8), 4))[0].rule
        == "11 frames asked, the codec takes multiples of 3: 9 read"
    )


def test_a_budget_of_tokens_gives_batches(tiny):
    text = "[{num_frames: 9, height: 16, width: 16}, {num_frames: 1, height: 32, width: 16, batch_size: 6}, "
    text += "{num_frames: 5, height: 32, width: 32}]"
    thirds = ("train.gradient_accumulation_steps=3", "train.train_batch_size=3")
    found = planned(tiny, text, "data.tokens_per_batch=100", "data.num_frames=9", *thirds)
    assert [(bucket.grid.tokens, bucket.batch_size) for bucket in found] == [(12, 6), (8, 6), (32, 3)]
    with pytest.raises(DataError, match=r"one clip of 5x32x32 has 32 tokens.*write 96 or more"):
        planned(tiny, text, "data.tokens_per_batch=90", "data.num_frames=9", *thirds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{num_frames: 5, height: 20, width: 16}]", r"data.buckets.0: 5x20x16: height 20 .* not divisible by 8"),
        ("[{num_frames: 9, height: 16, width: 16}]", r"8x16x16, the size of sampled clips, is none of the buckets"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tiny, text, message):
    with pytest.raises(DataError, match=message):
        planned(tiny, text)


def test_a_bucket_without_frames_enough_for_the_codec_is_refused(tiny):
    cfg = tiny("data.buckets=[{num_frames: 3, height: 16, width: 16}]")
    with pytest.raises(
        DataError, match=r"data.buckets.0: 3x16x16: num_frames 3 is not divisible .* leave the bucket out"
    ):
        buckets.plan(cfg, codec.PatchPCA((4, 8, 8), 4))


def test_a_batch_that_ranks_cannot_share_is_refused(tiny):
    with pytest.raises(
        DataError, match=r"data.buckets.1.batch_size: 3 clips .* 1 \(.*\) x 2 ranks; write a multiple of 2"
    ):
        buckets.plan(tiny(), codec.Pixels(), ranks=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokens.positions=learned", "learned positions hold for one size alone"),
        ("data.tokens_per_batch=-1", "data.tokens_per_batch"),
        ("train.gradient_accumulation_steps=2", r"data.buckets.1.batch_size: 3 clips cannot be cut into 2 equal parts"),
        (
            "data.buckets=[{num_frames: 1, height: 8, width: 8}, {num_frames: 1, height: 8, width: 8}]",
            "1x8x8 is there 2",
        ),
    ],
)
def test_configs_that_contradict_themselves_are_refused(tiny, override, message):
    with pytest.raises(config.ConfigError, match=message):
        tiny(override)


def test_a_bucket_with_fewer_clips_than_a_batch_is_refused(tiny, clips):
    cfg = tiny(BUCKETS.replace("batch_size: 3", "batch_size: 30"))
    folder = open_clips(clips)
    with pytest.raises(DataError, match=r"data.buckets.1: 4x16x32 has 10 clips to train on and a batch of 30; lower"):
        buckets.sampler(cfg, folder, range(40), buckets.plan(cfg, codec.Pixels()))


# --- memory


def test_the_largest_batch_is_known_and_a_smaller_one_is_proposed(tiny):
    cfg = tiny()
    found = buckets.plan(cfg, codec.Pixels())
    needed = preflight.activations(cfg, found, (5, 16))
    assert str(preflight.heaviest(found, needed)[0]) == "4x16x32"  # 3 x 32 tokens, against 2 x 32 and 4 x 16
    assert needed[1] > needed[0] > needed[2] / 2 > 0
    assert "for the largest batch (3 of 4x16x32)" in preflight.check_estimate(cfg, found, needed, 1000, 10**9)
    free = 12 * 1000 + needed[1] * 2 // 3 + 1
    with pytest.raises(DataError, match=r"3 clips of 4x16x32 \(32 tokens each\).*write batch_size: 2 there"):
        preflight.check_estimate(cfg, found, needed, 1000, free)
    with pytest.raises(DataError, match="no smaller batch does"):
        preflight.check_estimate(cfg, found, needed, 1000, 12 * 1000)


def test_a_bucket_that_the_model_cannot_take_is_named(tiny, monkeypatch):
    def refuse(transformer, shape, *_):
        if shape[1] == 1:
            raise ValueError("it needs two frames")
        return 1

    monkeypatch.setattr(preflight.flops, "activation_bytes", refuse)
    cfg = tiny()
    with pytest.raises(DataError, match=r"data.buckets: 1x32x32 does not pass through the model: it needs two frames"):
        preflight.activations(cfg, buckets.plan(cfg, codec.Pixels()), (5, 16))


@pytest.mark.parametrize(
    ("budget", "fitting", "proposal"),
    [
        (None, 3, r"8 clips of 1x32x32 \(16 tokens each\), does not fit, .* write batch_size: 2 there, or raise"),
        (160, 3, r"10 clips of 1x32x32 .* write data.tokens_per_batch: 32, or raise"),
        (None, 0, "no smaller batch does: raise"),
    ],
)
def test_a_batch_that_does_not_fit_on_a_gpu_is_refused_with_one_that_does(tiny, monkeypatch, budget, fitting, proposal):
    """There is no GPU here: its memory is that of `fitting` clips."""
    tried = []

    def peak(attempt, bucket, clips, reserve):
        tried.append((str(bucket), clips))
        return 10**9 if clips <= fitting else None

    monkeypatch.setattr(preflight, "_peak", peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2 * 10**9))
    image = f"{{num_frames: 1, height: 32, width: 32{'' if budget else ', batch_size: 8'}}}"
    sizes = f"data.buckets=[{{num_frames: 8, height: 16, width: 16, batch_size: 2}}, {image}]"
    cfg = tiny(sizes, f"data.tokens_per_batch={budget or 'null'}", "train.gradient_accumulation_steps=2")
    found = buckets.plan(cfg, codec.Pixels())
    with pytest.raises(DataError, match=proposal):
        preflight.check_cuda(cfg, found[1], lambda bucket, clips: None, 0)
    assert [clips for _, clips in tried] == [found[1].batch_size, 4, 2]
    if fitting:
        told = preflight.check_cuda(cfg, found[0], lambda bucket, clips: None, 0)
        assert "1 GB of 2 GB for the largest batch (2 of 8x16x16), tried before the first step" in told


def test_the_attempt_leaves_no_trace():
    norm = torch.nn.BatchNorm1d(3)
    parts = SimpleNamespace(trained={"transformer": norm})
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with preflight._untouched(parts):  # type: ignore[arg-type]
        norm(torch.randn(5, 3)).sum().backward()
        assert norm.weight.grad is not None and not torch.equal(norm.running_mean, before["running_mean"])
    assert norm.weight.grad is None
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


# --- a run


def test_a_run_over_buckets_trains_and_a_resumed_one_equals_it(tiny, tmp_path, capsys):
    train(tiny(run="whole"))
    words = capsys.readouterr().out
    assert "8x16x16: 18 clips of 32 tokens, 2 a step, 63% of steps" in words and "1x32x32" in words
    assert "for the largest batch (3 of 4x16x32)" in words
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for n in (6, 8):  # what a kill after step 4 leaves behind
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{n}")
    train(tiny("run.resume_from_checkpoint=latest", run="cut"))
    left, right = (tensors_of(tmp_path / run / "checkpoint-8") for run in ("whole", "cut"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    assert {key for key in last if key.startswith("val/")} == {
        "val/loss", "val/loss/8x16x16", "val/loss/4x16x32", "val/loss/1x32x32",
    }  # fmt: skip
    mean = 2 * last["val/loss/8x16x16"] + last["val/loss/4x16x32"] + last["val/loss/1x32x32"]
    assert last["val/loss"] == pytest.approx(mean / 4 if last["val/loss/1x32x32"] else 0)
    batches = [row["train/samples_seen"] for row in rows if "train/samples_seen" in row]
    assert {b - a for a, b in zip([0, *batches], batches, strict=False)} >= {2, 3} and len(batches) == 8
    assert any("checkpoint" in str(p) for p in (tmp_path / "cut").iterdir())


def test_clips_in_memory_are_those_that_are_decoded(tiny, tmp_path):
    train(tiny("data.cache=memory", "data.clip=start", "train.max_train_steps=3", run="memory"))
    train(tiny("data.clip=start", "train.max_train_steps=3", run="decoded"))
    left, right = (tensors_of(tmp_path / run / "checkpoint-3") for run in ("memory", "decoded"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_measured_after_a_run_has_the_size_of_sampled_clips(tiny, clips):
    train_ids, held = source.split_as_sampled(tiny(), found := open_clips(clips))
    assert len(train_ids) == 18 and len(held) == 2
    assert {found.samples[i].size for i in train_ids + held} == {0}
    with pytest.raises(DataError, match="clips of several sizes cannot be one batch"):
        source.Batch.read(found, [held[0], found.by_size(range(40))[1][0]], codec.Pixels(), torch.device("cpu"))


@pytest.fixture(scope="module")
def wan() -> codec.Autoencoder:
    """A small autoencoder of a real class, with random weights: it takes 4n + 1 frames."""
    torch.manual_seed(0)
    keys = {"base_dim": 4, "z_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    means = {"latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}
    return codec.Autoencoder(diffusers.AutoencoderKLWan(**keys, temperal_downsample=[False, True, True], **means))


def test_the_rule_of_a_real_autoencoder_is_found_by_trying(tiny, wan):
    sizes = "[{num_frames: 12, height: 32, width: 16}, {num_frames: 1, height: 16, width: 16}]"
    cfg = tiny(f"data.buckets={sizes}", "data.num_frames=9", "data.height=32", "tokens.patch_size=[1,1,1]")
    found = buckets.plan(cfg, wan)
    assert [(str(bucket), bucket.latent_shape) for bucket in found] == [
        ("9x32x16", (2, 3, 4, 2)),
        ("1x16x16", (2, 1, 2, 2)),
    ]
    assert found[0].rule == "12 frames asked, the codec takes 4n+1: 9 read"
    with pytest.raises(
        DataError, match=r"data.buckets.0: 5x20x16: height 20 is not divisible by the autoencoder's cell of 8"
    ):
        buckets.plan(tiny("data.buckets=[{num_frames: 5, height: 20, width: 16}]"), wan)

"""Latents and embeddings on disk: bit for bit what training would compute, whole or absent, and never stale unnoticed.

The codecs and encoders are of the real classes, small and with random weights: nothing can be fetched here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_codec import cogvideox, dc, kl, ltx, wan
from test_text import clip, t5, umt5, word_tokenizer
from torch.utils.data import get_worker_info
from transformers import ByT5Tokenizer

from stgen import build, config, dataset, latent_cache, schema, shapes, source, tensor_store, text, video
from stgen.codec import CodecError, as_codec, to_unit
from stgen.lab import data_cache
from stgen.tensor_store import CacheError
from stgen.train import train

ROOT = Path(__file__).parents[2]
TINY = [
    "data.num_frames=5", "data.height=32", "data.width=32", "data.dataloader_num_workers=0", "data.held_out_clips=2",
    "text.conditioning=cross", "text.caption_dropout=0.3", "model.width=16", "model.depth=2", "model.heads=2",
    "train.train_batch_size=4", "train.gradient_accumulation_steps=2", "train.max_train_steps=4", "optim.lr_warmup_steps=2",
    "validation.steps=2", "validation.num_inference_steps=1", "validation.guidance_scale=2", "log.every=1",
    "log.wandb=disabled",
]  # fmt: skip


WORDS = "text={kind: words, width: 16}"


def write_videos(folder: Path, count: int, frames: int = 9) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        combo = shapes.ALL[i * 7 % len(shapes.ALL)]
        video.write(folder / f"{i:02d}.mp4", video.Clip(shapes.render(combo, frames, 40, 36, i), 8.0))
        (folder / f"{i:02d}.txt").write_text(combo.prompt)
    return folder


def hunyuan():
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.5,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_videos(tmp_path_factory.mktemp("made") / "videos", 12)


@pytest.fixture
def tiny(tmp_path, videos):
    """A function that makes a config: a folder of 12 videos, a codec and a text encoder of real classes."""
    torch.manual_seed(0)

    def make(*overrides: str, codec=wan, encoder=t5, tokenizer=ByT5Tokenizer, run="run") -> schema.Config:
        if not (tmp_path / "videos").exists():
            shutil.copytree(videos, tmp_path / "videos")
        for name, made in ((codec.__name__, codec), (encoder.__name__, encoder)):
            if not (tmp_path / name).exists():
                made().save_pretrained(tmp_path / name)
        if not (tmp_path / encoder.__name__ / "tokenizer_config.json").exists():
            tokenizer().save_pretrained(tmp_path / encoder.__name__)
        (tmp_path / "tiny.yaml").write_text(
            f"data: {{train_data_dir: {tmp_path / 'videos'}}}\ncodec: {{kind: diffusers, path: {tmp_path / codec.__name__}}}\n"
            f"text: {{kind: transformers, path: {tmp_path / encoder.__name__}, max_length: 40}}\n"
        )
        return config.load(
            tmp_path / "tiny.yaml", [*TINY, f"run.output_dir={tmp_path / run}", *overrides], schema.Config
        )

    return make


def losses(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "train/grad_norm", "val/loss")
    return [tuple(row.get(key) for key in ("global_step", *keys)) for row in rows]


def cached(make, *overrides: str, **kinds) -> schema.Config:
    """The config after `stgen data cache`, set to train from the disk."""
    data_cache.cache(make(*overrides, **kinds))
    return make("data.cache=disk", *overrides, run="disk", **kinds)


def latents_of(cfg: schema.Config, codec=None):
    """The cache as training opens it, its folder and its codec."""
    folder = source.open_folder(cfg, cfg.output_dir)[0]
    component = codec or build.build_codec(cfg)
    return latent_cache.open_latents(cfg, folder, component), folder, as_codec(component)


def refused(cfg: schema.Config) -> str:
    """The one line in which training refuses the cache."""
    with pytest.raises(CacheError) as refusal:
        latents_of(cfg)
        folder, split = source.open_folder(cfg, cfg.output_dir)
        latent_cache.open_text(cfg, folder, split)
    message = str(refusal.value)
    assert "\n" not in message and f"run: stgen data cache {cfg.output_dir / 'config.yaml'}" in message
    return message


@pytest.fixture
def encoded(monkeypatch):
    """Names of the clips that were encoded since."""
    names, add = [], tensor_store.Writer.add

    def noted(self, tensor, entry):
        names.append(entry.get("video", entry.get("prompt")))
        add(self, tensor, entry)

    monkeypatch.setattr(tensor_store.Writer, "add", noted)
    return names


# ------------------------------------------------------------------------------------------------------- bit equality


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_training_from_disk_equals_training_on_the_way(tiny, tmp_path, precision, monkeypatch):
    """Losses, gradients and held-out losses over an epoch's border; the text encoder is loaded only to be saved."""
    extra = [f"train.mixed_precision={precision}", "data.clip=random", "data.cache_clips=2"]
    train(tiny(*extra))
    cfg, loaded, load = cached(tiny, *extra), [], text.load_pretrained

    def noted(*args):
        loaded.append((tmp_path / "disk" / "checkpoint-4").exists())
        return load(*args)

    monkeypatch.setattr(text, "load_pretrained", noted)
    train(cfg)
    found = losses(tmp_path / "disk")
    assert found == losses(tmp_path / "run") and len(found) > 4
    assert loaded == [True]
    a, b = (load_file(tmp_path / run / "checkpoint-4" / "model.safetensors") for run in ("run", "disk"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "disk" / "final" / "text_encoder" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "codec", [wan, ltx, kl, *(pytest.param(f, marks=pytest.mark.slow) for f in (hunyuan, cogvideox, dc))]
)
def test_kept_latents_are_those_of_each_family_bit_for_bit(tiny, codec):
    cfg = cached(tiny, "data.crop=random", "data.cache_clips=2", codec=codec)
    kept, folder, coder = latents_of(cfg)
    keys = [(3, 0), (0, 1), (7, 0)]
    frames = torch.stack([folder[key]["frames"] for key in keys])
    latents = coder.encode(to_unit(frames))  # as a batch
    assert all(torch.equal(kept[key][0], latents[i]) for i, key in enumerate(keys))
    assert [kept[key][1:] for key in keys] == [(folder.samples[i].caption, folder.name(i)) for i, _ in keys]
    assert torch.equal(kept[0, 3][0], kept[0, 1][0]) and not torch.equal(kept[0, 0][0], kept[0, 1][0])


@pytest.mark.parametrize(
    ("encoder", "tokenizer"), [(t5, ByT5Tokenizer), (umt5, word_tokenizer), (clip, word_tokenizer)]
)
def test_kept_embeddings_are_those_of_each_encoder_bit_for_bit(tiny, encoder, tokenizer):
    kinds = {"encoder": encoder, "tokenizer": tokenizer, "codec": kl}
    cfg = cached(
        tiny, "text.max_length=12", "validation.prompts=[a dog]", "validation.negative_prompt=blurred", **kinds
    )
    folder, split = source.open_folder(cfg, cfg.output_dir)
    opened = latent_cache.open_text(cfg, folder, split)
    assert opened is not None
    stand_in, words, width = opened
    real, tokenizer, real_width = text.load_pretrained(cfg.text.path)
    prompts = [folder.samples[0].caption, "", "a dog", "blurred"]
    (a, mask), (b, same) = text.encode(stand_in, words, prompts, 12), text.encode(real, tokenizer, prompts, 12)
    assert torch.equal(a, b) and torch.equal(mask, same) and width == real_width == a.shape[2]
    assert not mask.all() and mask.any(1).all() and not stand_in.state_dict()
    with pytest.raises(CacheError, match="'a cat' is not kept"):
        text.encode(stand_in, words, ["a cat"])


def test_a_codec_fitted_to_the_folder_is_kept_with_its_latents(tiny, tmp_path):
    pca = "codec={kind: pca, patch_size: [1, 8, 8], components: 5, fit_clips: 8}"
    extra = [pca, WORDS, "data.clip=start", "validation.steps=null"]
    train(tiny(*extra))
    train(cached(tiny, *extra))
    assert losses(tmp_path / "disk") == losses(tmp_path / "run")


def test_clips_of_several_sizes_and_spans_of_a_video_are_kept(tiny, tmp_path):
    """Three clips of one video, read as two sizes: batches are those of training on the way."""
    (tmp_path / "videos").mkdir()
    for i in range(4):
        frames = shapes.render(shapes.ALL[i], 12, 40, 36 + 30 * (i % 2), i)
        video.write(tmp_path / "videos" / f"{i}.mp4", video.Clip(frames, 8.0))
    rows = [{"file_name": f"{i}.mp4", "text": f"{i} {start}", "start": f"{start}f", "end": f"{start + 6}f"}
            for i in range(4) for start in (0, 3, 6)]  # fmt: skip
    (tmp_path / "videos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = (
        "data.buckets=[{num_frames: 5, height: 32, width: 32}, {num_frames: 5, height: 16, width: 32, batch_size: 2}]"
    )
    extra = [WORDS, sizes, "data.clip=start", "validation.steps=null"]
    train(tiny(*extra, codec=kl))
    train(cached(tiny, *extra, codec=kl))
    assert losses(tmp_path / "disk") == losses(tmp_path / "run") and len(losses(tmp_path / "run")) > 4
    assert sum(len(shard.entries) for shard in tensor_store.shards(tmp_path / "videos-cache", "clips")) == 12


def test_a_resumed_run_reads_a_cache_that_was_moved(tiny, tmp_path):
    extra = [WORDS, "checkpoint.steps=2", "validation.steps=null"]
    cfg = cached(tiny, *extra, codec=kl)
    train(cfg)
    whole = load_file(tmp_path / "disk" / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(tmp_path / "disk" / "checkpoint-4")
    (tmp_path / "videos-cache").rename(tmp_path / "elsewhere")
    where = f"data.cache_dir={tmp_path / 'elsewhere'}"
    train(tiny("data.cache=disk", where, "run.resume_from_checkpoint=latest", *extra, codec=kl, run="disk"))
    again = load_file(tmp_path / "disk" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_a_half_precise_codec_computed_is_kept_in_half_the_room(tiny, tmp_path):
    cfg = cached(tiny, "codec.dtype=bfloat16", codec=kl)
    kept, folder, coder = latents_of(cfg)
    assert torch.equal(kept[2, 0][0], coder.encode(to_unit(folder[2, 0]["frames"][None]))[0])
    (shard,) = (tmp_path / "videos-cache").glob("clips-*.safetensors")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}


def test_a_video_that_cannot_be_read_is_replaced_as_without_a_cache(tiny, monkeypatch):
    read = video.read

    def failing(path, *args):
        if path.name == "04.mp4":
            raise video.VideoError(path, "is damaged at frame 3")
        return read(path, *args)

    monkeypatch.setattr(video, "read", failing)
    cfg = cached(tiny, "data.clip=start", codec=kl)
    kept, folder, coder = latents_of(cfg)
    ids = [1, 4, 5, 9]
    item = folder.within(ids)[4, 7]
    latents, caption, name = kept.within(ids)[4, 7]
    assert name == item["path"] != "04.mp4" and caption == item["caption"]
    assert torch.equal(latents, coder.encode(to_unit(item["frames"][None]))[0])
    assert kept.rejects == [("04.mp4", "is damaged at frame 3")]


def test_a_video_that_could_not_be_read_is_tried_again(tiny, monkeypatch, encoded):
    """Not so a fault of the machine or of ours, which must not be held against the video."""
    read, faults = video.read, {"04.mp4": video.VideoError("04.mp4", "Input/output error (OSError)")}

    def failing(path, *args):
        if path.name in faults:
            raise faults[path.name]
        return read(path, *args)

    digest = latent_cache._digest

    def unreadable(path, *stamp):
        if path.name in faults:
            raise OSError(5, "Input/output error")
        return digest(path, *stamp)

    monkeypatch.setattr(video, "read", failing)
    cfg = cached(tiny, WORDS, codec=kl)
    assert latents_of(cfg)[0].rejects == [("04.mp4", "Input/output error (OSError)")]
    faults.clear()
    del encoded[:]
    data_cache.cache(cfg)
    kept, folder, coder = latents_of(cfg)
    assert encoded == ["04.mp4"] and not kept.rejects
    assert torch.equal(kept[4, 0][0], coder.encode(to_unit(folder[4, 0]["frames"][None]))[0])
    del encoded[:]
    faults["05.mp4"] = MemoryError()
    with pytest.raises(MemoryError):
        data_cache.cache(tiny(WORDS, "data.height=16", codec=kl))
    monkeypatch.setattr(latent_cache, "_digest", unreadable)
    cfg = cached(tiny, WORDS, "data.height=16", codec=kl)
    assert latents_of(cfg)[0].rejects == [("05.mp4", "cannot be read: Input/output error")]


def test_a_video_that_vanishes_meanwhile_is_a_reject(tiny, tmp_path):
    folder = source.open_folder(tiny(WORDS, codec=kl), tmp_path)[0]
    (tmp_path / "videos" / "03.mp4").unlink()
    frames, entry = data_cache._Clips(folder, [(3, 0)])[0]
    assert frames is None and entry["rejected"] == "cannot be read: No such file or directory"
    assert latent_cache._File(folder.samples[3].path).is_that_of(entry)


def test_names_that_are_no_utf8_are_kept(tiny, tmp_path):
    cfg = tiny(WORDS, codec=kl)
    odd = os.fsdecode(os.fsencode(tmp_path / "videos") + b"/odd\xff.mp4")
    (tmp_path / "videos" / "03.mp4").rename(odd)
    data_cache.cache(cfg)
    kept, folder, _ = latents_of(tiny("data.cache=disk", WORDS, codec=kl))
    index = [folder.name(i) for i in range(12)].index("odd\udcff.mp4")
    assert kept[index, 0][2] == "odd\udcff.mp4"
    frames = tmp_path / os.fsdecode(b"frames\xff")
    video.write(frames, video.Clip(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 8.0))
    first = next(frames.iterdir())
    first.rename(os.fsdecode(os.fsencode(frames) + b"/\xff_0.png"))
    assert len(latent_cache.digest(frames)) == 64


def test_a_file_of_many_clips_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    hashed, sha256 = [], latent_cache.hashlib.sha256
    monkeypatch.setattr(latent_cache.hashlib, "sha256", lambda *content: hashed.append(content) or sha256(*content))
    first = latent_cache.digest(tmp_path / "a.mp4")
    assert latent_cache.digest(tmp_path / "a.mp4") == first and len(hashed) == 1
    (tmp_path / "a.mp4").write_bytes(b"yy")
    assert latent_cache.digest(tmp_path / "a.mp4") != first


def test_of_two_machines_that_fit_a_codec_the_first_decides(tiny, tmp_path, monkeypatch):
    cfg = tiny(WORDS, "codec={kind: pca, patch_size: [1, 8, 8], components: 5, fit_clips: 8}")
    folder, other = source.open_folder(cfg, cfg.output_dir)[0], build.build_codec(cfg)
    other.mean.data.fill_(7)
    tensor_store.prepare(tmp_path / "videos-cache")
    fit = source.fit_or_load_codec

    def beaten(*args):
        fit(*args)
        latent_cache.save_codec(cfg, other)

    monkeypatch.setattr(source, "fit_or_load_codec", beaten)
    component = data_cache._codec(cfg, folder, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(component.parameters(), other.parameters(), strict=True))
    assert not list((tmp_path / "videos-cache").glob(".*"))


def test_workers_that_hang_are_told_with_the_file(tiny, tmp_path):
    cfg = tiny(WORDS, "data.dataloader_num_workers=1", "data.decode_timeout=4", codec=kl)
    folder = source.open_folder(cfg, cfg.output_dir)[0]
    folder.samples[3] = Slow(**vars(folder.samples[3]))
    share = data_cache.Share(cfg, folder, [(2, 0), (3, 0)], "cpu", 1, 1)
    clips = iter(data_cache._decoded(share))
    assert next(clips)[1]["video"] == "02.mp4"
    with pytest.raises(
        dataset.DataError, match=r"timed out after 4 seconds \(data.decode_timeout\).*being read then: 03.mp4"
    ):
        next(clips)


class Slow(dataset.Sample):
    """A sample whose file is on a disk that never answers."""

    def __getattribute__(self, name):
        if name == "path" and get_worker_info() is not None:
            time.sleep(3600)
        return super().__getattribute__(name)


@pytest.mark.parametrize("pattern", ["*/a.tar", "?/a.tar", "[xy]/a.tar", "{1..1}/a.tar"])
def test_the_cache_of_a_pattern_lies_beside_the_folder_of_its_tars(tiny, tmp_path, pattern):
    for name in "xy1":
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.tar").touch()
    cfg = tiny("data.source=webdataset", f"data.train_data_dir={tmp_path}/set/{pattern}", codec=kl)
    expected = "set/1-cache" if pattern[0] == "{" else "set-cache"
    assert latent_cache.folder_of(cfg) == tmp_path / expected
    one = tiny("data.source=webdataset", f"data.train_data_dir={tmp_path}/set/x/a.tar", codec=kl)
    assert latent_cache.folder_of(one) == tmp_path / "set" / "x" / "a.tar-cache"


def test_drafts_of_other_machines_do_not_make_a_folder_foreign(tmp_path):
    for name in (".12ab34cd-stgen-cache.json", ".DS_Store", ".nfs0001"):
        (tmp_path / name).touch()
    tensor_store.prepare(tmp_path)
    assert (tmp_path / tensor_store.MARKER).is_file()


# ---------------------------------------------------------------------------------------------------------- staleness


def test_a_second_run_encodes_nothing_and_a_touched_file_is_still_good(tiny, tmp_path, encoded):
    cfg = cached(tiny, codec=kl)
    os.utime(tmp_path / "videos" / "03.mp4", (1, 1))
    assert len(encoded) == 12 + 12 + 1  # clips, captions, the empty prompt
    latents_of(cfg)
    data_cache.cache(cfg)
    assert len(encoded) == 25


def test_changed_added_and_removed_files_are_noticed_and_only_they_encoded(tiny, tmp_path, encoded):
    cfg, videos = cached(tiny, WORDS, codec=kl), tmp_path / "videos"
    del encoded[:]
    content = bytearray((videos / "03.mp4").read_bytes())
    content[-1] ^= 1
    (videos / "03.mp4").write_bytes(content)  # of the same size
    shutil.copy(videos / "05.mp4", videos / "05b.mp4")
    (videos / "07.mp4").unlink()
    message = refused(cfg)
    assert "lacks 2 of 12 clips: 1 changed on disk since (03.mp4); 1 not cached yet (05b.mp4)" in message
    data_cache.cache(cfg)
    assert sorted(encoded) == ["03.mp4", "05b.mp4"]
    latents_of(cfg)


def test_another_caption_is_noticed_and_only_it_encoded(tiny, tmp_path, encoded):
    cfg = cached(tiny, codec=kl)
    del encoded[:]
    (tmp_path / "videos" / "03.txt").write_text("something else")
    assert "lacks 1 of 13 prompts: 1 not cached yet ('something else')" in refused(cfg)
    data_cache.cache(cfg)
    assert encoded == ["something else"]
    latents_of(cfg)


CHANGES = {  # what is changed: what training says
    "data.height=16": "12 kept at another size (5x32x32, not 5x16x32) (00.mp4, 01.mp4, …)",
    "data.clip=start": "12 made with data.clip random, not start",
    "data.fps=4": "12 made with data.fps None, not 4.0",
    "codec.dtype=bfloat16": "codec.dtype float32, not bfloat16",
    "data.cache_clips=3": "12 kept with fewer clips (1, not 3)",
    "text.max_length=9": "13 of 13 prompts: 13 made with text.max_length 40, not 9",
    "train.mixed_precision=bf16": "made with train.mixed_precision no, not bf16",
}


SHORT = ("data.height=16", "data.cache_clips=3", "text.max_length=9")


@pytest.mark.parametrize(
    "change", [change if change in SHORT else pytest.param(change, marks=pytest.mark.slow) for change in CHANGES]
)
def test_a_cache_of_other_settings_is_refused_and_completed(tiny, change, encoded):
    cached(tiny, codec=kl)
    number = len(encoded)
    cfg = tiny("data.cache=disk", change, codec=kl)
    assert CHANGES[change] in refused(cfg)
    data_cache.cache(cfg)
    assert number < len(encoded) <= 3 * number
    latents_of(cfg)
    latents_of(tiny("data.cache=disk", codec=kl))  # what was there before stays


def test_a_cache_of_another_codec_and_of_another_encoder_are_refused(tiny, tmp_path):
    cfg = cached(tiny, codec=kl)
    torch.manual_seed(1)
    kl().save_pretrained(tmp_path / "kl")
    message = refused(cfg)
    assert "12 made with codec.weights " in message and "codec.config" not in message
    data_cache.cache(cfg)
    t5().save_pretrained(tmp_path / "t5")
    assert "13 made with text encoder " in refused(cfg)
    assert "12 made with codec AutoencoderKL, not AutoencoderDC" in refused(tiny("data.cache=disk", codec=dc))


def test_what_no_config_uses_is_pruned_when_asked(tiny, tmp_path):
    cfg = cached(tiny, WORDS, codec=kl)
    before = set((tmp_path / "videos-cache").iterdir())
    smaller = tiny("data.height=16", WORDS, codec=kl)
    data_cache.cache(smaller)
    assert before < set((tmp_path / "videos-cache").iterdir())
    data_cache.cache(smaller, prune=True)
    assert len(before & set((tmp_path / "videos-cache").iterdir())) == 1  # the marker
    assert "kept at another size (5x16x32, not 5x32x32)" in refused(cfg)


# ------------------------------------------------------------------------------------------- interrupted and damaged


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 4, 5))])
def test_a_writer_killed_anywhere_leaves_whole_shards_alone(tiny, tmp_path, monkeypatch, encoded, at):
    """Killed before the nth rename of a file: of each shard its tensors are renamed first, then its JSON file."""
    cfg, replace, done = tiny(WORDS, codec=kl), os.replace, []
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 50_000)  # some two or three clips
    tensor_store.prepare(tmp_path / "videos-cache")

    def killed(*args):
        if len(done) == at:
            raise Killed
        done.append(args)
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            data_cache.cache(cfg)
    folder = source.open_folder(cfg, cfg.output_dir)[0]
    found = latent_cache.Latents(cfg, folder, latent_cache.clip_recipe(cfg, build.build_codec(cfg)))
    kept = len(found.wanted) - len(found.missing)
    assert (kept > 0) is (at >= 2) and kept < 12
    assert "lacks" in refused(tiny("data.cache=disk", WORDS, codec=kl))
    del encoded[:]
    data_cache.cache(cfg)
    assert len(encoded) == 12 - kept
    latents, folder, coder = latents_of(tiny("data.cache=disk", WORDS, codec=kl))
    assert torch.equal(latents[11, 0][0], coder.encode(to_unit(folder[11, 0]["frames"][None]))[0])


def test_what_killed_writers_left_is_swept_after_an_hour(tiny, tmp_path):
    cfg, cache = cached(tiny, WORDS, codec=kl), tmp_path / "videos-cache"
    left = [cache / ".12ab-clips-00.safetensors", cache / "clips-00ff.safetensors", cache / ".34-clips-00.json"]
    whole = set(cache.iterdir())
    for path in left:
        path.write_bytes(b"half")
    data_cache.cache(cfg)
    assert set(cache.iterdir()) == whole | set(left)  # a living writer's, perhaps
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    data_cache.cache(cfg)
    assert set(cache.iterdir()) == whole


def test_shards_that_are_cut_short_or_absent_are_encoded_again(tiny, tmp_path, encoded):
    cfg = cached(tiny, WORDS, codec=kl)
    (shard,) = (tmp_path / "videos-cache").glob("clips-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "12 of 12 clips: 12 not cached yet" in refused(cfg)
    data_cache.cache(cfg)
    assert len(encoded) == 24
    latents_of(cfg)


def test_a_damaged_shard_is_named(tiny, tmp_path):
    cfg = cached(tiny, WORDS, codec=kl)
    (shard,) = (tmp_path / "videos-cache").glob("clips-*.safetensors")
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(CacheError, match=rf"{shard}: damaged .*run stgen data cache again$"):
        latents_of(cfg)[0][0, 0]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_folders_that_are_no_cache(tiny, tmp_path):
    cfg = tiny("data.cache=disk", WORDS, codec=kl)
    assert f"there is no cache at {tmp_path / 'videos-cache'}" in refused(cfg)
    other = tiny("data.cache=disk", f"data.cache_dir={tmp_path / 'videos'}", WORDS, codec=kl)
    assert "videos is no cache: it holds no stgen-cache.json" in refused(other)
    before = sorted((tmp_path / "videos").iterdir())
    with pytest.raises(
        CacheError, match=r"videos is no cache: it holds files but no stgen-cache.json; name a new folder$"
    ):
        data_cache.cache(other)
    assert sorted((tmp_path / "videos").iterdir()) == before
    data_cache.cache(cfg)
    (tmp_path / "videos-cache" / "stgen-cache.json").write_text('{"format": 99}')
    assert "written by another version of stgen" in refused(cfg)
    (tmp_path / "videos-cache" / "stgen-cache.json").write_text("{")
    assert "stgen-cache.json cannot be read" in refused(cfg)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "[" * 10_000, '{"format": 1, "kind": "clips", "x": 1}'])
def test_an_index_from_elsewhere_is_named(tiny, tmp_path, content):
    cfg = cached(tiny, WORDS, codec=kl)
    (index,) = (tmp_path / "videos-cache").glob("clips-*.json")
    index.write_text(content)
    assert f"{index}: cannot be read as the index of a shard; remove it and its .safetensors file" in refused(cfg)


def test_no_room_is_told_before_and_while_encoding(tiny, tmp_path, monkeypatch):
    cfg = tiny(WORDS, codec=kl)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
        with pytest.raises(CacheError, match=r"videos-cache needs about 246 kB more, 1 kB are free; make room, or"):
            data_cache.cache(cfg)
    with monkeypatch.context() as patch:

        def full(*args):
            raise SafetensorError("No space left on device (os error 28)")

        patch.setattr(tensor_store, "save_file", full)
        with pytest.raises(
            CacheError, match=r"No space left .* bytes needed, \d+ bytes free\); what was cached before stays"
        ):
            data_cache.cache(cfg)
    assert [path.name for path in (tmp_path / "videos-cache").iterdir()] == ["stgen-cache.json"]
    data_cache.cache(cfg)


def test_hub_ids_that_cannot_be_fetched_end_in_one_sentence(tiny):
    for key, error in (("codec.path=someone/something", CodecError), ("text.path=someone/something", text.TextError)):
        with pytest.raises(error) as refusal:
            data_cache.cache(tiny(key, codec=kl))
        assert "someone/something" in str(refusal.value) and "\n" not in str(refusal.value)


# --------------------------------------------------------------------------------------------------- several processes


def stgen(*words: str, code: str = "") -> subprocess.Popen:
    script = f"from stgen import cli, tensor_store\n{code}\nif __name__ == '__main__': cli.main()"
    path = Path(words[2]).with_name("run_stgen.py")
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(path), *words], env=environment, cwd=ROOT, **pipes)


@pytest.fixture
def written(tiny, tmp_path):
    """A config file of a folder with more videos, and the arguments that cache it."""
    write_videos(tmp_path / "videos", 60)
    cfg = tiny(WORDS, codec=wan)
    (tmp_path / "all.yaml").write_text(config.dump(cfg))
    return cfg, ["data", "cache", str(tmp_path / "all.yaml")]


@pytest.mark.slow
def test_several_processes_and_kills_of_them_all_leave_the_same_cache(written, tiny, tmp_path):
    """Two processes are killed twice at odd moments, a third run ends the work; what is kept equals what one would keep."""
    _, words = written
    small = "tensor_store.SHARD_BYTES = 1_500"

    def whole() -> int:
        return len(list((tmp_path / "videos-cache").glob("clips-*.json")))

    for _ in range(2):
        process = stgen(*words, "--jobs", "2", code=small)
        more = whole() + 3
        wait_for(lambda more=more: whole() >= more, process)
        process.kill()
        process.wait()
        time.sleep(2)  # its processes notice
    assert stgen(*words, "--jobs", "2", code=small).wait(300) == 0
    kept, folder, coder = latents_of(tiny("data.cache=disk", WORDS, codec=wan))
    for index in range(0, 60, 7):
        assert torch.equal(kept[index, 0][0], coder.encode(to_unit(folder[index, 0]["frames"][None]))[0])


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_ends_it_with_nothing_lost(written, tiny, tmp_path, jobs):
    _, words = written
    process = stgen(*words, "--jobs", jobs, code="tensor_store.SHARD_BYTES = 1_500")
    wait_for(lambda: any((tmp_path / "videos-cache").glob("clips-*.json")), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM; what is encoded is kept" in output and "Traceback" not in output
    assert 0 < sum(len(shard.entries) for shard in tensor_store.shards(tmp_path / "videos-cache", "clips")) < 60


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)

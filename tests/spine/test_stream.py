"""Clips made chunk by chunk: the pipeline's face, and sample.py beyond the training length."""

import json
from types import GeneratorType

import pytest
import torch
from torch import nn

from stgen import cli, video
from stgen.codec import PatchPCA
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import PipelineError, VideoPipeline, build_scheduler
from stgen.text import LearnedTextEncoder, vocabulary_of

CAPTIONS = ["a red circle", "a blue square moving left"]
SIZE = dict(num_frames=8, height=8, width=8)  # 4 latent frames
RING = {"layout": "temporal", "pattern": {"kind": "causal"}, "memory": {"kind": "ring", "window": 3}}
INFINI = {"layout": "temporal", "memory": {"kind": "infini", "segment": 2, "delta": True}}


def make(mixer=RING, positions="rope", plan="spatial t", **objective) -> VideoPipeline:
    """A tiny pipeline whose weights are all away from zero, so that every input matters."""
    torch.manual_seed(0)
    codec = PatchPCA((2, 4, 4), 6).fit(torch.rand(4, 3, 8, 8, 8) * 2 - 1)
    transformer = VideoTransformer(
        6, (4, 2, 2), width=16, depth=2, heads=2, plan=plan, mixers={"t": mixer}, text_width=8, positions=positions
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    objective = {"frame_times": "past", **objective}
    sampling = {**SIZE, "fps": 8.0, "num_inference_steps": 2, "guidance_scale": 2.0, "max_length": 8}
    encoder = LearnedTextEncoder(vocabulary_of(CAPTIONS), width=8)
    scheduler = build_scheduler(None, Objective(**objective))
    pipeline = VideoPipeline(transformer, codec, encoder, scheduler, objective=objective, sampling=sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def streamed(pipeline, prompts=CAPTIONS, seeds=(1, 2), **options):
    options = {"num_frames": 24, "chunk_frames": 4, "output_type": "latent", **options}
    return list(pipeline.stream(list(prompts), generator=seeded(*seeds), **options))


# ------------------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mixer", [RING, INFINI], ids=["ring", "infini"])
def test_a_chunk_is_denoised_with_the_clean_past_before_it(mixer, guidance):
    """By hand: every step sees the finished chunks as frames of time 0 before the noisy ones, in one whole clip."""
    pipeline = make(mixer)
    chunks = streamed(pipeline, num_frames=8, guidance_scale=guidance)  # of two latent frames, within a training clip
    generators, past = seeded(1, 2), torch.zeros(2, 6, 0, 2, 2)
    pipeline._guidance_scale = guidance
    text, empty = pipeline._embeddings(CAPTIONS, None, None), pipeline._embeddings(["", ""], None, None)
    for chunk in chunks:
        z: torch.Tensor = pipeline._noise(None, (2, 6, 2, 2, 2), generators, "cpu")
        pipeline.scheduler = build_scheduler(None, pipeline.objective)
        pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.5])
        for i, t in enumerate(pipeline.scheduler.timesteps):
            clip, clean = torch.cat([past, z], dim=2), past.shape[2]
            with torch.no_grad():
                output = pipeline._predict(clip, i, t, text, empty, clean, None)
            z = pipeline.scheduler.step(output[:, :, clean:], t, z, return_dict=False)[0]
        torch.testing.assert_close(chunk, z, rtol=0, atol=1e-4)
        past = torch.cat([past, z], dim=2)


def test_chunks_come_one_by_one_and_the_last_may_be_shorter():
    pipeline = make()
    chunks = pipeline.stream("a red circle", num_frames=16, chunk_frames=6, generator=seeded(0), output_type="pt")
    assert isinstance(chunks, GeneratorType)
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 6, 3, 8, 8), (1, 6, 3, 8, 8), (1, 4, 3, 8, 8)]
    assert [len(chunk[0]) for chunk in pipeline.stream("a red circle", num_frames=12)] == [4, 4, 4]  # half a clip each


def test_a_call_between_chunks_does_not_matter():
    pipeline = make()
    usual, chunks = streamed(pipeline), []
    for chunk in pipeline.stream(CAPTIONS, num_frames=24, chunk_frames=4, generator=seeded(1, 2), output_type="latent"):
        chunks.append(chunk)
        pipeline("a blue square", guidance_scale=1.0, num_inference_steps=1)
    assert torch.equal(torch.cat(chunks, dim=2), torch.cat(usual, dim=2))


def test_a_codec_that_joins_frames_over_time_is_streamed_as_latents(monkeypatch):
    pipeline = make()
    monkeypatch.setattr(pipeline.codec, "video", True, raising=False)
    with pytest.raises(PipelineError, match="stream with output_type latent and decode what comes"):
        pipeline.stream("a red circle", num_frames=24)
    assert len(streamed(pipeline)) == 6


def test_neighbours_do_not_matter_and_the_seed_does():
    pipeline = make()
    both = torch.cat(streamed(pipeline), dim=2)
    alone = torch.cat(streamed(pipeline, CAPTIONS[1:], (2,)), dim=2)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(streamed(pipeline), dim=2), both)
    assert not torch.allclose(torch.cat(streamed(pipeline, seeds=(1, 3)), dim=2)[1], both[1])


def test_an_image_begins_the_first_chunk_and_the_others_see_it():
    pipeline = make()
    image = torch.rand(2, 2, 3, 8, 8)  # two frames of each clip: one latent frame
    first, second = streamed(pipeline, num_frames=8, image=image)
    frames = torch.cat([image, image[:, -1:], image[:, -1:]], dim=1).movedim(2, 1) * 2 - 1
    torch.testing.assert_close(first[:, :, :1], pipeline.codec.encode(frames)[:, :, :1], rtol=0, atol=1e-5)
    without = streamed(pipeline, num_frames=8)[1]
    assert not torch.allclose(second, without, atol=1e-3) and not torch.allclose(second[:, :, :1], first[:, :, :1])


@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpm++"])
def test_every_scheduler_starts_anew_with_each_chunk(name):
    pipeline = make()
    pipeline.scheduler = build_scheduler(name, pipeline.objective)
    chunks = streamed(pipeline, num_inference_steps=3)
    assert len(chunks) == 6 and all(chunk.isfinite().all() for chunk in chunks)
    # A plan that mixes no time makes every chunk as if it were the first.
    still = make(plan="spatial")
    still.scheduler = build_scheduler(name, still.objective)
    a, b = (streamed(still, num_frames=8, num_inference_steps=3)[1] for _ in range(2))
    assert torch.equal(a, b)


FAULTS = {
    "frame_times": (dict(frame_times="clip"), {}, "train with objective.frame_times: past"),
    "mixer": (dict(mixer={"layout": "temporal"}), {}, "model.mixers.t: layout temporal sees all frames of a clip at once"),
    "part of a latent frame": ({}, dict(chunk_frames=3), "chunk_frames 3 should be a multiple of 2"),
    "segment": (dict(mixer=INFINI), dict(chunk_frames=6), "no whole number of the segments of 2 in mixers.t.memory"),
    "too long": ({}, dict(chunk_frames=10), "chunk_frames: a chunk of 5 frames of tokens is longer than a training clip"),
    "positions": (dict(positions="learned"), {}, "learned positions hold for the training size alone"),
    "output": ({}, dict(output_type="mp4"), "output_type 'mp4'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_streamed_is_told_before_anything_is_computed(name):
    how, options, words = FAULTS[name]
    with pytest.raises(PipelineError, match=words) as caught:
        make(**how).stream("a red circle", **{"num_frames": 24, **options})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- sample.py


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, pipeline in {"ring": make(), "infini": make(INFINI), "clip": make(frame_times="clip")}.items():
        folders[name] = tmp_path_factory.mktemp("saved") / name
        pipeline.save_pretrained(folders[name])
    return folders


def run(folder, out, *more):
    cli.sample([str(folder), "--prompt", *CAPTIONS, "--output_dir", str(out), "--wandb", "disabled", *more])


@pytest.mark.parametrize("name", ["ring", "infini"])
def test_sample_streams_beyond_the_training_length(saved, tmp_path, name):
    run(saved[name], tmp_path, "--num_frames", "80", "--seed", "7")
    assert sorted(p.name for p in tmp_path.glob("0*")) == [f"00{i}-seed7.{s}" for i in (0, 1) for s in ("json", "mp4")]
    clip = video.read(tmp_path / "000-seed7.mp4")
    assert clip.frames.shape == (80, 3, 8, 8) and clip.fps == 8
    pipeline = VideoPipeline.from_pretrained(saved[name])
    pipeline.set_progress_bar_config(disable=True)
    chunks = list(pipeline.stream(CAPTIONS, "", num_frames=80, generator=seeded(7, 7), output_type="pt"))
    frames = (torch.cat(chunks, dim=1) * 255).round().to(torch.uint8)
    video.write(tmp_path / "whole.mp4", video.Clip(frames[0], 8.0))  # all frames at once give the same bytes
    assert (tmp_path / "000-seed7.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert json.loads((tmp_path / "000-seed7.json").read_text())["num_frames"] == 80


def test_a_clip_of_the_training_length_is_made_at_once(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoPipeline, "stream", lambda *_, **__: pytest.fail("streamed"))
    run(saved["ring"], tmp_path)
    assert video.read(tmp_path / "000-seed0.mp4").frames.shape[0] == 8


def test_sample_says_why_it_does_not_stream(saved, tmp_path, capsys):
    run(saved["clip"], tmp_path, "--num_frames", "16")
    said = capsys.readouterr()
    assert "note: clips longer than 8 frames are made at once: this model knows one noise level" in said.out + said.err
    assert video.read(tmp_path / "000-seed0.mp4").frames.shape[0] == 16
    for more, words in (
        (
            ("--output", "gif"),
            "--output: clips longer than the 8 frames of training are made and written chunk by chunk",
        ),
        (("--cache", "first_block"), "--cache: clips longer than the 8 frames of training"),
        (("--chunk_frames", "3"), "--chunk_frames: 3 frames do not suit this model; write 4; 2, 6 would do too"),
    ):
        with pytest.raises(SystemExit):
            run(saved["ring"], tmp_path, "--num_frames", "16", *more)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(saved["clip"], tmp_path, "--num_frames", "16", "--chunk_frames", "2")
    assert "--chunk_frames: this model knows one noise level" in capsys.readouterr().err


def test_a_stream_that_fails_leaves_no_file(saved, tmp_path, monkeypatch):
    def fail(self, *_):
        raise PipelineError("on the way")

    monkeypatch.setattr(VideoPipeline, "_frames", fail)
    with pytest.raises(SystemExit):
        run(saved["ring"], tmp_path, "--num_frames", "16")
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".mp4"]

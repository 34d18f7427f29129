"""The same prompt and seed are the same bytes: twice, in any batch, and after a way over the disk."""

import itertools

import pytest
import torch
from torch import nn

from stgen import video
from stgen.codec import PatchPCA, Pixels
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline, build_scheduler
from stgen.text import LearnedTextEncoder, vocabulary_of

PROMPTS = ["a red circle moving up", "a blue square", ""]
SIZE = {"num_frames": 4, "height": 16, "width": 16}
TOPK = {"kind": "topk", "ratio": 0.5}
MODELS = {
    "factorised": {"plan": "spatial temporal"},
    "cross": {"plan": "joint", "conditioning": "cross", "positions": "sincos"},
    "chosen": {"plan": "joint", "mixers": {"joint": {"order": "tile", "block": [1, 2, 2], "pattern": TOPK}}},
    "linear": {"plan": "joint", "mixers": {"joint": {"normaliser": {"kind": "linear"}}}},
    "token": {"plan": "spatial>temporal", "modulated": False, "registers": 2, "conditioning": "both"},
}  # fmt: skip
SCHEDULERS = {"flow": ["euler", "heun", "unipc", "dpm++"], "diffusion": ["ddim", "unipc", "dpm++"]}
TWICE = "clips sampled twice with the same prompt and seed, byte-identical as frames and as mp4"
BATCH = "batches of three that are their three singles within 1e-4"
DISK = "pipelines that give byte-identical frames after saving and loading"


def make(model="factorised", scheduler="euler", path="flow", codec=None) -> VideoPipeline:
    torch.manual_seed(0)
    codec = codec or PatchPCA((2, 2, 2), 6).fit(torch.rand(4, 3, 4, 16, 16) * 2 - 1)
    channels = codec.config.components if isinstance(codec, PatchPCA) else 3
    grid = (2, 8, 8) if isinstance(codec, PatchPCA) else (4, 4, 4)
    patch = (1, 1, 1) if isinstance(codec, PatchPCA) else (1, 4, 4)
    keys = {"width": 16, "depth": 2, "heads": 2, "text_width": 8, **MODELS[model]}
    transformer = VideoTransformer(channels, grid, patch, **keys).eval()
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.15)
    objective = {"path": path}
    sampling = {**SIZE, "fps": 8.0, "num_inference_steps": 3, "guidance_scale": 2.0}
    encoder = LearnedTextEncoder(vocabulary_of(PROMPTS), width=8)
    chosen = build_scheduler(scheduler, Objective(**objective))
    pipeline = VideoPipeline(transformer, codec, encoder, chosen, objective=objective, sampling=sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clips(pipeline, prompts, seeds, **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, output_type="pt", **options).frames


CASES = [(model, "euler", "flow") for model in MODELS]
CASES += [
    ("factorised", name, path)
    for path, names in SCHEDULERS.items()
    for name in names
    if (name, path) != ("euler", "flow")
]
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)


@every_case
def test_the_same_prompt_and_seed_give_the_same_bytes(case, tmp_path, figure):
    frames, files = [], []
    for i in range(2):
        pipeline = make(*case)
        torch.manual_seed(1000 + i)  # of no meaning: what is random has a generator of its own
        frames.append(clips(pipeline, [PROMPTS[0]], [7]))
        file = tmp_path / f"{i}.mp4"
        video.write(file, video.Clip((frames[-1][0] * 255).round().to(torch.uint8), 8.0))
        files.append(file.read_bytes())
    assert torch.equal(*frames) and files[0] == files[1] and len(files[0]) > 500
    assert not torch.equal(frames[0], clips(make(*case), [PROMPTS[0]], [8]))
    figure(TWICE)


@every_case
def test_a_batch_of_three_is_three_singles(case, figure):
    pipeline = make(*case)
    batch = clips(pipeline, PROMPTS, [1, 2, 3])
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(batch[i : i + 1], clips(pipeline, [prompt], [i + 1]), rtol=0, atol=1e-4)
    assert all((batch[i] - batch[j]).abs().max() > 1e-2 for i, j in itertools.combinations(range(3), 2))
    figure(BATCH)


@every_case
def test_saving_and_loading_changes_no_byte(case, tmp_path, figure):
    pipeline = make(*case)
    expected = clips(pipeline, PROMPTS, [1, 2, 3])
    pipeline.save_pretrained(tmp_path)
    loaded = VideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(clips(loaded, PROMPTS, [1, 2, 3]), expected)
    figure(DISK)


def test_frames_that_are_not_coded_are_the_same_too(tmp_path, figure):
    pipeline = make(codec=Pixels())
    expected = clips(pipeline, PROMPTS[:1], [1])
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(clips(VideoPipeline.from_pretrained(tmp_path), PROMPTS[:1], [1]), expected)
    figure(DISK)

"""Reuse over denoising steps: calls really fall, what is kept is what it should be, and what cannot be hooked says so."""

import itertools

import pytest
import torch
from torch import nn

from stgen import cli
from stgen.caches import Cache, CacheError, Tally, caching, calibrated
from stgen.codec import PatchPCA
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline, build_scheduler
from stgen.text import LearnedTextEncoder, vocabulary_of

STEPS, DEPTH = 12, 4
TOPK = {"spatial": {"order": "tile", "block": [1, 2, 2], "pattern": {"kind": "topk", "ratio": 0.5}}}


def make(plan="spatial temporal", conditioning="both", **keys) -> VideoPipeline:
    torch.manual_seed(0)
    codec = PatchPCA((2, 2, 2), 6).fit(torch.rand(4, 3, 4, 16, 16) * 2 - 1)
    transformer = VideoTransformer(
        6, (2, 8, 8), width=16, depth=DEPTH, heads=2, plan=plan, text_width=8, conditioning=conditioning, **keys
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    sampling = {
        "num_frames": 4,
        "height": 16,
        "width": 16,
        "fps": 8.0,
        "num_inference_steps": STEPS,
        "guidance_scale": 2.0,
    }
    encoder = LearnedTextEncoder(vocabulary_of(["a red circle"]), width=8)
    pipeline = VideoPipeline(
        transformer, codec, encoder, build_scheduler(None, Objective()), objective={}, sampling=sampling
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline):
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent").frames


def sampled(pipeline, cache):
    tally = Tally()
    with caching(pipeline, cache, STEPS, tally):
        found = latents(pipeline)
    return found, tally


ALL_CALLS = STEPS * DEPTH * 3  # a mixer, an MLP and an attention to the prompt in every layer


@pytest.mark.parametrize(
    ("cache", "made"),
    [
        (Cache("taylorseer", {"every": 3, "start": 3}), 6 * 3 * DEPTH),  # steps 0, 1, 2, 4, 7 and 10
        (Cache("first_block", {"threshold": 1e9}), 3 * DEPTH + (STEPS - 1) * 3),
        (Cache("mag", {"threshold": 1e9, "max_skip": 3, "start": 0}, ratios=(1.0,) * STEPS), 3 * 3 * DEPTH),
        (Cache("pab", {"spatial": 2, "temporal": 3, "cross": 4, "from": 0, "to": 1001}), 2 * 6 + 2 * 4 + 4 * 3 + 48),
    ],
    ids=lambda x: x.kind if isinstance(x, Cache) else "",
)
def test_calls_fall_and_the_model_is_left_as_it_was(cache, made):
    pipeline = make()
    plain = latents(pipeline)
    found, tally = sampled(pipeline, cache)
    assert (tally.made, tally.asked) == (made, ALL_CALLS) and made < 0.7 * ALL_CALLS
    assert torch.isfinite(found).all() and not torch.equal(found, plain)
    assert torch.equal(latents(pipeline), plain)


@pytest.mark.parametrize(
    "cache",
    [
        Cache("first_block", {"threshold": 0}),
        Cache("mag", {"threshold": 0}, ratios=(1.5,) * STEPS),
        Cache("taylorseer", {"every": 1}),
        Cache("pab", {"spatial": 1, "temporal": 1, "cross": 1}),
    ],
    ids=lambda x: x.kind,
)
def test_a_cache_that_keeps_nothing_changes_nothing(cache):
    pipeline = make()
    found, tally = sampled(pipeline, cache)
    assert tally.made == tally.asked == ALL_CALLS
    assert torch.equal(found, latents(pipeline))


def test_less_is_kept_where_less_may_change():
    pipeline = make()
    plain = latents(pipeline)
    errors = [(sampled(pipeline, Cache("taylorseer", {"every": e}))[0] - plain).norm() for e in (2, 6)]
    assert 0 < errors[0] < errors[1]


def test_supports_are_chosen_anew_every_so_many_steps():
    pipeline = make(mixers=TOPK)
    plain = latents(pipeline)
    found, tally = sampled(pipeline, Cache("support", {"every": 4}))
    assert (tally.made, tally.asked) == (2 * STEPS // 4, 2 * STEPS)
    assert not torch.equal(found, plain)
    same, tally = sampled(pipeline, Cache("support", {"every": 1}))
    assert torch.equal(same, plain) and tally.made == tally.asked


def test_ratios_are_those_of_the_sum_of_all_updates():
    pipeline = make()
    blocks = pipeline.transformer.blocks
    entered, left = [], []
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a: entered.append(a[0])),
        blocks[-1].register_forward_hook(lambda m, a, out: left.append(out)),
    ]
    with calibrated(pipeline.transformer) as ratios:
        latents(pipeline)
    for handle in handles:
        handle.remove()
    size = [(b - a).norm(dim=-1) for a, b in zip(entered, left, strict=True)]
    expected = [1.0] + [float((b / a).mean()) for a, b in itertools.pairwise(size)]
    assert ratios == pytest.approx(expected, rel=1e-5) and len(ratios) == STEPS


@pytest.mark.parametrize(
    ("keys", "cache", "message"),
    [
        ({}, Cache("support"), "no pattern of this model is chosen from the data"),
        (
            {"mixers": {"spatial": {"reuse": {"what": "kv", "every": 2}}}},
            Cache("first_block"),
            "layers take kv from layer 0",
        ),
        ({"mixers": {"spatial": {"reuse": {"what": "map", "every": 2}}}}, Cache("pab"), "layers take map from layer 0"),
        ({}, Cache("mag"), "measure them by calibrated"),
    ],
)
def test_what_cannot_be_hooked_says_so(keys, cache, message):
    pipeline = make(**keys)
    plain = latents(pipeline)
    with pytest.raises(CacheError, match=message), caching(pipeline, cache, STEPS, Tally()):
        pass
    assert torch.equal(latents(pipeline), plain)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tea"], "none of first_block"),
        (["pab", "width=2"], "no option 'width'"),
        (["pab", "temporal=1.5"], "a whole number from 1 on"),
        (["first_block", "threshold"], "no name=number"),
        (["first_block", "threshold=-1"], "a number from 0 on"),
    ],
)
def test_words_that_are_no_cache(words, message):
    with pytest.raises(CacheError, match=message):
        Cache.parse(words)


def test_from_the_command_line(tmp_path, capsys):
    make().save_pretrained(tmp_path / "pipeline")
    ask = ["--prompt", "a red circle", "--wandb", "disabled", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    cli.sample([str(tmp_path / "pipeline"), *ask, "--cache", "mag", "threshold=1e9"])
    said = capsys.readouterr()
    assert "to measure how updates grow" in said.err + said.out and f"of {ALL_CALLS} calls made" in said.out
    with pytest.raises(SystemExit):
        cli.sample([str(tmp_path / "pipeline"), *ask, "--cache", "support"])
    assert "error: cache support: no pattern" in capsys.readouterr().err


def test_mag_is_refused_before_anything_is_sampled_for_it():
    pruned = make(plan="joint", pruning={"tokens": 0.5})
    with pytest.raises(CacheError, match="cache mag: this model's layers prune"), calibrated(pruned.transformer):
        pass

"""The sampling face: its contract with diffusers, independence of neighbours, and exactness where the model is exact."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from stgen.codec import PatchPCA
from stgen.model import VideoTransformer
from stgen.objective import Objective, shift_time
from stgen.pipeline import PipelineError, VideoPipeline, VideoPipelineOutput, build_scheduler, set_steps
from stgen.text import LearnedTextEncoder, vocabulary_of

FLOW, DIFFUSION = ("euler", "heun", "unipc", "dpm++"), ("ddim", "unipc", "dpm++")
SIZE = dict(num_frames=4, height=8, width=12)
LATENTS = (6, 2, 4, 6)  # of SIZE under patches of 2 x 2 x 2
PROMPTS = ["a red circle", "a blue square moving left", ""]


def make(scheduler=None, positions="rope", codec=None, **objective) -> VideoPipeline:
    """A tiny pipeline whose weights are all away from zero, so that every input matters."""
    torch.manual_seed(0)
    codec = codec or PatchPCA((2, 2, 2), 6).fit(torch.rand(4, 3, 4, 8, 12) * 2 - 1)
    channels = codec.config.components if isinstance(codec, PatchPCA) else codec.config.latent_channels
    transformer = VideoTransformer(
        channels, LATENTS[1:], width=16, depth=2, heads=2, text_width=8, positions=positions, conditioning="both"
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.15)
    encoder = LearnedTextEncoder(vocabulary_of(PROMPTS), width=8, max_length=6)
    sampling = {**SIZE, "fps": 8.0, "num_inference_steps": 3, "guidance_scale": 2.0, "max_length": 6}
    chosen = build_scheduler(scheduler, Objective(**objective))
    pipeline = VideoPipeline(transformer, codec, encoder, chosen, objective=objective, sampling=sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return make()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipeline, prompt="a red circle", seed=0, **options):
    """Frames as a tensor [B, T, C, H, W], or latents."""
    options = {"generator": seeded(seed), "output_type": "pt", **options}
    return pipeline(prompt, **options).frames


# ------------------------------------------------------------------------------------------------------------ output


def test_output_types(pipeline):
    frames = sample(pipeline, PROMPTS)
    assert frames.shape == (3, 4, 3, 8, 12) and frames.min() >= 0 and frames.max() <= 1
    array = sample(pipeline, PROMPTS, output_type="np")
    assert isinstance(array, np.ndarray) and array.shape == (3, 4, 8, 12, 3)
    assert np.allclose(array.transpose(0, 1, 4, 2, 3), frames.numpy(), atol=1e-6)
    images = sample(pipeline, PROMPTS, output_type="pil")
    assert len(images) == 3 and len(images[0]) == 4 and images[0][0].size == (12, 8)
    assert isinstance(images[0][0], Image.Image)
    latents = sample(pipeline, PROMPTS, output_type="latent")
    assert latents.shape == (3, *LATENTS) and latents.dtype == torch.float32
    decoded = (pipeline.codec.decode(latents) / 2 + 0.5).clamp(0, 1).movedim(1, 2)
    assert torch.allclose(decoded, frames, atol=1e-6)


def test_a_tuple_holds_what_the_output_holds(pipeline):
    whole = pipeline("a red circle", generator=seeded(), output_type="pt")
    assert isinstance(whole, VideoPipelineOutput)
    assert torch.equal(whole[0], whole.frames)
    (frames,) = pipeline("a red circle", generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(frames, whole.frames)


def test_a_seed_decides_the_clip(pipeline):
    first = sample(pipeline)
    assert torch.equal(first, sample(pipeline))
    assert not torch.allclose(first, sample(pipeline, seed=1), atol=1e-2)
    assert not torch.allclose(first, sample(pipeline, "a blue square"), atol=1e-2)


@pytest.mark.parametrize("scheduler", FLOW)
def test_a_clip_does_not_depend_on_its_neighbours(scheduler):
    pipeline = make(scheduler)
    together = sample(pipeline, PROMPTS, generator=[seeded(i) for i in range(3)])
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(together[i : i + 1], sample(pipeline, prompt, seed=i), atol=1e-4)


def test_several_clips_of_a_prompt(pipeline):
    many = sample(pipeline, PROMPTS[:2], num_videos_per_prompt=2, generator=[seeded(i) for i in range(4)])
    for i, prompt in enumerate((PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])):
        assert torch.allclose(many[i : i + 1], sample(pipeline, prompt, seed=i), atol=1e-4)


def test_another_size_than_that_of_training(pipeline):
    assert sample(pipeline, num_frames=6, height=16, width=8).shape == (1, 6, 3, 16, 8)


# ------------------------------------------------------------------------------------------------------------- input


def test_latents_given(pipeline):
    noise = torch.randn(1, *LATENTS, generator=seeded())
    kept = noise.clone()
    assert torch.equal(sample(pipeline, latents=noise, generator=None), sample(pipeline))
    assert torch.equal(noise, kept)


def test_embeddings_given(pipeline):
    embeds, mask, *_ = pipeline.encode_prompt(PROMPTS)
    none, none_mask, *_ = pipeline.encode_prompt([""] * 3)
    given = dict(prompt_embeds=embeds, prompt_attention_mask=mask)
    both = dict(negative_prompt_embeds=none, negative_prompt_attention_mask=none_mask)
    expected = sample(pipeline, PROMPTS)
    assert torch.equal(sample(pipeline, None, **given), expected)
    assert torch.equal(sample(pipeline, None, **given, **both), expected)
    whole = embeds[1:2]  # of the longest prompt, whose mask is all true
    assert torch.equal(sample(pipeline, None, prompt_embeds=whole), sample(pipeline, PROMPTS[1]))
    twice = sample(pipeline, None, **given, **both, num_videos_per_prompt=2)
    assert torch.equal(twice, sample(pipeline, PROMPTS, num_videos_per_prompt=2))


def test_the_negative_prompt_matters_under_guidance_alone(pipeline):
    assert not torch.allclose(sample(pipeline), sample(pipeline, negative_prompt="square"), atol=1e-3)
    assert torch.equal(sample(pipeline), sample(pipeline, negative_prompt=""))
    for scale in (0.0, 1.0):
        plain = sample(pipeline, guidance_scale=scale)
        assert torch.equal(plain, sample(pipeline, guidance_scale=scale, negative_prompt="square"))
    each = sample(pipeline, PROMPTS[:2], negative_prompt=["square", ""], generator=[seeded(), seeded(1)])
    assert torch.allclose(each[:1], sample(pipeline, negative_prompt="square"), atol=1e-4)
    assert torch.allclose(each[1:], sample(pipeline, PROMPTS[1], seed=1), atol=1e-4)


def test_guidance_of_one_is_the_conditional_model_alone(pipeline):
    latents = torch.randn(1, *LATENTS, generator=seeded())
    embeds, mask, *_ = pipeline.encode_prompt("a red circle")
    pushed = sample(pipeline, guidance_scale=1.0, output_type="latent")
    with torch.no_grad():
        for time in (1.0, 2 / 3, 1 / 3):
            latents = latents - pipeline.transformer(latents, torch.tensor(1000 * time), embeds, mask).sample / 3
    assert torch.allclose(latents, pushed, atol=1e-4)


def test_guidance_leads_away_from_the_negative_prompt(pipeline):
    """One Euler step is linear in the guided velocity."""
    at = [sample(pipeline, guidance_scale=s, num_inference_steps=1, output_type="latent") for s in (1.0, 2.0, 3.0)]
    assert torch.allclose(at[2] - at[1], at[1] - at[0], atol=1e-4) and not torch.allclose(at[1], at[0], atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt=None), "give prompt or prompt_embeds"),
        (dict(prompt=[]), "give prompt or prompt_embeds"),
        (dict(negative_prompt=["", ""]), "negative_prompt: 2 given for 3 prompts"),
        (dict(negative_prompt=[""] * 4), "negative_prompt: 4 given for 3 prompts"),
        (dict(latents=torch.zeros(3, 6, 2, 4, 4)), r"latents: shape \[3, 6, 2, 4, 4\] given, \[3, 6, 2, 4, 6\] needed"),
        (dict(generator=[seeded()]), "generator: 1 given for 3 clips"),
        (dict(num_inference_steps=0), "num_inference_steps 0 should be at least 1"),
        (dict(num_videos_per_prompt=0), "num_videos_per_prompt 0 should be at least 1"),
        (dict(output_type="jpg"), "output_type 'jpg' is none of pil, np, pt, latent"),
        (dict(callback_on_step_end_tensor_inputs=["mask"]), "'mask' is none of latents, prompt_embeds"),
        (dict(num_frames=5), "num_frames 5 is not divisible by the codec's patch of 2"),
        (dict(height=0), "height 0 should be at least 1"),
    ],
)
def test_refusals(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline, **{"prompt": PROMPTS, **options})


def test_learned_positions_hold_for_the_training_size():
    pipeline = make(positions="learned")
    assert sample(pipeline).shape == (1, 4, 3, 8, 12)
    with pytest.raises(PipelineError, match="4 frames of 16x12: learned positions hold for the training size alone"):
        sample(pipeline, height=16)


# ---------------------------------------------------------------------------------------------------------- callback


def test_a_callback_sees_every_step_and_may_change_tensors(pipeline):
    seen = []

    def watch(called, step, timestep, tensors):
        seen.append((called is pipeline, step, float(timestep), sorted(tensors), pipeline.num_timesteps))
        return {}

    names = VideoPipeline._callback_tensor_inputs
    watched = sample(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(watched, sample(pipeline))
    assert [entry[:2] for entry in seen] == [(True, 0), (True, 1), (True, 2)]
    assert all(entry[3:] == (sorted(names), 3) for entry in seen)
    assert [entry[2] for entry in seen] == pytest.approx([1000, 2000 / 3, 1000 / 3], abs=1e-3)

    zeros = sample(
        pipeline, output_type="latent", callback_on_step_end=lambda p, i, t, x: {"latents": x["latents"] * 0}
    )
    assert torch.equal(zeros, torch.zeros(1, *LATENTS))
    swapped = pipeline.encode_prompt("a blue square")[0]
    change = sample(pipeline, callback_on_step_end=lambda *_: {"prompt_embeds": swapped})
    assert not torch.allclose(change, sample(pipeline), atol=1e-3)


def test_guidance_is_read_at_each_step(pipeline):
    def switch_off(called, *_):
        called._guidance_scale = 1.0

    late = sample(pipeline, callback_on_step_end=switch_off)
    assert pipeline.guidance_scale == 1.0
    assert not torch.allclose(late, sample(pipeline), atol=1e-3)
    assert not torch.allclose(late, sample(pipeline, guidance_scale=1.0), atol=1e-3)


# ------------------------------------------------------------------------------------------------------ diffusers' face


def test_the_signature_is_that_of_a_diffusers_pipeline():
    parameters = inspect.signature(VideoPipeline.__call__).parameters
    names = (
        "prompt negative_prompt height width num_frames num_inference_steps guidance_scale num_videos_per_prompt "
        "generator latents prompt_embeds negative_prompt_embeds output_type return_dict callback_on_step_end "
        "callback_on_step_end_tensor_inputs"
    )
    assert set(names.split()) <= set(parameters)
    assert all(p.default is not inspect.Parameter.empty for n, p in parameters.items() if n != "self")


def test_components_make_another_pipeline(pipeline):
    parts = pipeline.components
    assert set(parts) == {"transformer", "codec", "text_encoder", "scheduler", "tokenizer"}
    config = {"objective": pipeline.config.objective, "sampling": pipeline.config.sampling}
    other = VideoPipeline(**parts, **config)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(sample(other), sample(pipeline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats(dtype):
    pipeline = make()
    expected = sample(pipeline)
    pipeline.to(dtype)
    assert pipeline.dtype == dtype
    frames = sample(pipeline)
    assert frames.dtype == torch.float32
    assert float((frames - expected).abs().mean()) < (0.02 if dtype == torch.bfloat16 else 1e-5)
    assert sample(pipeline, output_type="np").dtype == np.float32


def test_prompts_are_encoded_without_the_other_parts(pipeline):
    config = {"objective": pipeline.config.objective, "sampling": pipeline.config.sampling}
    alone = VideoPipeline(None, None, pipeline.text_encoder, None, **config)
    for found, expected in zip(alone.encode_prompt(PROMPTS), pipeline.encode_prompt(PROMPTS), strict=True):
        assert torch.equal(found, expected)
    assert alone.encode_prompt("a red circle " * 50)[0].shape == (1, 6, 8)  # cut


@pytest.mark.parametrize("objective", [{}, {"path": "diffusion", "prediction_type": "epsilon"}, {"shift": 3.0}])
def test_save_and_load(objective, tmp_path):
    pipeline = make(**objective)
    expected = sample(pipeline)
    pipeline.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}  # nothing pickled
    for options in ({}, {"use_safetensors": True}):
        loaded = VideoPipeline.from_pretrained(tmp_path, **options)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.objective == pipeline.objective and dict(loaded.config.sampling) == dict(pipeline.config.sampling)
        assert torch.equal(sample(loaded), expected)
    assert type(loaded.scheduler) is type(pipeline.scheduler)


def test_a_pretrained_text_encoder_is_saved_with_its_tokenizer(tmp_path):
    torch.manual_seed(0)
    small = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    parts = {**make().components, "text_encoder": T5EncoderModel(small).eval(), "tokenizer": ByT5Tokenizer()}
    pipeline = VideoPipeline(**parts, sampling={**SIZE, "num_inference_steps": 2, "max_length": 8})
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.encode_prompt(["a red circle", ""])[1].sum(1).tolist() == [8, 1]
    expected = sample(pipeline)
    assert not torch.allclose(expected, sample(pipeline, "blue"), atol=1e-3)
    pipeline.save_pretrained(tmp_path)
    loaded = VideoPipeline.from_pretrained(tmp_path, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded), expected)


def test_a_diffusers_autoencoder_is_probed_once(tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    )  # fmt: skip
    calls = []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    pipeline = make(codec=vae)
    frames = sample(pipeline)
    assert frames.shape == (1, 4, 3, 8, 12) and len(calls) == 1
    assert torch.equal(sample(pipeline), frames) and len(calls) == 1
    pipeline.save_pretrained(tmp_path)
    loaded = VideoPipeline.from_pretrained(tmp_path, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.codec, AutoencoderKL) and torch.equal(sample(loaded), frames)


# -------------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("path", "name"), [("flow", n) for n in FLOW] + [("diffusion", n) for n in DIFFUSION])
def test_every_scheduler_gives_finite_frames(path, name, steps):
    pipeline = make(name, path=path)
    for _ in range(2):  # a scheduler may be used again
        frames = sample(pipeline, num_inference_steps=steps, output_type="latent")
        assert frames.isfinite().all()


@pytest.mark.parametrize(("path", "names"), [("flow", {"ddim"}), ("diffusion", {"euler", "heun"})])
def test_a_scheduler_of_the_other_path_is_refused(path, names):
    for name in names:
        with pytest.raises(PipelineError, match=f"scheduler {name} is for objective.path .*; with {path} use"):
            build_scheduler(name, Objective(path=path))


@pytest.mark.parametrize("name", ["euler", "heun", "unipc"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_flow_times_are_shifted_once(name, shift, steps):
    scheduler = build_scheduler(name, Objective(shift=shift))
    for _ in range(2):
        set_steps(scheduler, steps, "flow", "cpu")
        expected = shift_time(torch.linspace(1, 1 / steps, steps), shift)
        found = scheduler.sigmas.unique().flip(0)
        assert torch.allclose(found, torch.cat([expected, torch.zeros(1)]), atol=2e-6)


class Exact(nn.Module):
    """The exact prediction for data that are all one clip: noise is what is left of z."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, objective, x, patch_size=(1, 1, 1)):
        super().__init__()
        self.objective, self.x, self.told = objective, x, []
        self.config = SimpleNamespace(patch_size=patch_size, positions="rope")

    def forward(self, z, timestep, embeds, mask, return_dict):
        assert z.dtype == torch.float32 and timestep.shape == (len(z),)
        self.told.append(float(timestep[0]))
        kind, t = self.objective.prediction_type, timestep.double().view(-1, 1, 1, 1, 1)
        if self.objective.path == "flow":
            return (self.x.expand_as(z) if kind == "sample" else ((z - self.x) / (t / 1000)).float(),)
        alpha = self.objective._alphas[t.long()].double()
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        noise = (z - a * self.x) / s
        return (
            {"epsilon": noise, "sample": self.x.expand_as(z), "v_prediction": a * noise - s * self.x}[kind].float(),
        )


def land(scheduler, steps, **objective):
    """Latents at the end of a walk with the exact model, the clip they should be, and the times it was told."""
    pipeline, x = make(scheduler, **objective), torch.randn(1, *LATENTS, generator=seeded(9))
    exact = Exact(pipeline.objective, x)
    pipeline.register_modules(transformer=exact)
    latents = sample(pipeline, num_inference_steps=steps, guidance_scale=3.0, output_type="latent")
    return latents, x, exact.told


@pytest.mark.parametrize("scheduler", FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_flow_with_an_exact_model_is_exact(scheduler, shift, prediction_type, steps):
    found, expected, told = land(scheduler, steps, shift=shift, prediction_type=prediction_type)
    assert torch.allclose(found, expected, atol=2e-5)
    assert told[0] == pytest.approx(1000, abs=1.1) and told == sorted(told, reverse=True) and told[-1] > 0
    assert len(told) == (2 * steps - 1 if scheduler == "heun" else steps)


@pytest.mark.parametrize("scheduler", DIFFUSION)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_diffusion_with_an_exact_model_is_exact(scheduler, prediction_type, steps):
    found, expected, told = land(scheduler, steps, path="diffusion", prediction_type=prediction_type)
    assert torch.allclose(found, expected, atol=2e-5)
    assert told[0] == 999 and len(told) == steps


# ------------------------------------------------------------------------------------------------------ first frames


@pytest.fixture(scope="module")
def continuing():
    return make(frame_times="past")


def still(seed=0, clips=1, frames=1):
    return torch.rand(clips, frames, 3, 8, 12, generator=seeded(seed))


def test_a_clip_begins_with_the_image_given(continuing):
    image = still()
    latents = sample(continuing, image=image, output_type="latent")
    given = continuing.codec.encode(image.movedim(2, 1).expand(-1, -1, 4, -1, -1) * 2 - 1)
    torch.testing.assert_close(latents[:, :, :1], given[:, :, :1])
    assert not torch.allclose(latents[:, :, 1:], sample(continuing, output_type="latent")[:, :, 1:])
    as_picture = Image.fromarray((image[0, 0].permute(1, 2, 0) * 255).round().byte().numpy())
    torch.testing.assert_close(sample(continuing, image=as_picture, output_type="latent"), latents, rtol=0, atol=0.1)


def test_the_model_is_told_which_frames_are_clean(continuing, monkeypatch):
    told = []
    forward = continuing.transformer.forward
    monkeypatch.setattr(
        continuing.transformer,
        "forward",
        lambda z, t, *rest, **k: told.append((z[:, :, 0], t)) or forward(z, t, *rest, **k),
    )
    sample(continuing, image=still(), num_inference_steps=2)
    assert [t.tolist() for _, t in told] == [[[0.0, 1000.0]] * 2, [[0.0, 500.0]] * 2]  # guidance doubles the batch
    assert torch.equal(told[0][0], told[1][0])


def test_each_clip_may_begin_with_its_own_frames(continuing):
    frames = still(clips=2, frames=3)  # of which two fill a latent frame
    options = dict(num_frames=6, output_type="latent")
    together = continuing(PROMPTS[:2], image=frames, generator=[seeded(0), seeded(1)], **options).frames
    for i in range(2):
        alone = sample(continuing, PROMPTS[i], seed=i, image=frames[i : i + 1], **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (still(frames=4), {}, "leave none of 4 to make"),
        (still()[..., :7, :], {}, "given for clips of"),
    ],
)
def test_first_frames_that_do_not_fit(continuing, image, options, message):
    with pytest.raises(PipelineError, match=message):
        sample(continuing, image=image, **options)


def test_first_frames_need_a_model_that_knows_them(pipeline):
    with pytest.raises(PipelineError, match=r"train with objective\.frame_times: past"):
        sample(pipeline, image=still())

"""VideoPipeline as diffusers' tools take it: forms on disk, types, callbacks, batches, prompts encoded apart."""

import json

import accelerate
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from stgen.codec import PatchPCA, Pixels
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import PipelineError, VideoPipeline, build_scheduler
from stgen.text import LearnedTextEncoder, vocabulary_of

PROMPT = "a red circle and a blue square on green ground"


def components(text="own") -> dict:
    torch.manual_seed(0)
    codec = PatchPCA((2, 2, 2), 4).fit(torch.rand(8, 3, 4, 8, 8) * 2 - 1)
    if text == "own":
        encoder, tokenizer = LearnedTextEncoder(vocabulary_of([PROMPT]), width=8, max_length=6), None
    else:
        small = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        encoder, tokenizer = T5EncoderModel(small).eval(), ByT5Tokenizer()
    transformer = VideoTransformer(4, (2, 4, 4), width=16, heads=2, depth=2, text_width=8, conditioning="both").eval()
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.15)
    scheduler = build_scheduler(None, Objective())
    parts = {"transformer": transformer, "codec": codec, "text_encoder": encoder, "tokenizer": tokenizer}
    return {**parts, "scheduler": scheduler}


def make(text="own", **changed) -> VideoPipeline:
    """A pipeline without settings of its own: each call says all."""
    return quiet(VideoPipeline(**{**components(text), **changed}))


def quiet(pipeline: VideoPipeline) -> VideoPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked(**changed) -> dict:
    request = {
        "prompt": PROMPT, "negative_prompt": "blue", "generator": torch.Generator().manual_seed(0), "num_frames": 4,
        "height": 8, "width": 8, "num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "pt",
    }  # fmt: skip
    return {**request, **changed}


def sample(pipeline, **changed) -> torch.Tensor:
    return pipeline(**asked(**changed))[0]


both_encoders = pytest.mark.parametrize("text", ["own", "t5"])


# --------------------------------------------------------------------------------------------------- forms on disk


@both_encoders
@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "8KB"}], ids=str)
def test_a_saved_pipeline_samples_the_same(tmp_path, text, options):
    pipeline = make(text)
    pipeline.save_pretrained(tmp_path, safe_serialization=False, **options)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    for name, part in pipeline.components.items():
        files = [path.name for path in (tmp_path / name).glob("*.safetensors")] if isinstance(part, nn.Module) else []
        assert all(("fp16" in file) == ("variant" in options) for file in files)
        assert not isinstance(part, nn.Module) or files
    loaded = quiet(VideoPipeline.from_pretrained(tmp_path, variant=options.get("variant")))
    assert torch.equal(sample(loaded), sample(pipeline))


def test_a_variant_that_was_not_saved_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        VideoPipeline.from_pretrained(tmp_path, variant="fp16")


def test_components_are_told_saved_and_may_be_left_out(tmp_path):
    parts = components()
    pipeline = make()
    assert set(pipeline.components) == set(parts)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["tokenizer"] == [None, None] and set(VideoPipeline._optional_components) <= set(parts)
    loaded = VideoPipeline.from_pretrained(tmp_path)
    assert loaded.tokenizer is None and set(loaded.components) == set(parts)


def test_each_component_is_loaded_in_its_type(tmp_path):
    make("t5").save_pretrained(tmp_path)
    types = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = VideoPipeline.from_pretrained(tmp_path, torch_dtype=types)
    for name, part in loaded.components.items():
        if isinstance(part, nn.Module):
            assert part.dtype == types.get(name, torch.float16), name


@both_encoders
def test_a_device_map_of_one_device_changes_nothing(tmp_path, text):
    pipeline = make(text)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(sample(quiet(VideoPipeline.from_pretrained(tmp_path, device_map="cpu"))), sample(pipeline))


def test_a_pipeline_of_the_parts_of_another():
    pipeline = make(sampling={"num_frames": 4, "height": 8, "width": 8})
    other = VideoPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer and other.config.sampling == pipeline.config.sampling
    assert torch.equal(sample(quiet(other)), sample(pipeline))
    changed = VideoPipeline.from_pipe(pipeline, scheduler=build_scheduler("unipc", Objective()))
    assert type(changed.scheduler).__name__.startswith("UniPC") and changed.codec is pipeline.codec


# ----------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_encoders
def test_a_pipeline_samples_in_half_precision(dtype, text):
    expected = sample(make(text))
    pipeline = make(text).to(dtype=dtype)
    assert {part.dtype for part in pipeline.components.values() if isinstance(part, nn.Module)} == {dtype}
    found = sample(pipeline)
    assert found.isfinite().all() and (found.float() - expected).abs().mean() < 0.05


def test_a_transformer_stored_in_eight_bits_samples():
    pipeline = make().to(dtype=torch.bfloat16)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert sample(pipeline).isfinite().all()
    assert {p.dtype for p in pipeline.transformer.blocks[0].mlp.parameters()} == {torch.float8_e4m3fn}


# ----------------------------------------------------------------------------------------------------------- prompts


def returned_names(monkeypatch) -> list[str]:
    """The names of what `encode_prompt` returns, read off its source as diffusers does."""
    monkeypatch.setattr(diffusers.pipelines, "VideoPipeline", VideoPipeline, raising=False)
    visitor = ReturnNameVisitor()
    visitor.visit(visitor.get_ast_tree(cls=VideoPipeline))
    return visitor.return_names


@both_encoders
@pytest.mark.parametrize("negative", ["blue", None])
def test_prompts_are_encoded_apart_from_the_rest(monkeypatch, text, negative):
    alone = make(text, transformer=None, codec=None, scheduler=None)
    with torch.no_grad():
        encoded = alone.encode_prompt(PROMPT, negative)
    named = dict(zip(returned_names(monkeypatch), encoded, strict=True))
    without = make(text, text_encoder=None, tokenizer=None)
    found = sample(without, prompt=None, negative_prompt=None, **named)
    assert torch.equal(found, sample(make(text), negative_prompt=negative))


def test_without_a_text_encoder_what_is_missing_is_named():
    encoded = make().encode_prompt(PROMPT)
    pipeline = make(text_encoder=None)
    with pytest.raises(PipelineError, match="prompt: there is no text encoder"):
        sample(pipeline)
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": encoded[0], "prompt_attention_mask": encoded[1]}
    with pytest.raises(PipelineError, match="negative_prompt_embeds: guidance needs them"):
        sample(pipeline, **given)
    assert torch.equal(sample(pipeline, **given, guidance_scale=1.0), sample(make(), guidance_scale=1.0))


def test_an_encoder_without_its_tokenizer_is_told_so():
    with pytest.raises(PipelineError, match="tokenizer: T5EncoderModel needs one"):
        sample(make("t5", tokenizer=None))


def test_a_pipeline_without_a_usual_size_asks_for_one():
    with pytest.raises(PipelineError, match="height: this pipeline was made without a usual one"):
        sample(make(), height=None)


@both_encoders
def test_a_batch_is_its_singles_whatever_the_length_of_its_prompts(text):
    prompts = [PROMPT, PROMPT[:11], "red " * 100]
    batch = sample(
        make(text),
        prompt=prompts,
        negative_prompt=["blue"] * 3,
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
    )
    for i, prompt in enumerate(prompts):
        single = sample(make(text), prompt=prompt, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(batch[i], single[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompts", [1, 2])
def test_each_prompt_gets_as_many_clips_as_asked_for(prompts):
    clips = sample(make(), prompt=[PROMPT] * prompts, num_videos_per_prompt=2)
    assert len(clips) == 2 * prompts and not torch.equal(clips[0], clips[1])


# --------------------------------------------------------------------------------------------------------- callbacks


def test_a_callback_sees_and_changes_what_it_asks_for():
    pipeline, seen = make(), []

    def blank(pipe, i, timestep, tensors):
        seen.append((i, float(timestep), sorted(tensors)))
        return (
            {name: torch.zeros_like(value) for name, value in tensors.items()}
            if i == pipe.num_timesteps - 1
            else tensors
        )

    every = VideoPipeline._callback_tensor_inputs
    more = {"callback_on_step_end": blank, "output_type": "latent"}
    assert sample(pipeline, **more, callback_on_step_end_tensor_inputs=every).abs().sum() == 0
    assert [i for i, *_ in seen] == [0, 1] and all(names == sorted(every) for *_, names in seen)
    assert sample(pipeline, **more, callback_on_step_end_tensor_inputs=["latents"]).abs().sum() == 0
    assert seen[-1][2] == ["latents"]


def test_a_callback_changes_guidance_from_step_to_step():
    pipeline = make()

    def raise_guidance(pipe, i, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    changed = sample(pipeline, guidance_scale=2.0, callback_on_step_end=raise_guidance)
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps
    assert not torch.equal(changed, sample(pipeline, guidance_scale=2.0))


def test_a_callback_ends_the_steps_of_a_call():
    pipeline, steps = make(), []

    def stop(pipe, i, timestep, tensors):
        steps.append(i)
        pipe._interrupt = i == 1
        return tensors

    latents = []

    def keep(pipe, i, timestep, tensors):
        latents.append(tensors["latents"].clone())
        return tensors

    cut = sample(pipeline, num_inference_steps=4, callback_on_step_end=stop, output_type="latent")
    assert steps == [0, 1] and pipeline.interrupt
    sample(pipeline, num_inference_steps=4, callback_on_step_end=keep, output_type="latent")
    assert len(latents) == 4 and not pipeline.interrupt and torch.equal(cut, latents[1])


# ------------------------------------------------------------------------------------------------------------- hooks


def test_a_cache_that_goes_by_noise_levels_is_told_them():
    pipeline, calls = make(), []
    plain = sample(pipeline, num_inference_steps=6)
    pipeline.transformer.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    config = diffusers.SeaCacheConfig(threshold=100.0, residual_order=0)
    pipeline.transformer.enable_cache(config)
    cached = sample(pipeline, num_inference_steps=6)
    assert 0 < len(calls) < 6 and cached.isfinite().all() and not torch.equal(cached, plain)
    pipeline.transformer.disable_cache()
    assert torch.equal(sample(pipeline, num_inference_steps=6), plain)


def elsewhere(pipeline: VideoPipeline) -> VideoPipeline:
    """Hooked as by enable_sequential_cpu_offload, with the CPU for the device: weights are there only while they are used."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert pipeline.device.type == "meta"
    return pipeline


def image_codec() -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=4
    ).eval()


@pytest.mark.parametrize("codec", [None, Pixels, image_codec], ids=["pca", "pixels", "autoencoder"])
@both_encoders
def test_weights_may_lie_elsewhere_until_they_are_used(text, codec):
    changed = {} if codec is None else {"codec": codec()}
    if codec is not None:
        torch.manual_seed(0)
        channels = 3 if codec is Pixels else 4
        changed["transformer"] = VideoTransformer(channels, (4, 8, 8), width=16, heads=2, depth=2, text_width=8).eval()
    expected = sample(make(text, **changed))
    assert torch.equal(sample(elsewhere(make(text, **changed))), expected)


def test_a_stream_keeps_its_memory_where_it_computes():
    torch.manual_seed(0)
    keys = {"plan": "temporal", "mixers": {"temporal": {"memory": {"kind": "infini", "segment": 1}}}}
    transformer = VideoTransformer(4, (2, 4, 4), width=16, heads=2, depth=1, text_width=8, **keys).eval()
    options = {"transformer": transformer, "objective": {"frame_times": "past"}}
    expected = list(make(**options).stream(**asked(num_frames=8, output_type="latent")))
    found = list(elsewhere(make(**options)).stream(**asked(num_frames=8, output_type="latent")))
    assert len(expected) > 1 and all(map(torch.equal, expected, found))


def test_it_is_a_pipeline_of_diffusers_with_an_order_of_offloading():
    assert issubclass(VideoPipeline, DiffusionPipeline)
    modules = {name for name, part in components("t5").items() if isinstance(part, nn.Module)}
    assert set(VideoPipeline.model_cpu_offload_seq.split("->")) == modules

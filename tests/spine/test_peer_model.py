"""VideoTransformer as diffusers' tools take it: saved forms, processors, adapters, caches, casting and offloading.

Fresh layers are the identity, so that nothing in them shows; the models here have moved weights.
"""

import copy
import functools

import accelerate
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention import AttentionModuleMixin
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from stgen.attention.attend import MixersProcessor, PromptProcessor
from stgen.model import VideoTransformer

GRID = (2, 4, 4)
KINDS = {
    "adaln": {"plan": "spatial temporal"},
    "cross": {"plan": "joint", "conditioning": "cross"},
    "split": {"plan": "spatial|temporal", "conditioning": "both", "positions": "learned"},
    "token": {"plan": "spatial>temporal", "conditioning": "cross", "modulated": False, "registers": 2},
    "reuse": {"plan": "temporal", "mixers": {"temporal": {"reuse": {"what": "kv", "every": 2}}}},
    "output": {"plan": "temporal", "mixers": {"temporal": {"reuse": {"what": "output", "every": 2}}}},
    "sink": {
        "plan": "spatial temporal",
        "mixers": {"spatial": {"sink": {"kind": "logit"}}, "temporal": {"sink": {"kind": "tokens", "count": 2}}},
    },
    "infini": {"plan": "temporal", "mixers": {"temporal": {"memory": {"kind": "infini", "segment": 1}}}},
}
APART = ["to_q", "to_k", "to_v", "to_out"]


def build(kind="adaln", seed=0, **keys) -> VideoTransformer:
    torch.manual_seed(seed)
    keys = {"width": 16, "depth": 2, "heads": 2, "text_width": 8, **KINDS[kind], **keys}
    model = VideoTransformer(4, GRID, **keys).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs(dtype=torch.float32, step=0.0) -> dict:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, *GRID).to(dtype) + step,
        "timestep": torch.tensor([10.0, 600.0]),
        "encoder_hidden_states": torch.randn(2, 5, 8).to(dtype),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool(),
    }


@torch.no_grad()
def out(model, **changes):
    return model(**{**inputs(), **changes}, return_dict=False)[0]


def equal(one, other) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items()) and len(theirs) > 0


every_kind = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------------------------------- saved and loaded


@every_kind
def test_saved_and_loaded_it_computes_the_same(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = VideoTransformer.from_pretrained(tmp_path)
    assert not loaded.training and equal(model, loaded) and torch.equal(out(loaded), out(model))
    again = VideoTransformer.from_config(loaded.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_have_their_own_files(tmp_path, variant):
    model = build()
    size = sum(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(tmp_path, max_shard_size=f"{size // 3 // 1024}KB", variant=variant)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) >= 3 and all(("fp16" in name) == (variant is not None) for name in shards)
    assert sum(len(load_file(tmp_path / name)) for name in shards) == len(model.state_dict())
    assert equal(model, VideoTransformer.from_pretrained(tmp_path, variant=variant))
    if variant is not None:
        with pytest.raises(OSError, match="no file named"):
            VideoTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("frugal", [True, False])
def test_it_is_loaded_in_the_type_asked_for(tmp_path, dtype, frugal):
    build("split").save_pretrained(tmp_path)
    model = VideoTransformer.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=frugal)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.dtype == dtype
    with torch.no_grad():
        found = model(**inputs(dtype)).sample
    assert found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(found.float(), out(build("split")), rtol=0, atol=0.15)


def test_nothing_but_safetensors_is_ever_written(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "whole", safe_serialization=False)
    model.add_adapter(LoraConfig(r=2, target_modules=APART))
    model.save_lora_adapter(tmp_path / "adapter", safe_serialization=False)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_the_parts_that_a_device_map_may_not_cut_are_the_layers():
    names = {type(module).__name__ for module in build("cross").modules()}
    assert set(VideoTransformer._no_split_modules or ()) == set(VideoTransformer._repeated_blocks or ()) <= names


# ------------------------------------------------------------------------------------------------- forward and training


@every_kind
def test_the_tuple_holds_what_the_output_holds_and_a_pass_changes_nothing(kind):
    model = build(kind)
    with torch.no_grad():
        (first,), second = model(**inputs(), return_dict=False), model(**inputs())
    assert torch.equal(first, second.sample) and torch.equal(second["sample"], second[0])
    assert first.shape == (2, 4, *GRID)


@every_kind
def test_recomputed_layers_give_the_same_gradients(kind):
    gradients = []
    for recompute in (False, True):
        model = build(kind).train()
        if recompute:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == recompute
        model(**inputs()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- processors and projections


@every_kind
def test_every_attention_has_a_processor_that_can_be_replaced(kind):
    model = build(kind)
    modules = [m for m in model.modules() if isinstance(m, AttentionModuleMixin)]
    assert len(model.attn_processors) == len(modules) > 0
    assert {type(p) for p in model.attn_processors.values()} <= {MixersProcessor, PromptProcessor}
    expected, calls = out(model), []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, attn, *args):
            calls.append(attn)
            return self.inner(attn, *args)

    model.set_attn_processor({name: Counting(inner) for name, inner in model.attn_processors.items()})  # type: ignore
    assert torch.equal(out(model), expected) and sorted(map(id, calls)) == sorted(map(id, modules))
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(
            {name: MixersProcessor() for name in list(model.attn_processors)[1:]} | {"x": 1, "y": 2}
        )


@every_kind
def test_projections_are_opened_and_packed_again(kind, tmp_path):
    model = build(kind)
    expected, weights = out(model), copy.deepcopy(model.state_dict())
    model.fuse_qkv_projections()  # as they are
    model.unfuse_qkv_projections()
    attentions = [m for m in model.modules() if isinstance(m, AttentionModuleMixin)]
    assert not any(hasattr(m, name) for m in attentions for name in ("to_qkv", "to_kv"))
    assert not any(m.fused_projections for m in attentions)
    torch.testing.assert_close(out(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="fuse_qkv_projections"):
        model.save_pretrained(tmp_path)
    model.fuse_qkv_projections()
    assert torch.equal(out(model), expected)
    found = model.state_dict()
    assert set(found) == set(weights) and all(torch.equal(found[name], weights[name]) for name in weights)


def test_open_projections_fold_norms_as_packed_ones_do():
    keys = {"modulated": False, "norm": {"kind": "batch"}, "conditioning": "cross", "plan": "spatial"}
    packed, opened = build("token", **keys, registers=0), build("token", **keys, registers=0)
    opened.unfuse_qkv_projections()
    torch.testing.assert_close(out(opened.folded()), out(packed.folded()), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ adapters


def lora(rank=4, targets=APART):
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False)


@every_kind
def test_an_adapter_changes_saves_and_comes_back(kind, tmp_path):
    model = build(kind)
    plain = out(model)
    model.add_adapter(lora())
    adapted = out(model)
    assert (adapted - plain).abs().max() > 1e-2
    model.disable_adapters()
    torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-5)
    model.enable_adapters()
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-5)
    fresh = build(kind)
    fresh.load_lora_adapter(tmp_path, prefix=None)
    torch.testing.assert_close(out(fresh), adapted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="carries an adapter"):
        fresh.fuse_qkv_projections()


def test_an_adapter_is_merged_into_a_model_that_is_saved_as_any_other(tmp_path):
    model = build("cross")
    model.add_adapter(lora())
    adapted = out(model)
    model.fuse_lora()
    model.unload_lora()
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(out(VideoTransformer.from_pretrained(tmp_path)), adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ranks", [(4, 4), (3, 6), (6, 3)])
def test_an_adapter_takes_the_place_of_another(tmp_path, ranks):
    expected = []
    for i, rank in enumerate(ranks):
        model = build("cross")
        torch.manual_seed(i)
        model.add_adapter(lora(rank))
        expected.append(out(model))
        model.save_lora_adapter(tmp_path / str(i))
    model = build("cross")
    model.enable_lora_hotswap(target_rank=max(ranks))
    model.load_lora_adapter(tmp_path / "0", prefix=None, adapter_name="one")
    torch.testing.assert_close(out(model), expected[0], rtol=0, atol=1e-5)
    model.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="one", hotswap=True)
    torch.testing.assert_close(out(model), expected[1], rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        model.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="two", hotswap=True)


def test_two_adapters_are_weighed():
    model = build("cross")
    plain = out(model)
    for name in ("one", "two"):
        model.add_adapter(lora(), adapter_name=name)
    two = out(model)  # the last one added is at work
    model.set_adapters(["one", "two"], [0.0, 0.0])
    torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-5)
    model.set_adapters(["one", "two"], [0.0, 1.0])
    torch.testing.assert_close(out(model), two, rtol=0, atol=1e-5)
    assert (two - plain).abs().max() > 1e-2
    model.delete_adapters("one")
    assert list(model.peft_config) == ["two"]


def test_an_adapter_on_the_packed_layer_leaves_it_packed():
    model = build()
    model.add_adapter(lora(targets=["to_qkv"]))
    assert all(m.fused_projections for m in model.modules() if isinstance(m, AttentionModuleMixin))
    with pytest.raises(ValueError, match="to_qkv carries an adapter"):
        model.unfuse_qkv_projections()


# --------------------------------------------------------------------------------------------------------------- caches

NOW = {"timestep": 500}
CACHES = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=1e9),
    "mag": lambda: MagCacheConfig(num_inference_steps=2, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0]),
    "taylorseer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "sea": lambda: SeaCacheConfig(threshold=100.0, residual_order=0, retention_steps=0, cache_end_steps=0),
    "pab": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: NOW["timestep"]
    ),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        tensor_format="BCHW",
        current_timestep_callback=lambda: NOW["timestep"],
    ),
}


def hooked(model) -> int:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return sum(len(registry.hooks) for registry in registries if registry is not None)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_hooks_in_saves_work_and_leaves(name):
    model, later = build("cross"), {"hidden_states": inputs(step=0.1)["hidden_states"]}
    plain, before, calls = out(model, **later), hooked(model), []
    assert not model.is_cache_enabled
    model.enable_cache(CACHES[name]())
    assert model.is_cache_enabled and hooked(model) > before
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(CACHES[name]())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [linear.register_forward_hook(lambda *call: calls.append(call[-1].numel())) for linear in linears]
    NOW["timestep"] = 1000 if name == "faster" else 500
    where = functools.partial(model.cache_context, "one", num_inference_steps=3)
    with where(step_index=0, sigma=0.9):
        first = out(model)
    whole = sum(calls)
    NOW["timestep"] = 500
    with where(step_index=1, sigma=0.6):
        second = out(model, **later)
    for handle in handles:
        handle.remove()
    assert 0 < sum(calls) - whole < whole and second.isfinite().all() and not torch.allclose(second, plain, atol=1e-5)
    if name != "faster":  # it goes by the number of calls, whatever the context
        with model.cache_context("two", step_index=0, sigma=0.9, num_inference_steps=3):
            torch.testing.assert_close(out(model), first, rtol=0, atol=1e-5)
    model._reset_stateful_cache()
    model.disable_cache()
    assert not model.is_cache_enabled and hooked(model) == before and torch.equal(out(model, **later), plain)


# ---------------------------------------------------------------------------------------------- casting and offloading


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_weights_are_stored_small_and_computed_with_large(storage):
    model = build("cross", depth=3).to(torch.bfloat16)
    whole = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.bfloat16)
    assert (model.get_memory_footprint() < whole) == (storage.itemsize == 1)
    model.train()
    loss = model(**inputs(torch.bfloat16)).sample.float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.blocks.parameters())


@every_kind
def test_weights_may_lie_elsewhere_between_calls_of_their_modules(kind):
    """What each module reads of its own it reads when it is called: only then does offloading bring it to the device."""
    expected, model = out(build(kind)), build(kind)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(out(model), expected)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_projections_that_lie_elsewhere_stay_packed():
    model = build()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"to_qkv is offloaded.*before\s+enable_sequential_cpu_offload"):
        model.unfuse_qkv_projections()
    assert torch.equal(out(model), out(build()))


@pytest.mark.parametrize("trained", [True, False])
def test_opened_and_packed_again_frozen_weights_stay_frozen(trained):
    model = build("cross").requires_grad_(trained)
    for change in (model.unfuse_qkv_projections, model.fuse_qkv_projections):
        change()
        assert {p.requires_grad for p in model.parameters()} == {trained}


@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@pytest.mark.parametrize("to_disk", [False, True])
def test_groups_of_layers_are_offloaded(tmp_path, options, to_disk):
    expected, model = out(build("token")), build("token")
    disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
    model.enable_group_offload(torch.device("cpu"), **options, **disk)
    assert torch.equal(out(model), expected)
    assert bool(list(tmp_path.glob("*.safetensors"))) == to_disk


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
def test_layers_compile_without_a_break_and_once_for_all():
    """`joint`, so that all layers are alike; every other mixer is one more graph."""
    model = build("cross", depth=4)
    expected = out(model)
    model.compile_repeated_blocks(fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(out(model), expected, rtol=0, atol=1e-5)

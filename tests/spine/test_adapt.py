"""stgen.adapt on small randomly initialised models of diffusers' Wan, LTX, CogVideoX, HunyuanVideo and Latte classes.

The oracle of a sparse adaptation is the same model in float64 with its one call of scaled dot-product attention
replaced by a softmax over every pair of tokens under a dense mask, in which the prompt's tokens see all and are seen.
"""

import copy

import diffusers
import pytest
import torch
from foreign import FOREIGN, Foreign
from torch import nn

import stgen
from stgen.adapters import Adaptation, AdaptError
from stgen.tokens import Grid, coordinates

every_class = pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: f.name)
packed = pytest.mark.parametrize("foreign", [f for f in FOREIGN if f.text], ids=lambda f: f.name)
WAN = FOREIGN[0]
LATTE = FOREIGN[-1]
SPARSE = "{pattern: [{kind: local, radius: 1}, {kind: global, frames: 1}], block: [1, 2, 2], order: tile}"


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def relative(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    """Nothing inside a float64 model is rounded to float32 on the way, as norms and time embeddings do."""

    def exact(x, *args, **kwargs):
        return x.double() if torch.get_default_dtype() == torch.float64 else x.to(torch.float32)

    monkeypatch.setattr(torch.Tensor, "float", exact)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------------ oracles


def near(radius: int, frames: int):
    """local of that radius, or one of the two in the first frames."""

    def allows(where):  # [n, 3]
        close = ((where[:, None] - where[None]).abs() <= radius).all(-1)
        first = where[:, 0] < frames
        return close | first[:, None] | first[None]

    return allows


def with_text(mask: torch.Tensor, foreign: Foreign) -> torch.Tensor:
    """A mask of the video's tokens with the prompt's, which see all and are seen by all."""
    n, text = len(mask), foreign.text
    whole = torch.ones(n + text, n + text, dtype=torch.bool)
    video = slice(text, None) if foreign.text_first else slice(0, n)
    whole[video, video] = mask
    return whole


def dense(monkeypatch, masks: dict[int, torch.Tensor], logit: float | None = None):
    """Self-attention by every pair of tokens, under the mask for sequences of that length; returns the calls made."""
    own, calls = nn.functional.scaled_dot_product_attention, []

    def attend(query, key, value, attn_mask=None, **options):
        mask = masks.get(query.shape[2]) if query.shape[2] == key.shape[2] else None
        if mask is None:
            return own(query, key, value, attn_mask=attn_mask, **options)
        calls.append(query.shape[2])
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mask = mask if attn_mask is None else mask & attn_mask
        weights = scores.masked_fill(~mask, -torch.inf).exp()
        mass = weights.sum(-1, keepdim=True) + (0 if logit is None else torch.tensor(logit).exp())
        return weights / mass @ value

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    return calls


def masks_of(foreign: Foreign, allows) -> dict[int, torch.Tensor]:
    """The dense mask of each length of sequence in the model."""
    grid = foreign.grid
    if foreign.name == "latte":
        grids = [Grid(1, grid.h, grid.w), Grid(grid.t, 1, 1)]
        return {g.tokens: allows(coordinates(g)) for g in grids}
    return {grid.tokens + foreign.text: with_text(allows(coordinates(grid)), foreign)}


# --------------------------------------------------------------------------------------------------------------- laws


@every_class
def test_full_attention_changes_nothing_beyond_rounding_and_restore_nothing_at_all(foreign):
    model, inputs = foreign.model(), foreign.inputs()
    own = run(model, inputs)
    adaptation = stgen.adapt(model, {})
    assert relative(run(model, inputs), own) <= 1e-5
    adaptation.restore()
    assert torch.equal(run(model, inputs), own)
    assert not any(isinstance(m, stgen.adapters.Adapted) for m in model.modules())


@every_class
def test_a_sparse_pattern_is_the_dense_masked_attention_of_the_same_model(foreign, float64, monkeypatch):
    model, inputs = foreign.model(float64), foreign.inputs(float64)
    own = run(model, inputs)
    adaptation = stgen.adapt(model, SPARSE)
    ours = run(model, inputs)
    adaptation.restore()
    calls = dense(monkeypatch, masks_of(foreign, near(1, 1)))
    theirs = run(model, inputs)
    assert len(calls) == (4 if foreign is LATTE else 2)
    assert relative(ours, theirs) <= 1e-9 < 1e-3 < relative(ours, own)


LAYOUTS = {
    "spatial": ("spatial", lambda w: w[:, None, 0] == w[None, :, 0]),
    "temporal": ("temporal", lambda w: (w[:, None, 1:] == w[None, :, 1:]).all(-1)),
    "window": ("{layout: window, size: [2, 2, 3]}", lambda w: _same_window(w, (2, 2, 3))),
}


def _same_window(where, size):
    box = where // torch.tensor(size)
    return (box[:, None] == box[None]).all(-1)


@pytest.mark.parametrize("name", ["spatial", "temporal", "window"])
@pytest.mark.parametrize("foreign", FOREIGN[:4], ids=lambda f: f.name)
def test_layouts_are_masks_of_joint_attention(foreign, name, float64, monkeypatch):
    spec, allows = LAYOUTS[name]
    model, inputs = foreign.model(float64), foreign.inputs(float64)
    adaptation = stgen.adapt(model, spec)
    ours = run(model, inputs)
    adaptation.restore()
    dense(monkeypatch, masks_of(foreign, allows))
    assert relative(ours, run(model, inputs)) <= 1e-9


@every_class
def test_a_learned_sink_takes_mass_from_every_token(foreign, float64, monkeypatch):
    model, inputs = foreign.model(float64), foreign.inputs(float64)
    adaptation = stgen.adapt(model, "{pattern: {kind: local, radius: 1}, sink: {kind: logit, value: 0.7}}")
    ours = run(model, inputs)
    adaptation.restore()
    dense(monkeypatch, masks_of(foreign, near(1, 0)), logit=0.7)
    assert relative(ours, run(model, inputs)) <= 1e-9


ROOMS = [
    "{normaliser: linear}",
    "{normaliser: linear, pattern: causal, sink: tokens}",
    "{normaliser: {kind: linear, features: favor}}",
    "{normaliser: relu, pattern: {kind: local, radius: 1}}",
    "{normaliser: poly_logits, sink: {kind: tokens, count: 2}}",
    "{pattern: {kind: topk, ratio: 0.5}, block: [1, 2, 2], order: tile}",
    "{pattern: {all: [causal, {kind: strided, stride: 2}]}, sink: {kind: tokens, count: 2}}",
    "{approximate: {qk_topk: 4, quantise: [q, k, v]}}",
    "{layout: window, size: [2, 2, 2], shift: [1, 1, 1], order: tile, block: [2, 2, 2]}",
    '{heads: {"0": {pattern: {kind: local, radius: 1}}, "1": {normaliser: linear}}}',
]


@pytest.mark.parametrize("spec", ROOMS)
@packed
def test_the_prompt_in_a_sequence_is_like_tokens_that_every_video_token_sees(foreign, spec, float64):
    """A video token's output depends on every place of the prompt that is shown, in every room, and on none that is not."""
    model, inputs = foreign.model(float64), foreign.inputs(float64)
    stgen.adapt(model, spec)
    first = run(model, inputs)
    assert first.isfinite().all()
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
    inputs["encoder_hidden_states"][0, 1] += 1
    shown = run(model, inputs)
    assert ((shown[0] - first[0]).abs().flatten(2 if foreign.name == "hunyuan" else 1).amax(-1) > 0).all()
    if foreign.name == "hunyuan":
        inputs["encoder_hidden_states"][0, 4] += 1  # masked
        assert relative(run(model, inputs), shown) <= 1e-12


@pytest.mark.parametrize("spec", ROOMS)
def test_every_room_trains_where_the_prompt_stands_apart(spec, float64):
    model, inputs = WAN.model(float64), WAN.inputs(float64)
    adaptation = stgen.adapt(model, spec)
    inputs["hidden_states"].requires_grad_()
    model(**inputs)[0].square().sum().backward()
    assert inputs["hidden_states"].grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adaptation.parameters())


@packed
def test_clips_do_not_see_each_other(foreign, float64):
    model, inputs = foreign.model(float64), foreign.inputs(float64)
    stgen.adapt(model, SPARSE)
    together = run(model, inputs)
    alone = {k: v[:1] if isinstance(v, torch.Tensor) and k != "image_rotary_emb" else v for k, v in inputs.items()}
    assert relative(run(model, alone)[0], together[0]) <= 1e-12


def test_the_grid_is_read_anew_at_every_call(float64, monkeypatch):
    model, inputs = WAN.model(float64), WAN.inputs(float64)
    adaptation = stgen.adapt(model, SPARSE)
    run(model, inputs)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :2, :4]
    ours = run(model, inputs)
    adaptation.restore()
    dense(monkeypatch, {20: near(1, 1)(coordinates(Grid(2, 2, 5)))})
    assert relative(ours, run(model, inputs)) <= 1e-9


def test_layers_may_differ_and_those_not_named_stay_as_they_are():
    model, inputs = WAN.model(), WAN.inputs()
    own = model.blocks[0].attn1.processor
    adaptation = stgen.adapt(model, {"1-": {"pattern": {"kind": "local", "radius": 1}}})
    assert model.blocks[0].attn1.processor is own and list(adaptation.heads) == ["1"]
    last = run(model, inputs)
    adaptation.restore()
    stgen.adapt(model, '{"0": {}, "1": {pattern: {kind: local, radius: 1}}}')
    assert relative(run(model, inputs), last) <= 1e-5


# ----------------------------------------------------------------------------------------------------------- training


@every_class
def test_gradients_are_those_of_the_masked_model_and_gradient_checkpointing_changes_none(foreign, float64, monkeypatch):
    model, inputs = foreign.model(float64).train(), foreign.inputs(float64)
    adaptation = stgen.adapt(model, SPARSE)

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    model.disable_gradient_checkpointing()
    adaptation.restore()
    dense(monkeypatch, masks_of(foreign, near(1, 1)))
    theirs = gradients()
    assert plain.keys() == again.keys() == theirs.keys() and len(plain) > 20
    for name, gradient in theirs.items():
        scale = 1e-9 * max(1.0, float(gradient.abs().max()))
        assert (plain[name] - gradient).abs().max() <= scale, name
        assert (again[name] - gradient).abs().max() <= scale, name


def test_blocks_run_again_on_the_grid_of_their_own_pass(float64):
    """Two clips of as many tokens and another shape, before one backward pass."""
    model, first = WAN.model(float64).train(), WAN.inputs(float64)
    second = {**first, "hidden_states": first["hidden_states"].transpose(3, 4).contiguous()}
    adaptation = stgen.adapt(model, "{pattern: {kind: local, radius: 1}}")

    def gradients():
        model.zero_grad()
        sum(model(**inputs)[0].square().sum() for inputs in (first, second)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(relative(again, own) <= 1e-9 for again, own in zip(gradients(), plain, strict=True))
    own = model._gradient_checkpointing_func.own
    adaptation.restore()
    assert model._gradient_checkpointing_func is own


@pytest.mark.parametrize("spec", ["{sink: logit}", "{sink: tokens}", "{normaliser: {kind: linear, features: learned}}"])
def test_learned_parts_of_a_model_in_half_precision_stay_exact(spec):
    model = WAN.model(torch.bfloat16)
    adaptation = stgen.adapt(model, spec)
    model(**WAN.inputs(torch.bfloat16))[0].float().square().mean().backward()
    assert {(p.dtype, p.grad is None) for p in adaptation.parameters()} == {(torch.float32, False)}


def test_learned_parts_are_trained_saved_and_loaded(tmp_path):
    model, inputs = WAN.model().train(), WAN.inputs()
    model.requires_grad_(False)
    adaptation = stgen.adapt(model, "{pattern: {kind: local, radius: 1}, sink: logit}")
    names = [name for name, _ in adaptation.named_parameters()]
    assert names == [f"heads.{i}.0.sink.learned_logit" for i in (0, 1)]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{i}.attn1.processor.heads.0.sink.learned_logit" for i in (0, 1)
    ]
    optimizer = torch.optim.SGD(adaptation.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs)[0].square().mean().backward()
        optimizer.step()
    assert all(p.abs().max() > 0 for p in adaptation.parameters())
    trained = run(model, inputs)
    adaptation.save_pretrained(tmp_path / "sparse")
    fresh = WAN.model().train()
    again = stgen.adapt(fresh, tmp_path / "sparse")
    assert torch.equal(run(fresh, inputs), trained)
    assert again.keys == adaptation.keys


def test_a_saved_model_loads_without_the_adaptation_and_its_processors_take_their_weights_back(tmp_path):
    model, inputs = WAN.model(), WAN.inputs()
    own = run(model, inputs)
    adaptation = stgen.adapt(model, "{sink: {kind: logit, value: 1.5}}")
    ours = run(model, inputs)
    model.save_pretrained(tmp_path)
    plain = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(plain, inputs), own)
    stgen.adapt(plain, "{sink: logit}").load_state_dict(adaptation.state_dict())
    assert torch.equal(run(plain, inputs), ours)


def test_a_copy_is_adapted_by_itself():
    model, inputs = WAN.model(), WAN.inputs()
    adaptation = stgen.adapt(model, "{pattern: {kind: local, radius: 1}}")
    twin = copy.deepcopy(model)
    ours = run(model, inputs)
    smaller = {**inputs, "hidden_states": inputs["hidden_states"][:, :, :2]}
    run(model, smaller)
    assert torch.equal(run(twin, inputs), ours)
    adaptation.restore()
    assert torch.equal(run(twin, inputs), ours) and not torch.equal(run(model, inputs), ours)


@every_class
def test_lora_and_adaptation_go_together(foreign):
    model, inputs = foreign.model().train(), foreign.inputs()
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    adaptation = stgen.adapt(model, "{pattern: {kind: local, radius: 1}, sink: logit}")
    before = run(model, inputs)
    if hasattr(model, "add_adapter"):
        model.add_adapter(lora)
    else:  # diffusers gives Latte no adapters; peft does
        peft.inject_adapter_in_model(lora, model)
    assert relative(run(model, inputs), before) > 1e-3
    adaptation.requires_grad_(True)  # peft has frozen all but its own
    model(**inputs)[0].square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_A" in name for name in trained) and any("learned_logit" in name for name in trained)
    assert all("lora_" in name or "learned_logit" in name for name in trained)
    adaptation.restore()
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_numbers_follow_the_steps_of_training():
    model, inputs = WAN.model(), WAN.inputs()
    adaptation = stgen.adapt(model, "{pattern: {kind: topk, ratio: {kind: linear, start: 1, end: 0.2, steps: 10}}}")
    first = run(model, inputs)
    adaptation.at_step(10)
    assert relative(run(model, inputs), first) > 1e-3


# ----------------------------------------------------------------------------------------------------------- refusals


def told(model, spec, **options) -> str:
    with pytest.raises(AdaptError) as error:
        stgen.adapt(model, spec, **options)
    assert "\n" not in str(error.value)
    assert not any(isinstance(m, stgen.adapters.Adapted) for m in model.modules())
    return str(error.value)


def test_a_class_without_anatomy_is_refused_by_name():
    said = told(nn.Linear(1, 1), {})
    assert said.startswith("Linear: ") and all(type(f.model()).__name__ in said for f in FOREIGN)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"layuot": "joint"}, ["spec", "layuot", "layout"]),
        ({"pattern": "locl"}, ["locl", "local"]),
        ({"0-": {"sink": {"kind": "logit", "value": "x"}}}, ["spec.0-", "sink", "value"]),
        ({"0-5": {}}, ['"0-5"'.replace('"', "'"), "2 layers"]),
        ({"0-1": {}, "1": {}}, ["'1'", "layer 1"]),
        ({"0": {}, "a": {}}, ["a"]),
        ("{layout: joint", ["YAML"]),
        ({"kind": "tcn"}, ["kind"]),
        ({"reuse": {"what": "kv"}}, ["layer 0", "reuse"]),
        ({"memory": {"kind": "infini", "segment": 1}}, ["layer 0", "memory"]),
        ({"pattern": "linformer"}, ["linformer", "grid=("]),
        ({"heads": {"7": {"sink": "logit"}}}, ["layer 0", "head 7"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(spec, words):
    said = told(WAN.model(), spec)
    assert all(word in said for word in words), said


def test_latte_refuses_layouts_that_its_sequences_do_not_have():
    assert "layer 0" in told(LATTE.model(), "temporal")
    assert "layer 1" in told(LATTE.model(), {"1": {"layout": "spatial"}})
    stgen.adapt(LATTE.model(), {"0": "spatial", "1": "temporal", "2": "width"})


def test_patterns_with_keys_of_their_own_need_the_prompt_apart():
    spec = {"pattern": {"kind": "linformer", "keys": 4}}
    assert "prompt" in told(FOREIGN[2].model(), spec, grid=(3, 3, 5))
    model, inputs = WAN.model(), WAN.inputs()
    adaptation = stgen.adapt(model, spec, grid=(3, 3, 5))
    assert run(model, inputs).isfinite().all() and isinstance(adaptation, Adaptation)


def test_twice_is_refused_and_another_processor_is_noticed():
    model, inputs = WAN.model(), WAN.inputs()
    adaptation = stgen.adapt(model, {})
    with pytest.raises(AdaptError, match=r"restore\(\)"):
        stgen.adapt(model, {})
    model.blocks[1].attn1.set_processor(adaptation._own[0][1])
    with pytest.raises(AdaptError, match="layer 1"):
        run(model, inputs)


def test_a_backend_of_diffusers_does_not_pass_stgen_by():
    model, inputs = WAN.model(), WAN.inputs()
    stgen.adapt(model, "{pattern: {kind: local, radius: 1}}")
    ours = run(model, inputs)
    with diffusers.models.attention_dispatch.attention_backend("_native_math"):
        assert relative(run(model, inputs), ours) <= 1e-5


def test_a_processor_with_another_attention_is_noticed():
    class Other:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    model, inputs = WAN.model(), WAN.inputs()
    model.blocks[0].attn1.set_processor(Other())
    stgen.adapt(model, {})
    with pytest.raises(AdaptError, match=r"Other called .* 0 times"):
        run(model, inputs)


def test_ltx_needs_the_size_of_the_clip():
    model, inputs = FOREIGN[1].model(), FOREIGN[1].inputs()
    stgen.adapt(model, {})
    del inputs["height"]
    with pytest.raises(AdaptError, match="num_frames, height and width"):
        run(model, inputs)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"layers": {"0": {"sink": {"kind": "logit"}}}, "grid": null}',
        '{"layers": "{}", "grid": null}',
        '{"layers": {}, "grid": 3}',
        '{"layers": {}, "grid": [1, 2]}',
        '{"layers": {}, "grid": [1, 2, "x"]}',
    ],
)
def test_a_folder_that_holds_no_adaptation_is_refused(tmp_path, content):
    (tmp_path / "stgen_attention.json").write_text(content)
    said = told(WAN.model(), tmp_path)
    assert str(tmp_path) in said
    (tmp_path / "stgen_attention.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert str(tmp_path) in told(WAN.model(), tmp_path)

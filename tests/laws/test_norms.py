"""Laws of the norms that become linear: definitions, averages, the way of gamma, folding, one norm over many processes."""

import copy
from pathlib import Path

import pytest
import torch
from norm_process import norm64, normed_twice, work, x64
from pydantic import ValidationError
from torch import nn

from stgen import config, ema, schema
from stgen.build import build_parts, load_pipeline
from stgen.lab import study
from stgen.model import VideoTransformer
from stgen.norm_spec import BatchNorm, PRepBN
from stgen.norms import FoldError, ProgressiveNorm, build, recomputing
from stgen.tokens import Grid
from stgen.train import train

GRID = (2, 3, 4)
FALL = {"kind": "linear", "start": 1.0, "end": 0.0, "steps": 4}
BATCH, PREPBN, FROM_ONE = {"kind": "batch"}, {"kind": "prepbn", "gamma": 0.0}, {"kind": "prepbn", "gamma": FALL}


# ---------------------------------------------------------------------------------------------------------- the norms


def test_batch_norm_is_that_of_torch_in_values_gradients_and_averages():
    ours, theirs = norm64({**BATCH, "momentum": 0.2}), nn.BatchNorm1d(5, momentum=None).double()
    theirs.load_state_dict({"weight": ours.weight.data, "bias": ours.bias.data}, strict=False)
    for step in range(5):  # of which the averages are even ones
        x, y = (3 * x64(2, 7, 5, seed=step) + 1).requires_grad_(), (3 * x64(2, 7, 5, seed=step) + 1).requires_grad_()
        out, expected = ours(x), theirs(y.flatten(0, 1)).unflatten(0, (2, 7))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        weights = x64(2, 7, 5, seed=99)
        found = torch.autograd.grad((out * weights).sum(), (x, ours.weight, ours.bias))
        wanted = torch.autograd.grad((expected * weights).sum(), (y, theirs.weight, theirs.bias))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.variance, theirs.running_var, rtol=0, atol=1e-12)
    theirs.momentum = 0.2
    for step in range(5, 9):  # from then on they forget
        ours(x64(2, 7, 5, seed=step))
        theirs(x64(2, 7, 5, seed=step).flatten(0, 1))
    torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.variance, theirs.running_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keys", [BATCH, PREPBN, {"kind": "prepbn", "gamma": 0.3}])
def test_evaluation_uses_the_averages_and_moves_none(keys):
    norm = norm64(keys)
    for seed in range(3):
        norm(2 * x64(3, 4, 5, seed=seed) - 1)
    trained, state = norm(x64(1, 6, 5)), copy.deepcopy(norm.state_dict())
    norm.eval()
    whole = norm(x64(1, 6, 5))
    assert (whole - trained).abs().max() > 1e-2
    torch.testing.assert_close(
        torch.cat([norm(x64(1, 6, 5)[:, i : i + 1]) for i in range(6)], 1), whole, rtol=0, atol=1e-12
    )
    after = norm.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_prepbn_by_hand(gamma, training):
    norm = norm64({"kind": "prepbn", "gamma": gamma})
    norm(x64(4, 3, 5, seed=1) + 2)
    norm.train(training)
    x = 2 * x64(2, 6, 5) + 1
    mean, variance = (
        (x.mean((0, 1)), x.var((0, 1), correction=0)) if training else (norm.batch.mean, norm.batch.variance)
    )
    batch = (x - mean) / (variance + 1e-5).sqrt() * norm.batch.weight + norm.batch.bias
    centred = x - x.mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.layer.weight + norm.layer.bias
    expected = gamma * layer + (1 - gamma) * (batch + norm.eta * x)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    assert norm.eta.shape == ()


def test_gamma_goes_its_way_and_is_saved_with_the_weights():
    norm = build(PRepBN(gamma=FALL), 5)
    seen = []
    for step in range(6):
        norm.numbers.at_step(step)
        seen.append(norm.gamma)
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0] and norm.numbers.measured == {"gamma": 0.0}
    again = build(PRepBN(gamma=FALL), 5)
    assert again.gamma == 1.0
    again.load_state_dict(norm.state_dict())
    assert again.gamma == 0.0


def test_numbers_of_few_bits_are_normed_in_float32():
    norm = build(BatchNorm(), 5).bfloat16()
    x = (x64(2, 50, 5) + 30).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = x.double()
    expected = (exact - exact.mean((0, 1))) / exact.var((0, 1), correction=0).sqrt()
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------------------- many processes


def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    keys, cuts = {"kind": "prepbn", "gamma": 0.4}, [3, 2]
    torch.multiprocessing.spawn(work, (str(tmp_path / "meet"), keys, cuts, str(tmp_path / "rank")), nprocs=2)
    parts = [torch.load(tmp_path / f"rank-{rank}") for rank in range(2)]
    whole, gradients, buffers = normed_twice(norm64(keys), x64(5, 4, 5) * 2 + 1, x64(5, 4, 5, seed=3))
    for name, tensor in whole.items():
        torch.testing.assert_close(torch.cat([part[0][name] for part in parts]), tensor, rtol=0, atol=1e-11)
    for name, tensor in gradients.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), tensor, rtol=0, atol=1e-11)
    for name, tensor in buffers.items():
        torch.testing.assert_close(parts[0][2][name], tensor, rtol=0, atol=1e-11)
        assert torch.equal(parts[0][2][name], parts[1][2][name])


# ------------------------------------------------------------------------------------------------------------ the model

MIXERS = {
    "win": {"kind": "attention", "layout": "window", "size": [2, 2, 2], "shift": [1, 1, 1]},
    "local": {"kind": "attention", "layout": "joint", "pattern": {"kind": "local", "radius": 1}},
    "last": {"kind": "attention", "layout": "joint", "reuse": {"what": "output", "every": 2}},
}


def model_of(plan="spatial temporal", **changes):
    torch.manual_seed(0)
    keys = dict(in_channels=3, grid=GRID, width=32, depth=2, heads=4, plan=plan, text_width=8, mixers=MIXERS)
    return VideoTransformer(**{**keys, "modulated": False, **changes})


def inputs(dtype=torch.float32, seed=0):
    text, mask = x64(2, 5, 8, seed=seed + 1).to(dtype), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    return x64(2, 3, *GRID, seed=seed).to(dtype), torch.tensor([100.0, 900.0]), text, mask


def trained(model, steps=3, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        model.at_step(step)
        latents, t, text, mask = inputs(model.dtype, seed=10 * step)
        optimizer.zero_grad()
        (model(latents, t, text, mask).sample - latents.flip(-1)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("norm", [None, BATCH, FROM_ONE], ids=["layer", "batch", "prepbn"])
@pytest.mark.parametrize(
    ("conditioning", "placement"), [("adaln", "sequential"), ("cross", "sequential"), ("both", "parallel")]
)
@pytest.mark.parametrize("plan", ["spatial temporal", "spatial>win", "height+width", "gru>local|joint"])
def test_without_modulation_blocks_start_as_identity_and_every_weight_moves(plan, conditioning, placement, norm):
    model = model_of(plan, norm=norm, mlp_placement=placement, conditioning=conditioning, registers=1)
    x = torch.randn(2, 2 + 24, 32)
    for block in model.blocks:
        out = block(x, Grid(*GRID), None, None, torch.randn(2, 5, 32), torch.ones(2, 5).bool(), {})
        out = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(out, x, rtol=0, atol=0)
    trained(model, steps=2)
    dead = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead


@pytest.mark.parametrize("norm", [BATCH, FROM_ONE], ids=["batch", "prepbn"])
def test_under_modulation_the_norm_of_the_prompt_moves_too(norm):
    model = trained(model_of(modulated=True, conditioning="cross", norm=norm), steps=2)
    dead = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead and sum("prompting.norm" in name for name, _ in model.named_parameters()) >= 4


@pytest.mark.parametrize("conditioning", ["adaln", "cross", "both"])
def test_time_and_prompt_reach_the_output_without_modulation(conditioning):
    model = trained(model_of(conditioning=conditioning, norm=BATCH)).eval()
    latents, t, text, mask = inputs()
    expected = model(latents, t, text, mask).sample
    assert (model(latents, t.flip(0), text, mask).sample - expected).abs().max() > 1e-4
    assert (model(latents, t, text + 1, mask).sample - expected).abs().max() > 1e-4
    poisoned = text.masked_fill(~mask.unsqueeze(-1), 1e3)
    torch.testing.assert_close(model(latents, t, poisoned, mask).sample, expected, rtol=0, atol=1e-5)
    one = model(latents[:1], t[:1], text[:1], mask[:1]).sample
    torch.testing.assert_close(one, expected[:1], rtol=0, atol=1e-5)  # in evaluation a clip does not see its neighbours
    with pytest.raises(ValueError, match="needs registers: 0 and modulation: adaln"):
        model(latents, torch.full((2, 2), 500.0), text, mask)


@pytest.mark.parametrize("norm", [BATCH, PREPBN], ids=["batch", "prepbn"])
@pytest.mark.parametrize(
    "changes",
    [
        {"plan": "spatial>win local|joint", "conditioning": "both", "registers": 2},
        {"plan": "height+width gru>joint", "mlp_placement": "parallel", "conditioning": "cross"},
        {"plan": "lstm+last>rnn", "depth": 3, "mlp_placement": "parallel"},
        {"modulated": True, "conditioning": "cross"},
    ],
    ids=lambda changes: changes.get("plan", "adaln"),
)
def test_a_folded_model_has_no_norm_and_the_same_outputs(changes, norm, tmp_path):
    model = trained(model_of(norm=norm, **changes), steps=6).eval()
    expected, state = model(*inputs()).sample, copy.deepcopy(model.state_dict())
    folded = model.folded()
    torch.testing.assert_close(folded(*inputs()).sample, expected, rtol=0, atol=1e-5)
    assert not [m for m in folded.modules() if isinstance(m, ProgressiveNorm | nn.LayerNorm) or hasattr(m, "batches")]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    exact = copy.deepcopy(model).double()
    torch.testing.assert_close(
        exact.folded()(*inputs(torch.float64)).sample, exact(*inputs(torch.float64)).sample, rtol=0, atol=1e-12
    )
    folded.save_pretrained(tmp_path)
    again = VideoTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(again(*inputs()).sample, folded(*inputs()).sample, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm": {"kind": "prepbn", "gamma": 0.2}}, "gamma is 0.2, and only at 0"),
        ({"norm": FROM_ONE}, "gamma is 1, and only at 0"),
        ({}, "a layer norm depends on each token"),
        ({"modulated": True}, "a layer norm depends on each token"),
        ({"norm": BATCH, "plan": "tcn>joint"}, r"tcn \(tcn\) carries its input along"),
    ],
)
def test_what_cannot_be_folded_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(FoldError, match=sentence) as caught:
        model_of(**changes).folded()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", [BATCH, {"kind": "prepbn", "gamma": 0.5}], ids=["batch", "prepbn"])
def test_gradient_checkpointing_counts_no_batch_twice(norm):
    found = []
    for recompute in (False, True):
        model = model_of("spatial>win local|joint", norm=norm, conditioning="both")
        if recompute:
            model.enable_gradient_checkpointing()
        trained(model, steps=3)
        found.append({**dict(model.named_buffers()), **{name: p.grad for name, p in model.named_parameters()}})
    assert not recomputing()
    batches = [tensor for name, tensor in found[0].items() if name.endswith("batches")]
    assert batches and all(int(tensor) == 3 for tensor in batches)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-6)


def test_save_and_load_keep_gamma_and_averages(tmp_path):
    model = trained(model_of(norm=FROM_ONE, conditioning="both"), steps=3).eval()
    model.save_pretrained(tmp_path)
    again = VideoTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(again(*inputs()).sample, model(*inputs()).sample, rtol=0, atol=0)
    gammas = [m.gamma for m in again.modules() if isinstance(m, ProgressiveNorm)]
    assert set(gammas) == {0.5} and len(gammas) == 7


def test_the_study_of_norms_names_what_it_varies():
    base, *cells = study.load(Path("configs/ablations/norms.yaml"), [])
    kinds = [(cell.cfg.model.modulation, cell.cfg.text.conditioning, cell.cfg.model.norm.kind) for cell in cells]
    assert kinds == [("none", "adaln", kind) for kind in ("layer", "batch", "prepbn")] + [
        ("adaln", "cross", kind) for kind in ("layer", "prepbn")
    ]
    for cell in cells:
        changed = {key.partition(": ")[0] for key in config.differences(base.cfg, cell.cfg)}
        assert all(key.startswith(tuple(cell.changes)) for key in changed)


# ---------------------------------------------------------------------------------------------------------------- a run

TINY = [
    "data.num_frames=4", "data.height=16", "data.width=16", "data.shapes.clips=24", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,8,8]", "codec.components=6", "codec.fit_clips=8", "text.width=16", "text.conditioning=both",
    "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=4", "optim.lr_warmup_steps=2",
    "validation.steps=2", "validation.num_inference_steps=2", "log.every=1", "log.wandb=disabled",
    "checkpoint.total_limit=99", "train.max_train_steps=6", "model.modulation=none",
    "model.norm={kind: prepbn, gamma: {kind: linear, start: 1, end: 0, steps: 5}}",
]  # fmt: skip


def make(tmp_path, *overrides, folder="run") -> schema.Config:
    path = tmp_path / "tiny.yaml"
    path.write_text("{}\n")
    return config.load(path, [*TINY, f"run.output_dir={tmp_path / folder}", *overrides], schema.Config)


def norms_of(module) -> list[ProgressiveNorm]:
    return [m for m in module.modules() if isinstance(m, ProgressiveNorm)]


def test_a_run_resumes_validates_saves_and_folds(tmp_path, monkeypatch):
    train(make(tmp_path, "checkpoint.steps=3", "train.gradient_accumulation_steps=2"))
    whole = load_pipeline(tmp_path / "run").transformer
    again = ["checkpoint.steps=99", "train.gradient_accumulation_steps=2"]
    train(make(tmp_path, *again, f"run.resume_from_checkpoint={tmp_path}/run/checkpoint-3", "run.allow_changed_config=true",
               folder="two"))  # fmt: skip
    resumed = load_pipeline(tmp_path / "two").transformer
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert len(norms_of(whole)) == 7 and all(norm.gamma == 0 for norm in norms_of(whole))
    assert all(int(norm.batch.batches) == 12 for norm in norms_of(whole))  # two parts a step; validation counts nothing

    middle = load_pipeline(tmp_path / "run" / "checkpoint-3").transformer
    assert not middle.training and {round(norm.gamma, 6) for norm in norms_of(middle)} == {0.6}
    pipeline = load_pipeline(tmp_path / "run")
    expected = pipeline.clips(["a red circle"], [0], [""])[0]
    pipeline.transformer = pipeline.transformer.folded()
    found = pipeline.clips(["a red circle"], [0], [""])[0]
    assert (found.int() - expected.int()).abs().max() <= 1


def test_averaged_weights_are_evaluated_with_the_averages_of_the_run(tmp_path):
    parts = build_parts(make(tmp_path), ["a"])
    averages = ema.EMA(parts.trained, 0.5)
    with torch.no_grad():
        for parameter in parts.transformer.parameters():
            parameter += 0.1
    latents, t, text = torch.randn(2, 6, 2, 2, 2), torch.tensor([100.0, 900.0]), torch.randn(2, 3, 16)
    parts.transformer(latents, t, text)
    averages.update(0)
    buffers = {name: buffer.clone() for name, buffer in parts.transformer.named_buffers()}
    assert any(name.endswith("batch.mean") for name in buffers)
    assert not any(name.endswith(("mean", "variance", "batches", "reached")) for name in averages.state_tensors())
    with averages.applied(), torch.no_grad():
        applied = parts.transformer.eval()(latents, t, text).sample
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in parts.transformer.named_buffers())
    by_hand = copy.deepcopy(parts.transformer)
    shadow = {name.removeprefix("transformer."): tensor for name, tensor in averages.state_tensors().items()}
    by_hand.load_state_dict({**by_hand.state_dict(), **{n: t for n, t in shadow.items() if n in by_hand.state_dict()}})
    torch.testing.assert_close(by_hand(latents, t, text).sample, applied, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.norm=batch", "model.modulation=adaln", "text.conditioning=adaln"],
         "model.norm: batch stands before cross-attention, and in all layers under modulation none; write"),
        (["model.norm=batch", "model.norm=prepbn"], "model.norm.gamma: is required"),
        (["model.norm={kind: prepbn, gamma: 1.5}"], "model.norm.gamma"),
        (["model.norm={kind: prepbn, gamma: {kind: linear, start: 0, end: 1, steps: 5}}"], "may only fall over training"),
        (["model.plan=gru"], "no mixer of the plan attends to them; write modulation: adaln"),
        (["model.mixers.joint={pattern: causal}", "model.plan=joint"], "causal in mixers.joint would leak the future"),
        (["model.mixers.joint={pattern: three_way}", "model.plan=joint"], "makes keys of a clip's own tokens; write modulation"),
        (["objective.frame_times=frame"], "one token of time, not one a frame; write model.modulation: adaln"),
        (["model.norm=folded"], "model.norm: should be one of layer, batch, prepbn"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_when_the_config_loads(tmp_path, overrides, line):
    with pytest.raises((config.ConfigError, ValidationError)) as caught:
        make(tmp_path, *overrides)
    assert line in str(caught.value)

"""Laws of memory over time: its definition by loops, what a gradient reaches, and that a stream is the whole clip."""

import math

import dense
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stgen.attention import plan, reuse
from stgen.attention.attend import Mixer
from stgen.attention.memory import Ring
from stgen.attention.spec import AttentionMixer
from stgen.model import VideoTransformer
from stgen.tokens import Grid, rope_tables, rotate

HEADS, DIM = 2, 4
CLOSE = dict(rtol=0, atol=1e-9)


def mixer_of(keys: dict, grid: Grid, registers: int = 0) -> Mixer:
    ((((use,),),),) = reuse.place(plan.parse("a", 1), {"a": AttentionMixer.model_validate(keys)}, HEADS)
    torch.manual_seed(0)
    mixer = Mixer(use, DIM, grid, registers).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def inputs_of(grid: Grid, registers: int = 0, batch: int = 2) -> list[torch.Tensor]:
    shape = (batch, registers + grid.tokens, HEADS, DIM)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def rope_of(grid: Grid, registers: int = 0):
    cos, sin = rope_tables(grid, DIM)
    front = (registers, DIM // 2)
    return torch.cat([cos.new_ones(front), cos]), torch.cat([sin.new_zeros(front), sin])


# -------------------------------------------------------------------------------------------------- infini: by loops


def recalled(q, k, v, gate, memory):
    """What segments q, k, v [segments, places, D] of one sequence and head read, gated; and 1 - the gate's share."""
    m, z = torch.zeros(DIM, DIM, dtype=q.dtype), torch.zeros(DIM, dtype=q.dtype)
    out = []
    for i, (qs, ks, vs) in enumerate(zip(q, k, v, strict=True)):
        if memory.get("truncate") is not None and i % (memory["truncate"] + 1) == 0:
            m, z = m.detach(), z.detach()
        rows = []
        added_m, added_z = torch.zeros_like(m), torch.zeros_like(z)
        for query in qs:
            phi = torch.where(query > 0, query + 1, query.exp())
            rows.append((phi @ m) / (phi @ z) if i else torch.zeros_like(query))
        for key, value in zip(ks, vs, strict=True):
            phi = torch.where(key > 0, key + 1, key.exp())
            known = (phi @ m) / (phi @ z) if i and memory.get("delta") else torch.zeros_like(value)
            added_m, added_z = added_m + torch.outer(phi, value - known), added_z + phi
        m, z = m + added_m, z + added_z
        out.append(torch.stack(rows))
    return torch.stack(out) * gate.sigmoid()


def definition(keys: dict, pattern, mixer: Mixer, grid: Grid, q, k, v, rope):
    """Infini-attention with dense attention in segments and the memory of each sequence and head by itself."""
    memory, r = keys["memory"], mixer.registers
    side = (grid.h, grid.w) if keys["layout"] == "joint" else (1, 1)
    windows = {"reuse": {"what": "none"}, **keys, "layout": "window", "size": (memory["segment"], *side)}
    placed_q, placed_k = rotate(q, rope), rotate(k, rope)
    parts = []
    for run in mixer.runs:
        own = slice(run.group.first, run.group.first + run.group.count)
        local = {**windows, **{n: getattr(run.group, n).model_dump() for n in ("normaliser", "sink")}}
        parts.append(dense.layer(local, pattern, grid, run, *(x[:, :, own] for x in (placed_q, placed_k, v))).out)
    local = torch.cat(parts, dim=2)
    out = local.clone()
    for b in range(len(q)):
        for head in range(HEADS):
            where = torch.arange(grid.tokens).view(grid.t, grid.h * grid.w) + r
            lines = where.view(1, grid.t, -1) if keys["layout"] == "joint" else where.T.unsqueeze(-1)
            for line in lines:  # [frames, places]
                cut = line.view(-1, memory["segment"] * line.shape[1])
                gate = mixer.memory.gate[head]
                read = recalled(*(x[b, :, head][cut] for x in (q, k, v)), gate, memory)
                mixed = read + (1 - gate.sigmoid()) * local[b, :, head][cut]
                out = out.index_put((torch.tensor(b), cut, torch.tensor(head)), mixed)
    return out


INFINI = {
    "plain": ({}, "full", Grid(6, 1, 3), 0),
    "joint": ({"layout": "joint", "memory": {"segment": 1}}, "full", Grid(3, 2, 1), 0),
    "delta": ({"memory": {"delta": True}}, "full", Grid(6, 2, 1), 0),
    "joint, delta, registers": ({"layout": "joint", "memory": {"delta": True}}, "full", Grid(6, 1, 2), 2),
    "registers, causal refused elsewhere": ({}, "local", Grid(6, 1, 2), 3),
    "causal": ({}, "causal", Grid(6, 1, 2), 0),
    "tiles": ({"layout": "joint", "order": "tile", "block": (2, 2, 2)}, "strided", Grid(4, 3, 2), 0),
    "tokens": ({"sink": {"kind": "tokens", "count": 2}}, "full", Grid(4, 1, 2), 0),
    "relu": ({"normaliser": {"kind": "relu"}, "memory": {"delta": True}}, "local", Grid(4, 1, 2), 0),
    "linear": ({"normaliser": {"kind": "linear"}}, "full", Grid(4, 1, 2), 0),
    "heads": ({"heads": {"1": {"sink": {"kind": "logit", "value": 0.3}}}}, "full", Grid(4, 2, 1), 0),
    "top-k": ({"layout": "joint", "block": (1, 1, 2)}, "topk", Grid(4, 2, 2), 0),
    "no gradient through": ({"memory": {"truncate": 0}}, "full", Grid(6, 1, 2), 0),
    "through one": ({"memory": {"truncate": 1, "delta": True, "segment": 1}}, "full", Grid(5, 1, 2), 0),
    "through all": ({"memory": {"truncate": 9, "delta": True, "segment": 1}}, "full", Grid(5, 1, 2), 0),
    "one place": ({"memory": {"segment": 1}}, "full", Grid(1, 1, 1), 0),
}


@pytest.mark.parametrize("name", INFINI)
def test_infini_is_its_definition(name):
    changes, pattern, grid, registers = INFINI[name]
    memory = {"kind": "infini", "segment": 2, **changes.get("memory", {})}
    keys = {"layout": "temporal", "normaliser": {"kind": "softmax"}, "sink": {"kind": "none"}, **changes}
    keys |= {"memory": memory, "pattern": dense.config_of(pattern)}
    mixer, rope = mixer_of(keys, grid, registers), rope_of(grid, registers)
    inputs = inputs_of(grid, registers, batch=1 if grid.tokens == 1 else 2)
    ours, kept = mixer.with_memory(*inputs, grid, rope, {})
    theirs = definition(keys, pattern, mixer, grid, *inputs, rope)
    assert kept.memory is None  # nothing is held after a training pass
    torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    wanted = [*inputs, *(p for n, p in mixer.named_parameters() if p.requires_grad)]
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), wanted) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("truncate", [None, 0, 1, 2])
@pytest.mark.parametrize("delta", [False, True])
def test_a_gradient_reaches_back_as_far_as_it_says(truncate, delta):
    grid = Grid(6, 1, 1)
    memory = {"kind": "infini", "segment": 1, "delta": delta, "truncate": truncate}
    mixer, (q, k, v) = mixer_of({"layout": "temporal", "memory": memory}, grid), inputs_of(grid)
    out, _ = mixer.with_memory(q, k, v, grid, None, {})
    run = 6 if truncate is None else truncate + 1
    for i in range(6):
        for x in (k, v):
            (g,) = torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
            reached = {j for j in range(6) if g[:, j].abs().max() > 1e-12}
            # A value alone, in its segment or in all of the memory, is read whatever its key is.
            alone = (i, 0) if i == 1 else (i,)
            assert reached == {j for j in range(i + 1) if j // run == i // run and not (x is k and j in alone)}


def test_one_segment_without_gate_is_local_attention():
    grid = Grid(4, 2, 3)
    for layout in ("joint", "temporal"):
        keys = {"layout": layout, "pattern": dense.config_of(("all", "causal", "local"))}
        mixer = mixer_of({**keys, "memory": {"kind": "infini", "segment": 4}}, grid)
        plain, inputs, rope = mixer_of(keys, grid), inputs_of(grid), rope_of(grid)
        expected, _ = plain(rotate(inputs[0], rope), rotate(inputs[1], rope), inputs[2], grid, {})
        torch.nn.init.constant_(mixer.memory.gate, -math.inf)
        torch.testing.assert_close(mixer.with_memory(*inputs, grid, rope, {})[0], expected, **CLOSE)
        torch.nn.init.constant_(mixer.memory.gate, 0.0)  # an empty memory yields zeros
        torch.testing.assert_close(mixer.with_memory(*inputs, grid, rope, {})[0], expected / 2, **CLOSE)


def test_the_gate_starts_small_and_learns():
    grid = Grid(4, 1, 2)
    ((((use,),),),) = reuse.place(
        plan.parse("a", 1), {"a": AttentionMixer.model_validate({"memory": {"kind": "infini", "segment": 2}})}, HEADS
    )
    mixer = Mixer(use, DIM, grid, 0).double()
    assert 0.05 < mixer.memory.gate.sigmoid().max() < 0.2
    out, _ = mixer.with_memory(*inputs_of(grid), grid, None, {})
    out.square().sum().backward()
    assert (mixer.memory.gate.grad.abs() > 0).all()


def test_work_counts_the_segments_and_the_memory():
    grid, pair = Grid(8, 2, 2), 4 * HEADS * DIM
    full = mixer_of({"layout": "joint"}, grid).work(grid)
    some = mixer_of({"layout": "joint", "memory": {"kind": "infini", "segment": 2}}, grid).work(grid)
    delta = mixer_of({"layout": "joint", "memory": {"kind": "infini", "segment": 2, "delta": True}}, grid).work(grid)
    read = 2 * 32 * DIM * (DIM + 1) * HEADS  # of 32 tokens; a write costs as much
    assert full.executed == full.dense == some.dense == 32 * 32 * pair
    assert some.executed == 4 * 8 * 8 * pair + 2 * read and delta.executed == some.executed + read


# ---------------------------------------------------------------------------------------------- streams: whole models

SIDE = (2, 3)


def model_of(layers: str, mixers: dict, frames: int = 12, positions="rope", heads=2, **options) -> VideoTransformer:
    torch.manual_seed(0)
    depth = len(plan.parse(layers, None)) if "*" in layers else len(layers.split())
    grid = (frames, *SIDE)
    model = VideoTransformer(
        3, grid, width=12 * heads, depth=depth, heads=heads, plan=layers, mixers=mixers, text_width=8,
        positions=positions, **options,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def ring(sinks=1, window=4, **keys) -> dict:
    keys = {"layout": "temporal", "pattern": {"kind": "causal"}, **keys}
    return {**keys, "memory": {"kind": "ring", "sinks": sinks, "window": window}}


def infini(segment=2, delta=False, **keys) -> dict:
    return {"layout": "temporal", **keys, "memory": {"kind": "infini", "segment": segment, "delta": delta}}


def causal_and(*parts) -> dict:
    return {"pattern": {"kind": "all", "all": [{"kind": "causal"}, *parts]}}


def video(frames: int) -> torch.Tensor:
    return torch.randn(2, 3, frames, *SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context():
    text = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return torch.tensor([0.0, 700.0]).double(), text


@torch.no_grad()
def whole(model, x):
    return model(x, *context()).sample


@torch.no_grad()
def streamed(model, x, chunks, noise=True):
    """The same chunk by chunk, after passes over noise as sampling makes them; and the size of the memory at every end."""
    time, text = context()
    past, out, sizes = model.new_past(len(x), (max(chunks), *SIDE)), [], set()
    for part in x.split(chunks, dim=2):
        for _ in range(2 * noise):
            model(torch.randn_like(part), time + 300, text, past=past)
        result = model(part, time, text, past=past)
        past = result.past
        out.append(result.sample)
        sizes.add(past.numel())
    assert past.frames == x.shape[2]
    return torch.cat(out, dim=2), sizes


ODD, EVEN, ONES, LONG = [5, 5, 2], [4, 4, 4], [1] * 12, [6, 6]
STREAMS = {
    "ring of one frame": ("t spatial t", {"t": ring(0, 1)}, ODD),
    "ring": ("t spatial t", {"t": ring()}, ODD),
    "ring, frame by frame": ("t spatial t", {"t": ring()}, ONES),
    "ring, joint": ("t t", {"t": ring(layout="joint")}, ODD),
    "ring, longer than the clip": ("t t", {"t": ring(3, 20)}, ODD),
    "ring, many first frames": ("t t", {"t": ring(5, 2, layout="joint")}, ODD),
    "ring, tiles": ("t t", {"t": ring(layout="joint", order="tile", block=(2, 2, 2))}, ODD),
    "ring, local": ("t t", {"t": ring(layout="joint", **causal_and({"kind": "local", "radius": [3, 1, 1]}))}, EVEN),
    "ring, strided": ("t t", {"t": ring(layout="joint", **causal_and({"kind": "strided", "stride": 2}))}, ODD),
    "ring, union": (
        "t t",
        {"t": ring(2, 5, pattern={"kind": "any", "any": [{"kind": "causal"}, {"kind": "local", "radius": 1},
                                                         {"kind": "global", "tokens": [(1, 0, 1)]}]})},
        ODD,
    ),
    "ring, radial": ("t t", {"t": ring(layout="joint", **causal_and({"kind": "radial", "sink_frames": 1}))}, ODD),
    "ring, checkerboard": ("t t", {"t": ring(layout="joint", **causal_and({"kind": "checkerboard"}))}, ODD),
    "ring, relu": ("t t", {"t": ring(normaliser={"kind": "relu"})}, ODD),
    "ring, poly, logit": ("t t", {"t": ring(normaliser={"kind": "poly"}, sink={"kind": "logit"})}, ODD),
    "ring, tokens": ("t t", {"t": ring(sink={"kind": "tokens", "count": 2})}, ODD),
    "ring, cubic": ("t t", {"t": ring(normaliser={"kind": "poly_logits", "learned": True, "ratio": 0.6})}, ODD),
    "ring, few channels": ("t t", {"t": ring(approximate={"qk_topk": 5})}, ODD),
    "ring, low bits": ("t t", {"t": ring(approximate={"quantise": ["k", "map"], "form": "fixed", "bits": 6})}, ODD),
    "ring, heads that differ": (
        "t t",
        {"t": ring(heads={"1": {**causal_and({"kind": "local", "radius": 1}), "sink": {"kind": "logit"}}})},
        ODD,
    ),
    "ring and infini share the heads": ("t|u t>u u+t", {"t": ring(), "u": infini()}, EVEN),
    "output reused": ("t t t", {"t": ring(reuse={"what": "output", "every": 3})}, ODD),
    "keys lent": ("t s", {"t": ring(), "s": {"layout": "spatial", "reuse": {"what": "kv", "source": 0}}}, ODD),
    "keys lent by infini": ("t s", {"t": infini(), "s": {"layout": "spatial", "reuse": {"what": "kv", "source": 0}}}, EVEN),
    "infini": ("t spatial t", {"t": infini()}, EVEN),
    "infini, frame by frame": ("t t", {"t": infini(1)}, ODD),
    "infini, delta": ("t t", {"t": infini(delta=True)}, [2] * 6),
    "infini, joint, delta": ("t t", {"t": infini(delta=True, layout="joint")}, LONG),
    "infini, causal, local": ("t t", {"t": infini(3, **causal_and({"kind": "local", "radius": 1}))}, LONG),
    "infini, tokens": ("t t", {"t": infini(sink={"kind": "tokens", "count": 2})}, LONG),
    "infini, quantised": ("t t", {"t": infini(approximate={"quantise": ["q", "k", "v"], "bits": 6})}, LONG),
    "forward lstm": ("a spatial a", {"a": {"kind": "lstm", "bidirectional": False}}, ODD),
    "forward gru, joint": ("a a", {"a": {"kind": "gru", "bidirectional": False, "layout": "joint"}}, ODD),
    "forward rnn": ("a>t", {"a": {"kind": "rnn", "bidirectional": False}, "t": ring()}, ODD),
    "causal tcn": ("a a", {"a": {"kind": "tcn", "causal": True, "kernel_size": 2}}, ODD),
    "causal tcn, joint": ("a", {"a": {"kind": "tcn", "causal": True, "weight_norm": True, "layout": "joint"}}, ONES),
    "windows of a frame": ("t w", {"t": ring(), "w": {"layout": "window", "size": (1, 2, 2), "shift": (0, 1, 1)}}, ODD),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_whole_clip(name):
    layers, mixers, chunks = STREAMS[name]
    model, x = model_of(layers, mixers), video(12)
    expected = whole(model, x)
    out, sizes = streamed(model, x, chunks)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert len(sizes) == 1
    other = whole(model, torch.cat([torch.randn_like(x[:, :, :-1]), x[:, :, -1:]], dim=2))
    past_matters = (other[:, :, -1] - expected[:, :, -1]).abs().max() > 1e-6
    assert past_matters == (name != "ring of one frame")  # else the law would be empty


class Made(TorchDispatchMode):
    """The operators that make a tensor of at least so many numbers in memory of its own."""

    def __init__(self, size: int, known: set[int]):
        super().__init__()
        self.size, self.known, self.found = size, known, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            large = isinstance(x, torch.Tensor) and x.numel() >= self.size
            if large and x.untyped_storage().data_ptr() not in self.known:
                self.found.append(func)
        return out


@pytest.mark.parametrize("positions", ["none", "rope"])
@pytest.mark.parametrize("layout", ["temporal", "joint"])
def test_a_ring_is_written_in_place_and_read_without_a_copy(layout, positions, monkeypatch):
    """Its two buffers are the same memory in every pass over every chunk. RoPE alone makes keys anew, to place them."""
    model, x = model_of("t", {"t": ring(1, 9, layout=layout)}, positions=positions), video(24)
    passes, (time, text) = [], context()

    def watched(method):
        def run(self, state, *given):
            size, buffers = state.k.numel(), {y.untyped_storage().data_ptr() for y in (state.k, state.v)}
            with Made(size, buffers) as made:
                out = method(self, state, *given)
            passes.append((method.__name__, made.found))
            return out

        return run

    for name in ("write", "read"):
        monkeypatch.setattr(Ring, name, watched(getattr(Ring, name)))
    past, seen = model.new_past(2, (1, *SIDE)), set()
    for i, part in enumerate(x.split(1, dim=2)):
        with torch.no_grad():
            model(torch.randn_like(part), time + 300, text, past=past)
            result = model(part, time, text, past=past)
        before, after = (p.memories[0] for p in (past, result.past))
        seen |= {(y.data_ptr(), y.shape) for state in (before, after) for y in (state.k, state.v)}
        assert len(seen) == 2 and after.frames == i + 1
        past = result.past
    made = {name: [func for other, found in passes if other == name for func in found] for name in ("write", "read")}
    assert made["write"] == [] and len(passes) == 4 * (i + 1)
    joined = [func for func in made["read"] if func is not torch.ops.aten.cat.default]
    assert joined == [] and len(made["read"]) == (0 if positions == "none" else 2 * (i + 1))


def test_the_last_segment_may_be_shorter():
    model, x = model_of("t u", {"t": ring(), "u": infini(3, delta=True, layout="joint")}), video(11)
    torch.testing.assert_close(streamed(model, x, [6, 5])[0], whole(model, x), **CLOSE)


def test_checkpointed_gradients_are_the_same():
    model, x = model_of("t u", {"t": ring(), "u": infini(delta=True)}), video(12)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(x, *context()).sample.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["sincos", "learned", "none"])
def test_a_stream_is_the_whole_clip_under_all_positions(positions):
    for mixer in (ring(), infini()):
        model, x = model_of("t spatial t", {"t": mixer}, positions=positions, conditioning="both"), video(12)
        torch.testing.assert_close(streamed(model, x, EVEN)[0], whole(model, x), **CLOSE)


@pytest.mark.parametrize(
    "mixer", [ring(0, 4), ring(2, 3, layout="joint"), infini(1, delta=True)], ids=["window", "first frames", "infini"]
)
def test_ten_times_the_training_length_without_positions_is_the_whole_clip(mixer):
    model, x = model_of("t spatial t", {"t": mixer}, frames=6, positions="none"), video(60)
    out, sizes = streamed(model, x, [4] * 15, noise=False)
    torch.testing.assert_close(out, whole(model, x), **CLOSE)
    assert sizes == {model.new_past(2, (4, *SIDE)).numel()}  # as large as for a video that has not begun


def test_rope_goes_on_beyond_the_training_length():
    """Without first frames all distances are within the window, so placing a chunk anew changes rounding alone."""
    model, x = model_of("t spatial t", {"t": ring(0, 4)}, frames=6), video(60)
    torch.testing.assert_close(streamed(model, x, [3] * 20)[0], whole(model, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixer", [ring(2, 3), ring(1, 99, layout="joint")], ids=["short", "long"])
def test_no_distance_grows_once_a_training_clip_is_full(mixer):
    """A video that stands still after its first frames then looks the same at all times, ever farther away from them."""
    model, x = model_of("t spatial t", {"t": mixer}, frames=8), video(4)
    moving, still = x[:, :, :3], x[:, :, 3:].expand(-1, -1, 57, -1, -1)
    out, _ = streamed(model, torch.cat([moving, still], dim=2), [3] * 20, noise=False)
    last = out.unflatten(2, (20, 3))[:, :, -6:]
    torch.testing.assert_close(last, last[:, :, :1].expand_as(last), **CLOSE)
    alone, _ = streamed(model, x[:, :, 3:].expand(-1, -1, 60, -1, -1), [3] * 20, noise=False)
    assert (out[:, :, -1] - alone[:, :, -1]).abs().max() > 1e-6  # it still sees how the video began


@pytest.mark.parametrize(
    ("mixer", "step"),
    [(ring(), 1), (ring(layout="joint"), 1), (infini(3, delta=True), 3), (infini(2, layout="joint"), 2)],
)
def test_the_future_never_leaks(mixer, step):
    model, x = model_of("t spatial t", {"t": mixer}), video(12)
    expected = whole(model, x)
    for first in range(step, 12, step):
        changed = x.clone()
        changed[:, :, first:] += 1
        torch.testing.assert_close(whole(model, changed)[:, :, :first], expected[:, :, :first], **CLOSE)


def test_clips_of_a_batch_have_memories_of_their_own():
    model, x = model_of("t spatial u", {"t": ring(), "u": infini()}), video(12)
    both = streamed(model, x, EVEN, noise=False)[0]
    swapped = streamed(model, x.flip(0), EVEN, noise=False)[0]
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(streamed(model, changed, EVEN, noise=False)[0][0], both[0])
    assert not torch.allclose(swapped[0], both[1])  # times and prompts differ


@pytest.mark.parametrize("kind", ["lstm", "gru", "tcn"])
def test_a_stream_in_bfloat16_is_about_the_whole_clip(kind):
    past_only = {"causal": True} if kind == "tcn" else {"bidirectional": False}
    model = model_of("t a u", {"t": ring(), "u": infini(), "a": {"kind": kind, **past_only}}).float()
    x, (time, text) = video(12).float(), context()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x, time, text.float()).sample
        past, out = model.new_past(2, (4, *SIDE), torch.bfloat16), []
        for part in x.split(4, dim=2):
            result = model(part, time, text.float(), past=past)
            past = result.past
            out.append(result.sample)
    error = (torch.cat(out, dim=2) - expected).float().norm() / expected.float().norm()
    assert error < 0.03


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED = {
    ("temporal", ""): "layout temporal sees all frames of a clip at once; write layout: temporal or joint with memory",
    ("joint", ""): "layout joint sees all frames of a clip at once",
    ("w", "window"): "layout window sees all frames of a clip at once",
    ("tcn", ""): "model.mixers.tcn: tcn looks at frames to come; write layout: temporal and causal: true",
    ("gru", ""): "gru looks at frames to come; write layout: temporal and bidirectional: false",
    ("t", "chosen"): "model.mixers.t: pattern: topk chooses keys from all of a clip",
    ("t", "blocks"): "pattern: random goes by the blocks of a clip",
    ("t", "clamped"): "local moves its box at the end of a clip, which a stream does not know; write border: cut",
    ("u", "frames"): "pattern: global goes by the frames of a clip, which a segment does not know",
}
CHOSEN = {"kind": "topk", "level": "token"}
FAULTY = {
    "": {},
    "window": {"w": {"layout": "window", "size": (2, 2, 2)}},
    "chosen": {"t": ring(**causal_and(CHOSEN))},
    "blocks": {"t": ring(**causal_and({"kind": "random"}))},
    "clamped": {"t": ring(**causal_and({"kind": "local", "radius": 1, "border": "clamp"}))},
    "frames": {"u": infini(pattern={"kind": "global", "frames": 1})},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_says_what_to_write(case):
    layers, mixers = case
    model = model_of(f"spatial {layers}", FAULTY[mixers])
    with pytest.raises(ValueError, match="write") as caught:
        model.new_past(1, (4, *SIDE))
    assert REFUSED[case] in str(caught.value) and "\n" not in str(caught.value)


def test_chunks_that_do_not_fit_are_told():
    assert "registers: 0" in str(model_of("u", {"u": infini()}, registers=1).refusal())
    model = model_of("t u", {"t": ring(3), "u": infini()})
    for chunk, words in {11: "more than the 12 of a training clip", 13: "longer than a training clip of 12"}.items():
        with pytest.raises(ValueError, match=words):
            model.new_past(1, (chunk, *SIDE))
    with pytest.raises(
        ValueError, match=r"no whole number of the segments of 2 in mixers\.u\.memory; take a multiple of 2"
    ):
        model.new_past(1, (3, *SIDE))
    past = model.new_past(2, (4, *SIDE))
    time, text = context()
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(video(4), time, text, past=past)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="room for 2 chunks of at most 4x2x3 tokens, not for 2 of 6x2x3"),
    ):
        model(video(6), time, text, past=past)
    with torch.no_grad(), pytest.raises(ValueError, match="not for 1 of 4x2x3"):
        model(video(4)[:1], time[:1], text[:1], past=past)
    for positions in ("learned", "sincos"):
        model = model_of("t", {"t": ring()}, frames=6, positions=positions)
        with pytest.raises(
            ValueError, match=f"{positions} positions end with the 6 frames of tokens of a training clip"
        ):
            streamed(model, video(12), [3] * 4)


def test_a_segment_that_does_not_divide_the_clip_is_told_when_a_model_is_built():
    with pytest.raises(ValueError, match=r"mixers\.u\.memory: segments of 5 frames do not divide the 12 frames"):
        model_of("u", {"u": infini(5)})

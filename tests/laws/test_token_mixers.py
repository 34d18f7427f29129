"""Laws of the mixers without a map: their definition, what they may see, cut windows, and their place in the plan."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stgen.mixers.sequences import SequenceMixer
from stgen.mixers.spec import TCN, Recurrent, named
from stgen.mixers.tcn import TCNNet
from stgen.model import VideoTransformer
from stgen.schema import Model
from stgen.tokens import Grid, coordinates

GRID = Grid(5, 3, 4)
KINDS = {
    "tcn": TCN(levels=1),
    "causal tcn": TCN(causal=True, kernel_size=2, levels=2),
    "weight norm": TCN(weight_norm=True),
    "rnn": Recurrent(kind="rnn"),
    "lstm": Recurrent(kind="lstm"),
    "gru forwards": Recurrent(kind="gru", bidirectional=False),
}
LAYOUTS = [
    {"layout": "joint"}, {"layout": "spatial"}, {"layout": "temporal"}, {"layout": "height"}, {"layout": "width"},
    {"layout": "window", "size": (2, 2, 3)},
]  # fmt: skip


def mixer(keys, registers=0, **changes):
    torch.manual_seed(0)
    return SequenceMixer("m", keys.model_copy(update=changes), 8, registers).double()


def tokens(batch=2, registers=0):
    return torch.randn(
        batch, registers + GRID.tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def sequences(layout):
    """Tokens of each sequence in raster order, from the layout's dense definition."""
    same = layout.same_sequence(GRID)
    return [row.nonzero().flatten() for row in torch.unique(same, dim=0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda keys: keys["layout"])
@pytest.mark.parametrize("name", KINDS)
def test_a_mixer_is_its_net_on_each_sequence_alone(name, layout):
    m, x = mixer(KINDS[name], **layout), tokens()
    out, _ = m(x, GRID, None, {})
    for at in sequences(m.layout):
        torch.testing.assert_close(out[:, at], m.net(x[:, at], None), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("causal", "kernel", "levels"), itertools.product([False, True], [3, 5], [1, 2, 3]))
def test_a_tcn_is_dilated_convolutions_by_hand(causal, kernel, levels):
    torch.manual_seed(0)
    net, x = TCNNet(TCN(causal=causal, kernel_size=kernel, levels=levels), 3).double(), torch.randn(2, 7, 3).double()

    def convolved(x, conv, dilation):
        out = conv.bias.repeat(*x.shape[:2], 1)
        for i, j in itertools.product(range(x.shape[1]), range(kernel)):
            source = i + dilation * (j - (kernel - 1 if causal else kernel // 2))
            if 0 <= source < x.shape[1]:
                out[:, i] = out[:, i] + x[:, source] @ conv.weight[:, :, j].T
        return out

    expected = x
    for i, level in enumerate(net.levels):
        hidden = torch.nn.functional.gelu(convolved(expected, level.first, 2**i))
        expected = expected + convolved(hidden, level.second, 2**i)
    torch.testing.assert_close(net(x, None), expected, rtol=0, atol=1e-12)


def test_weight_norm_is_length_times_direction():
    """g v / |v| for each output channel, with a length more for each; and the net is the plain one with those kernels."""
    torch.manual_seed(0)
    net, plain = (TCNNet(TCN(weight_norm=on), 4).double() for on in (True, False))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in plain.parameters()) + 2 * 2 * 4
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    for level, other in zip(net.levels, plain.levels, strict=True):
        for conv, target in ((level.first, other.first), (level.second, other.second)):
            named = dict(conv.named_parameters())
            g, v = (next(p for p in named.values() if p.shape == shape) for shape in ((4, 1, 1), (4, 4, 3)))
            target.bias.data = named["bias"].data
            target.weight.data = torch.stack([g[c, 0, 0] * v[c] / v[c].square().sum().sqrt() for c in range(4)]).data
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x, None), plain(x, None), rtol=0, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("kind", "cell"), [("rnn", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_a_recurrence_is_pytorchs_and_a_projection(kind, cell, bidirectional):
    """In values and gradients, its weights those of a module that the test builds."""
    m = mixer(Recurrent(kind=kind, bidirectional=bidirectional), layout="temporal")
    own = cell(8, 4 if bidirectional else 8, batch_first=True, bidirectional=bidirectional).double()
    ours = {name.removeprefix("net.cells."): p for name, p in m.named_parameters() if "to_out" not in name}
    own.load_state_dict({name: p.detach() for name, p in ours.items()})
    x = tokens().requires_grad_()
    where = torch.arange(GRID.tokens).view(GRID.t, -1).T  # frames of each pixel, in order
    expected = torch.zeros_like(x)
    for at in where:
        hidden, _ = own(x[:, at])
        expected = expected.index_copy(1, at, hidden @ m.net.to_out.weight.T + m.net.to_out.bias)
    out, _ = m(x, GRID, None, {})
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, theirs = list(ours), dict(own.named_parameters())
    a = torch.autograd.grad((out * weights).sum(), [x, *(ours[name] for name in names)], retain_graph=True)
    b = torch.autograd.grad((expected * weights).sum(), [x, *(theirs[name] for name in names)])
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "keys", [TCN(levels=2), TCN(levels=3, causal=True, kernel_size=2), TCN(levels=1, kernel_size=5)]
)
def test_the_receptive_field_is_as_stated(keys):
    net, n = TCNNet(keys, 4).double(), 2 * keys.reach + 1
    x = torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True)
    net(x, None)[0, keys.reach].sum().backward()
    seen = x.grad[0].abs().sum(-1).nonzero().flatten()
    assert int(seen[-1] - seen[0]) + 1 == len(seen) == keys.reach
    assert int(seen[-1]) == (keys.reach if keys.causal else keys.reach + keys.reach // 2)


@pytest.mark.parametrize("name", ["causal tcn", "gru forwards"])
def test_causal_ones_do_not_see_the_future(name):
    m, x = mixer(KINDS[name]), tokens(1).requires_grad_()
    frames = coordinates(GRID)[:, 0]
    for frame in range(GRID.t):
        (gradient,) = torch.autograd.grad(m(x, GRID, None, {})[0][:, frames == frame].sum(), x)
        assert not gradient[:, frames > frame].any() and gradient[:, frames == frame].any()


def test_registers_get_nothing_and_give_nothing():
    m, x = mixer(KINDS["lstm"], registers=2), tokens(registers=2)
    out, _ = m(x, GRID, None, {})
    assert not out[:, :2].any()
    torch.testing.assert_close(out[:, 2:], mixer(KINDS["lstm"])(x[:, 2:], GRID, None, {})[0])


def build(plan, **mixers):
    torch.manual_seed(0)
    registers = 0 if plan in ("tcn", "lstm rnn") else 1
    keys = dict(in_channels=3, grid=(5, 3, 4), width=32, depth=2, heads=4, plan=plan, text_width=8, registers=registers)
    return VideoTransformer(**keys, mixers={name: m.model_dump() for name, m in mixers.items()})


@pytest.mark.parametrize("plan", ["tcn>temporal", "tcn", "gru + joint", "lstm rnn"])
def test_models_train_every_weight_and_load_as_saved(plan, tmp_path):
    model = build(plan)
    latents, t, text = torch.randn(2, 3, 5, 3, 4), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(latents, t, text).sample - latents.flip(-1)).square().mean().backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead
    out = model(latents, t, text).sample
    torch.testing.assert_close(model(latents[:1], t[:1], text[:1]).sample, out[:1], rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(VideoTransformer.from_pretrained(tmp_path)(latents, t, text).sample, out)


def test_weights_and_operations_are_counted():
    tcn, lstm = mixer(KINDS["tcn"]), mixer(KINDS["lstm"])
    assert sum(p.numel() for p in tcn.parameters()) == 2 * (3 * 8 * 8 + 8)
    assert tcn.work(GRID).executed == tcn.work(GRID).dense == 60 * 2 * 2 * 3 * 8 * 8
    cells = 2 * 4 * (8 * 4 + 4 * 4 + 2 * 4)
    assert sum(p.numel() for p in lstm.parameters()) == cells + 8 * 8 + 8
    assert lstm.work(GRID).executed == 60 * 2 * (2 * 4 * (8 * 4 + 4 * 4) + 8 * 8)


def test_a_mixer_named_after_its_kind_needs_no_entry():
    assert named("gru") == Recurrent(kind="gru") and named("tcn") == TCN() and named("attention") is None
    assert Model(plan="tcn>temporal").mixer("tcn") == TCN()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"plan": "tcn|temporal"}, "no heads to share"),
        ({"plan": "tcn", "registers": 1}, "no mixer of the plan attends"),
        ({"plan": "gru", "width": 9, "heads": 1}, "bidirectional halves the channels"),
        ({"mixers": {"tcn": {"kind": "attention"}}}, "write kind: tcn"),
        ({"mixers": {"a": {"kind": "tcn", "kernel_size": 4}}}, "kernel_size 4 has no middle"),
        ({"mixers": {"a": {"kind": "tcn", "layout": "window"}}}, "layout window needs size"),
        ({"mixers": {"a": {"kind": "rnn", "size": [1, 2, 2]}}}, "size belongs to layout window"),
        (
            {"plan": "tcn a", "mixers": {"a": {"kind": "attention", "reuse": {"what": "kv", "source": 0}}}},
            "layer 0 has no attention to take from",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_sentence(keys, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Model.model_validate(keys)

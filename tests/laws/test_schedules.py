"""Laws of numbers that change over training: their courses, that patterns follow them, and that nothing is lost."""

import math

import pytest
import torch
from pydantic import ValidationError

from stgen.attention.numbers import Numbers
from stgen.attention.patterns.local import Local
from stgen.attention.patterns.topk import TopK
from stgen.attention.spec import AttentionMixer
from stgen.model import VideoTransformer
from stgen.schedules import Plateau, PlateauState, Stairs, scheduled, settled

FALLING = {"kind": "linear", "start": 1.0, "end": 0.2, "steps": 8, "warmup_steps": 2}
PLATEAU = {"kind": "plateau", "start": 1.0, "end": 0.25, "parts": 3, "patience": 2}
GRID = (4, 3, 4)
TILES = {"layout": "joint", "order": "tile", "block": [2, 2, 2]}


def ratio(schedule):
    return TopK.model_validate({"ratio": schedule})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (FALLING, {0: 1.0, 2: 1.0, 4: 0.8, 6: 0.6, 10: 0.2, 99: 0.2}),
        ({**FALLING, "kind": "cosine"}, {2: 1.0, 4: 0.6 + 0.4 * math.cos(math.pi / 4), 6: 0.6, 10: 0.2}),
        (
            {**FALLING, "every": 3},
            {0: 1.0, 2: 1.0, 4: 1.0, 5: 0.7, 7: 0.7, 8: 0.4, 9: 0.4, 10: 0.2, 11: 0.2, 99: 0.2},
        ),
        (
            {**FALLING, "kind": "cosine", "every": 4},
            {1: 1.0, 5: 1.0, 6: 0.6, 9: 0.6, 10: 0.2},
        ),
        ({"kind": "stairs", "values": [1, 0.5, 0.3], "at_steps": [3, 5]}, {0: 1, 2: 1, 3: 0.5, 4: 0.5, 5: 0.3, 9: 0.3}),
    ],
)
def test_a_course_has_its_values(schedule, expected):
    numbers = Numbers(ratio(schedule))
    for step, value in expected.items():
        numbers.at_step(step)
        assert numbers.now.ratio == pytest.approx(value)
        assert numbers.measured == {"ratio": numbers.now.ratio}


def test_numbers_are_told_as_they_are_computed_with():
    numbers = Numbers(Local.model_validate({"radius": {"kind": "linear", "start": 4, "end": 0, "steps": 3}}))
    seen = []
    for step in range(5):
        numbers.at_step(step)
        seen.append(numbers.measured["radius"])
        assert numbers.now.radius == seen[-1]
    assert seen == [4, 3, 1, 0, 0]


def test_a_schedule_says_how_often_it_changes():
    assert str(scheduled_ratio({**FALLING, "every": 50})) == "1 to 0.2, linear over 8 steps, changing every 50"
    assert str(scheduled_ratio(FALLING)) == "1 to 0.2, linear over 8 steps"


def scheduled_ratio(schedule):
    [(_, one)] = scheduled(ratio(schedule))
    return one


def test_a_plateau_moves_when_the_loss_no_longer_falls():
    state, schedule = PlateauState(), Plateau(start=1, end=0.25, parts=3, patience=5)
    for step in range(40):
        state.observe(0.9**step, schedule)
    assert state.moves == 0
    for _ in range(600):
        state.observe(0.9**40, schedule)
    assert state.moves == 3  # and no more than there are parts
    assert schedule.after(1) == pytest.approx(0.75) and schedule.after(3) == 0.25


def test_whole_numbers_stay_whole_and_lists_are_searched():
    pattern = AttentionMixer.model_validate(
        {"pattern": {"kind": "any", "any": [{"kind": "local", "radius": {"kind": "linear", "start": 4, "end": 1, "steps": 2}}]}}
    ).pattern  # fmt: skip
    assert [path for path, _ in scheduled(pattern)] == [("any", 0, "radius")]
    assert settled(pattern, {("any", 0, "radius"): 2.5}).any[0] == Local(radius=2)


def build(pattern, **keys):
    torch.manual_seed(0)
    mixer = {**TILES, "pattern": pattern, **keys}
    return VideoTransformer(
        in_channels=3, grid=GRID, width=32, depth=2, heads=4, plan="a", text_width=8, mixers={"a": mixer}
    )


def inputs():
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, 3, *GRID, generator=g),
        torch.tensor([100.0]),
        torch.randn(1, 5, 8, generator=g),
    )


def opened(model):
    """With gates that let the mixers through."""
    for block in model.blocks:
        for mixing in block.mixing:
            torch.nn.init.constant_(mixing.modulation.table, 0.5)
    return model


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("topk", {"ratio": FALLING}),
        ("entropy", {"ratio": FALLING}),
        ("learned", {"ratio": FALLING}),
        ("three_way", {"ratio": FALLING, "radius": {"kind": "stairs", "values": [2, 1], "at_steps": [6]}}),
        ("local", {"radius": {"kind": "linear", "start": 3, "end": 1, "steps": 8, "warmup_steps": 2}}),
        ("global", {"frames": {"kind": "linear", "start": 3, "end": 1, "steps": 8}}),
    ],
)
@torch.no_grad()
def test_a_model_at_a_step_is_the_model_with_that_number(kind, keys, tmp_path):
    model = opened(build({"kind": kind, **keys})).eval()
    for step in (0, 6, 30):
        model.at_step(step)
        now = model.blocks[0].branches[0].mixers[0].runs[0].pattern
        plain = opened(build(now.model_dump())).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".reached")})
        assert torch.equal(model(*inputs()).sample, plain(*inputs()).sample)
    model.save_pretrained(tmp_path)
    loaded = VideoTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)  # its last value
    halved = VideoTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert halved.measured() == model.measured() and model.measured()


@torch.no_grad()
def test_a_part_of_a_union_may_fall_to_nothing():
    frames = {"kind": "global", "frames": {"kind": "stairs", "values": [1, 0], "at_steps": [3]}}
    model, alone = (opened(build({"kind": "any", "any": [{"kind": "topk"}, *more]})) for more in ([frames], []))
    assert (model(*inputs()).sample - alone(*inputs()).sample).abs().max() > 1e-4
    model.at_step(3)
    assert torch.equal(model(*inputs()).sample, alone(*inputs()).sample)


@pytest.mark.parametrize(
    "keys",
    [
        {"normaliser": {"kind": "poly_logits", "learned": True, "ratio": {**FALLING, "every": 3}}},
        {"approximate": {"quantise": ["q", "k", "v"], "bits": {**FALLING, "start": 8, "end": 3}}},
        {"approximate": {"quantise": ["map"], "bits": {"kind": "stairs", "values": [6, 2], "at_steps": [6]}}},
        {"approximate": {"quantise": ["q"], "form": "fixed", "bits": {**FALLING, "start": 8, "end": 3, "every": 3}}},
        {"approximate": {"qk_topk": {**FALLING, "start": 8, "end": 3}}},
    ],
    ids=str,
)
@torch.no_grad()
def test_normalisers_and_approximations_follow_schedules_and_are_saved(keys, tmp_path):
    [(name, section)] = keys.items()
    model = opened(build({"kind": "full"}, **keys)).eval()
    outputs = []
    for step in (0, 6, 30):
        model.at_step(step)
        told = {key.rsplit("/", 1)[1]: value for key, value in model.measured().items()}
        now = {**section, **{key: int(x) if key in ("bits", "qk_topk") else x for key, x in told.items()}}
        plain = opened(build({"kind": "full"}, **{name: now})).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".reached")})
        outputs.append(model(*inputs()).sample)
        assert torch.equal(outputs[-1], plain(*inputs()).sample)
    assert not torch.equal(outputs[0], outputs[-1])
    model.save_pretrained(tmp_path)
    loaded = VideoTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs()).sample, outputs[-1]) and loaded.measured() == model.measured()


def test_plateaus_go_on_where_they_were():
    whole, first = (Numbers(ratio(PLATEAU)) for _ in range(2))
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()

    def run(numbers, steps):
        seen = []
        for step in steps:
            numbers.at_step(step)
            seen.append(numbers.now.ratio)
            numbers.observe(losses[step])
        return seen

    expected = run(whole, range(40))
    assert len(set(expected)) == 4
    begun = run(first, range(17))
    second = Numbers(ratio(PLATEAU))
    second.load_state_dict(first.state_dict())
    assert begun + run(second, range(17, 40)) == expected


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ({"kind": "topk", "ratio": {**FALLING, "end": 1.5}}, "ratio: 1.5 of its schedule"),
        ({"kind": "topk", "ratio": {**FALLING, "start": 0.1}}, "from 0.1 to 0.2 rises, but this number may only fall"),
        ({"kind": "topk", "ratio": {**FALLING, "steps": 0}}, "greater than 0"),
        ({"kind": "local", "radius": {**FALLING, "end": -1}}, "radius: -1 of its schedule"),
    ],
)
def test_schedules_that_cannot_be_are_refused(pattern, sentence):
    with pytest.raises(ValidationError, match=sentence):
        AttentionMixer.model_validate({"pattern": pattern})


def test_stairs_want_a_step_for_each_value():
    with pytest.raises(ValidationError, match="at_steps should be 2 rising steps"):
        Stairs(values=[3, 2, 1], at_steps=[5, 4])

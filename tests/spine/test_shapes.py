"""Built-in shapes: a fair split, clips that show what they say, and an oracle that is right and not generous."""

import inspect
import json
from itertools import combinations

import pytest
import torch

from stgen import shapes, video
from stgen.shapes import ALL, COLOURS, Combination, ShapesError, judge, render, split, wilson, write_folder

RECIPE = dict(clips=3, held_out=2, held_out_seed=0, num_frames=4, height=32, width=32, seed=0)


def pairs(combos):
    return [pair for c in combos for pair in combinations((c.colour, c.kind, c.direction), 2)]


# ------------------------------------------------------------------------------------------------------------ split


@pytest.mark.parametrize("held_out", [0, 1, 8, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_combinations_share_no_pair_and_every_pair_is_seen(held_out, seed):
    chosen = split(held_out, seed)
    assert len(ALL) == len(set(ALL)) == 48 and len(chosen.held_out) == held_out
    assert sorted((*chosen.seen, *chosen.held_out)) == sorted(ALL)
    assert len(set(pairs(chosen.held_out))) == 3 * held_out
    assert set(pairs(chosen.seen)) == set(pairs(ALL))


def test_the_split_depends_on_its_seed_alone():
    assert split(8, 0) == split(8, 0) != split(8, 1)
    with pytest.raises(ShapesError, match=r"^data.shapes.held_out: 13 combinations cannot be held out; at most 12"):
        split(13, 0)


# -------------------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("size", [(48, 48), (32, 32), (64, 32), (32, 96)])
def test_no_shape_is_cut_at_the_border(size, monkeypatch):
    inside = shapes.coverage

    def checked(kind, centre, radius, height, width, around):
        assert not around
        wider = inside(kind, centre + 8, radius, height + 16, width + 16)
        assert torch.allclose(wider[..., 8:-8, 8:-8].sum((-2, -1)), wider.sum((-2, -1)))
        return inside(kind, centre, radius, height, width)

    monkeypatch.setattr(shapes, "coverage", checked)
    for i, combo in enumerate(ALL * 3):
        frames = render(combo, 5, *size, seed=i)
        assert frames.shape == (5, 3, *size) and frames.dtype == torch.uint8


def test_kinds_have_equal_areas():
    centre, radius = torch.tensor([24.0, 24.0]), torch.tensor(9.0)
    for kind in shapes.KINDS:
        area = float(shapes.coverage(kind, centre, radius, 48, 48).sum())
        assert area == pytest.approx(torch.pi * 81, rel=0.02)


def test_rendering_depends_on_its_seed():
    combo = ALL[0]
    assert torch.equal(render(combo, 4, 32, 32, 1), render(combo, 4, 32, 32, 1))
    assert not torch.equal(render(combo, 4, 32, 32, 1), render(combo, 4, 32, 32, 2))
    assert combo.prompt == "a red circle moving left"


# -------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize(("size", "seeds", "least"), [(48, 3, 0.99), (32, 2, 0.95)])
def test_the_oracle_reads_clips_back_from_mp4(size, seeds, least, tmp_path):
    clips, combos = [], ALL * seeds
    for i, combo in enumerate(combos):
        video.write(tmp_path / "clip.mp4", video.Clip(render(combo, 8, size, size, i), shapes.FPS))
        clips.append(video.read(tmp_path / "clip.mp4").frames)
    found = shapes.accuracy(clips, combos)
    assert found["all"] >= least and found["n"] == 48 * seeds
    assert found["interval"][0] < found["all"] <= found["interval"][1]
    assert min(found["colour"], found["shape"], found["direction"]) >= found["all"]


def test_the_oracle_never_sees_the_prompt():
    assert list(inspect.signature(judge).parameters) == ["frames", "around"]


def test_the_oracle_reads_shapes_that_leave_the_frame_and_come_back():
    clips = [render(combo, 16, 48, 48, seed, around=True) for seed in range(2) for combo in ALL]
    assert shapes.accuracy(clips, ALL * 2, around=True)["all"] == 1.0
    assert shapes.accuracy(clips, ALL * 2)["all"] < 0.7  # which it has to be told


def test_a_shape_that_leaves_the_frame_loses_nothing():
    for combo in ALL:
        clip = render(combo, 8, 48, 40, seed=3, around=True).float()
        area = (clip - clip.flatten(2).median(-1).values[..., None, None]).abs().sum((1, 2, 3))
        assert (area / area[0] - 1).abs().max() < 0.02, combo


def clip_of(kind="circle", rgb=(220, 50, 50), start=(24.0, 34.0), end=(24.0, 14.0), frames=8, radius=9.0, ground=20):
    along = torch.linspace(0, 1, frames).unsqueeze(1)
    centres = torch.tensor(start) * (1 - along) + torch.tensor(end) * along
    mask = shapes.coverage(kind, centres, torch.full((frames,), radius), 48, 48).unsqueeze(1)
    return (ground * (1 - mask) + torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1) * mask).to(torch.uint8)


def test_the_oracle_reads_a_plain_clip():
    verdict = judge(clip_of())
    assert (verdict.colour, verdict.kind, verdict.direction) == ("red", "circle", "left") and verdict.overlap > 0.9
    assert verdict.agrees(Combination("red", "circle", "left"))
    assert not verdict.agrees(Combination("red", "circle", "right"))


def test_nothing_is_seen_in_blank_or_noisy_clips():
    noise = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for frames in (torch.zeros(8, 3, 48, 48, dtype=torch.uint8), torch.full((8, 3, 48, 48), 255, dtype=torch.uint8)):
        verdict = judge(frames)
        assert (verdict.colour, verdict.kind, verdict.direction) == (None, None, None)
    for frames in (noise, torch.where(noise[:, :1] > 200, noise, 20)):
        verdict = judge(frames)
        assert verdict.kind is None and verdict.direction is None


def test_a_clip_that_vanishes_for_a_frame_is_nothing():
    frames = clip_of()
    frames[3] = 20
    assert judge(frames).kind is None


def test_a_still_or_slanted_motion_has_no_direction():
    assert judge(clip_of(end=(24.0, 34.0))).direction is None  # still
    assert judge(clip_of(start=(14.0, 14.0), end=(34.0, 34.0))).direction is None  # along the diagonal
    assert judge(clip_of(end=(24.0, 29.0))).direction is None  # a tenth of the frame
    assert judge(clip_of(frames=1)).direction is None


def test_another_colour_or_form_is_not_recognised():
    assert judge(clip_of(rgb=(250, 250, 250))).colour is None
    assert judge(clip_of(rgb=(200, 60, 200))).colour is None
    bar = torch.full((8, 3, 48, 48), 20, dtype=torch.uint8)
    for t in range(8):
        bar[t, 0, 2:46, 30 - 2 * t : 34 - 2 * t] = 220
    assert judge(bar).kind is None
    ring = clip_of(radius=13.0)
    ring[clip_of(radius=9.0, ground=0, rgb=(255, 0, 0))[:, :1].expand_as(ring) > 128] = 20
    assert judge(ring).kind is None


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


# -------------------------------------------------------------------------------------------------------- the folder


def test_a_folder_says_how_its_shapes_move(tmp_path):
    for motion in ("around", "within"):
        chosen = write_folder(tmp_path / motion, **{**RECIPE, "clips": 2}, motion=motion)
        assert chosen == shapes.split_of(tmp_path / motion) and chosen.around == (motion == "around")


def test_a_folder_holds_seen_combinations_and_says_how_it_was_made(tmp_path):
    chosen = write_folder(tmp_path, **{**RECIPE, "clips": 50})
    assert chosen == split(2, 0) == shapes.split_of(tmp_path)
    rows = (tmp_path / "metadata.csv").read_text().splitlines()
    assert rows[0] == "file_name,text" and len(rows) == 51
    assert {row.split(",")[1] for row in rows[1:]} == {combo.prompt for combo in chosen.seen}
    assert len(list(tmp_path.glob("*.mp4"))) == 50
    marker = json.loads((tmp_path / shapes.MARKER).read_text())
    assert marker["recipe"] == {**RECIPE, "clips": 50}
    assert marker["held_out"] == [combo.prompt for combo in chosen.held_out]
    first = video.read(tmp_path / "00000.mp4")
    assert first.frames.shape == (4, 3, 32, 32) and first.fps == shapes.FPS
    assert judge(first.frames).colour in COLOURS


def written(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_finished_folder_is_kept_and_another_recipe_is_rendered_anew(tmp_path):
    write_folder(tmp_path, **RECIPE)
    before = written(tmp_path)
    write_folder(tmp_path, **RECIPE)
    assert written(tmp_path) == before
    write_folder(tmp_path, **{**RECIPE, "seed": 1, "clips": 2})
    after = written(tmp_path)
    assert sorted(after) == ["00000.mp4", "00001.mp4", "metadata.csv", shapes.MARKER]  # no clip of the old recipe
    assert after["00000.mp4"][1] != before["00000.mp4"][1]


def test_an_unfinished_folder_is_rendered_anew(tmp_path, monkeypatch):
    write_folder(tmp_path, **RECIPE)
    whole = {name: content for name, (_, content) in written(tmp_path).items()}
    with monkeypatch.context() as patch:
        patch.setattr(shapes.video, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError):
            write_folder(tmp_path, **{**RECIPE, "clips": 4})
    assert shapes.split_of(tmp_path) is None
    write_folder(tmp_path, **RECIPE)
    assert {name: content for name, (_, content) in written(tmp_path).items()} == whole
    (tmp_path / shapes.MARKER).write_text("{")  # half written
    write_folder(tmp_path, **RECIPE)
    assert {name: content for name, (_, content) in written(tmp_path).items()} == whole


def test_other_folders_have_no_split(tmp_path):
    assert shapes.split_of(tmp_path) is None and shapes.split_of(tmp_path / "missing") is None


@pytest.mark.parametrize("marker", [None, [], {"recipe": {"clips": 3}}, {"recipe": [1]}, {"name": "mine"}])
def test_a_folder_of_someone_else_is_left_as_it_is(tmp_path, marker):
    (tmp_path / "metadata.csv").write_text("mine")
    (tmp_path / "00000.mp4").write_text("mine")
    if marker is not None:
        (tmp_path / shapes.MARKER).write_text(json.dumps(marker))
    before = written(tmp_path)
    assert shapes.split_of(tmp_path) is None
    with pytest.raises(ShapesError, match="holds files that were not rendered here; name a new or an empty folder"):
        write_folder(tmp_path, **RECIPE)
    assert written(tmp_path) == before

"""Differences and rankings: known distributions, the paired t test, coverage where the truth is known, what is left out."""

import math
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest

from stgen.lab import statistics
from stgen.lab.results import Cell, Run


def cell(name, losses, changes=None, clips=None, accuracy=None):
    """losses: by seed; clips: by seed a list of losses by clip."""
    runs = []
    for seed, loss in losses.items():
        per_clip = [[x, x] for x in (clips or {}).get(seed, [loss] * 3)]
        measures = {
            "held_out": {"mean": loss, "per_clip": per_clip},
            "accuracy": accuracy and {"held_out": accuracy[seed]},
        }
        runs.append(Run(seed, Path("run"), "done", measures=measures))
    return Cell(name, changes or {"model.plan": name}, tuple(runs))


def differences(cells, measure="held-out loss"):
    compared = statistics.compare(cells)
    assert compared is not None
    return {one.cell: one for one in compared.differences if one.measure == measure}


def test_student_t_has_the_values_of_the_tables():
    for share, freedom, t in ((0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 30, 2.04227), (0.995, 4, 4.60409),
                              (0.975, 1e6, 1.95997)):  # fmt: skip
        assert statistics.quantile(share, freedom) == pytest.approx(t, rel=1e-4)
        assert statistics.two_sided(t, freedom) == pytest.approx(2 * (1 - share), rel=1e-4)
    assert statistics.two_sided(0.0, 5) == pytest.approx(1)
    assert statistics.two_sided(1.0, 1) == pytest.approx(0.5)  # Cauchy
    assert statistics.two_sided(3.0, 2) == pytest.approx(1 - 3 / math.sqrt(11))  # closed form


def test_two_cells_are_compared_by_the_paired_t_test():
    base, other = {0: 1.0, 1: 2.0, 2: 4.0}, {0: 1.5, 1: 2.2, 2: 4.6}
    one = differences([cell("base", base, {}), cell("other", other)])["other"]
    each = [other[seed] - base[seed] for seed in base]
    half = 4.302653 * stdev(each) / math.sqrt(3)
    assert one.mean == pytest.approx(mean(each))
    assert (one.low, one.high) == (pytest.approx(mean(each) - half), pytest.approx(mean(each) + half))
    assert one.p == pytest.approx(statistics.two_sided(mean(each) / (stdev(each) / math.sqrt(3)), 2))
    assert (one.pairs, one.paired_over) == (3, "seeds")


@pytest.mark.parametrize("cells", [2, 5, 12])
def test_intervals_cover_the_truth_about_as_often_as_they_say(cells):
    """Cells of unequal scatter, seeds that shift all cells alike: 95 % of the intervals hold the true difference."""
    rng, tries, inside, wrong = np.random.default_rng(cells), 400, [], 0
    quantile = {}  # of few values: degrees of freedom rounded to tenths
    for _ in range(tries):
        truth = rng.normal(size=cells)
        scatter = np.exp(0.4 * rng.normal(size=(cells, 1)))
        blocks = statistics.Blocks(truth[:, None] + 5 * rng.normal(size=3) + scatter * rng.normal(size=(cells, 3)))
        p = []
        for i in range(1, cells):
            found, error, freedom = blocks.difference(i, 0)
            assert error is not None
            key = round(freedom, 1)
            quantile.setdefault(key, statistics.quantile(0.975, key))
            off = abs(found - (truth[i] - truth[0]))
            inside.append(off < error * quantile[key])
            p.append(statistics.two_sided(off / error, freedom))
        wrong += min(statistics.holm(p)) < 0.05  # type: ignore[type-var]
    assert 0.925 < np.mean(inside) < 0.98
    assert wrong / tries < 0.09  # at least one false verdict in a study: 5 % if all scattered alike


def test_clips_and_training_both_count():
    """Seeds differ by luck of training and by their clips; taking clips for independent would be far too sure."""
    rng, inside, tries = np.random.default_rng(0), 0, 300
    for _ in range(tries):
        cells = []
        shared = {seed: rng.normal(size=20) for seed in range(4)}  # how hard a clip is: the same for both cells
        for name in ("base", "other"):
            clips = {seed: shared[seed] + rng.normal() * 0.5 + 0.3 * rng.normal(size=20) for seed in range(4)}
            cells.append(cell(name, {seed: x.mean() for seed, x in clips.items()}, clips=clips))
        one = differences(cells)["other"]
        inside += one.low < 0 < one.high
    assert 0.91 < inside / tries < 0.985


def test_one_seed_is_compared_by_its_clips_and_says_so():
    clips = [0.1, 0.5, 0.9, 1.3]
    cells = [
        cell("base", {7: 0.7}, {}, {7: clips}),
        cell("other", {7: 0.9}, {}, {7: [x + 0.2 for x in clips[:3]] + [1.6]}),
    ]
    one = differences(cells)["other"]
    assert one.paired_over == "clips" and one.pairs == 4 and one.low < one.mean < one.high
    compared = statistics.compare(cells)
    assert compared is not None and "nothing about another seed" in compared.method
    other = [cell("base", {7: 0.7}, {}, accuracy={7: 0.5}), cell("other", {7: 0.9}, accuracy={7: 0.6})]
    right = differences(other, "held-out prompts right")["other"]  # one number each: no telling how sure
    assert right.mean == pytest.approx(0.1) and right.low is right.high is right.p is None and not right.distinguishable


def test_clips_that_are_not_the_same_are_not_paired():
    cells = [cell("base", {7: 0.7}, {}, {7: [0.6, 0.8]}), cell("other", {7: 0.9}, None, {7: [0.7, 1.1]})]
    assert differences(cells)["other"].low is not None
    for i, one in enumerate(cells):
        one.runs[0].measures["held_out"]["clips"] = [f"{i}.mp4", "b.mp4"]
    assert differences(cells)["other"].low is None


def test_holm_corrects_step_by_step():
    assert statistics.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def seeds(level, luck=(0.0, 0.3, -0.2), own=(0.001, -0.002, 0.0005)):
    return {seed: level + shared + mine for seed, (shared, mine) in enumerate(zip(luck, own, strict=True))}


def test_a_ranking_keeps_together_what_it_cannot_tell_apart():
    cells = [
        cell("base", seeds(1.0), {}),
        cell("best", seeds(0.5, own=(-0.001, 0.001, 0))),
        cell("same", seeds(1.0005, own=(0, 0.001, -0.001))),
        cell("worst", seeds(2.0, own=(0.002, 0, -0.001))),
    ]
    compared = statistics.compare(cells)
    assert compared is not None
    places = {one.cell: one for one in compared.rankings["held-out loss"]}
    assert compared.rankings["held-out loss"][0].cell == "best"
    assert {name: (one.best, one.worst) for name, one in places.items()} == {
        "best": (1, 1), "base": (2, 3), "same": (2, 3), "worst": (4, 4),
    }  # fmt: skip
    assert places["base"].tied == ("same",) and places["best"].tied == ()
    found = differences(cells)
    assert found["best"].distinguishable and not found["same"].distinguishable
    assert places["worst"].spread == pytest.approx(stdev(seeds(2.0, own=(0.002, 0, -0.001)).values()))


def test_more_right_is_better():
    accuracy = {"base": (0.50, 0.52, 0.51), "good": (0.90, 0.92, 0.92), "bad": (0.10, 0.11, 0.12)}
    cells = [
        cell(name, seeds(1.0), {} if name == "base" else None, accuracy=dict(enumerate(found)))
        for name, found in accuracy.items()
    ]
    compared = statistics.compare(cells)
    assert compared is not None
    assert [one.cell for one in compared.rankings["held-out prompts right"]] == ["good", "base", "bad"]
    assert [one.name for one in compared.measures] == ["held-out loss", "held-out prompts right"]


def test_a_cell_that_lacks_a_seed_is_compared_over_those_it_has():
    whole, part = seeds(1.0), seeds(1.5)
    del part[1]
    cells = [cell("base", whole, {}), cell("part", part), cell("full", seeds(1.2)), cell("none", {})]
    found = differences(cells)
    assert found.keys() == {"part", "full"} and found["part"].pairs == 2 and found["full"].pairs == 3
    assert found["part"].mean == pytest.approx(0.5)  # not moved by the luck of the seed that it lacks
    compared = statistics.compare(cells)
    assert compared is not None
    assert [one.cell for one in compared.rankings["held-out loss"]] == ["base", "full", "part"]


def test_losses_of_other_things_are_not_compared():
    cells = [cell("base", seeds(1.0), {}), cell("codec", seeds(0.1), {"codec.components": 4}), cell("plan", seeds(1.1))]
    assert differences(cells).keys() == {"plan"}


def test_what_does_not_scatter_has_no_interval():
    cells = [cell("base", {0: 1.0, 1: 1.0}, {}), cell("other", {0: 2.0, 1: 2.0})]
    one = differences(cells)["other"]
    assert one.mean == 1.0 and one.low is None and not one.distinguishable


def test_without_a_run_there_is_nothing_to_compare():
    missing = Cell("base", {}, (Run(0, Path("run"), "missing"),))
    assert statistics.compare([missing]) is None
    done = statistics.compare([missing, cell("other", seeds(1.0))])  # the base failed: a ranking, no differences
    assert done is not None and not done.differences and done.rankings["held-out loss"][0].cell == "other"

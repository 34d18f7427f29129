"""The retrieval probe: its questions can be answered, it learns, it repeats itself."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stgen.lab.probes import NORMALISERS, Recaller, Recipe, Task, accuracy, draw, retrieval, run, select, table, train

SMALL = Task(grid=(3, 2, 4), keys=8, values=4, pairs=(2, 5))


def test_every_answer_lies_in_the_video_beside_its_key():
    task, pairs = Task(grid=(3, 2, 3), keys=9, values=5, pairs=(1, 4, 9)), torch.tensor([1, 4, 9, 4])
    batch = draw(task, pairs, torch.Generator().manual_seed(0))
    assert batch.keys.shape == batch.values.shape == (4, 18) and batch.answers.shape == (4, 6)
    for keys, values, answers, number in zip(*(x.tolist() for x in batch), pairs.tolist(), strict=True):
        held = {key: value for key, value in zip(keys[:12], values[:12], strict=True) if key != task.keys}
        assert len(held) == sum(key != task.keys for key in keys[:12]) == number
        assert all((k == task.keys) == (v == task.values) for k, v in zip(keys[:12], values[:12], strict=True))
        assert set(values[12:]) == {task.values}  # a question does not tell its answer
        assert [held[key] for key in keys[12:]] == answers


def test_keys_values_places_and_questions_are_spread_evenly():
    task = Task(grid=(3, 2, 2), keys=6, values=3, pairs=(3,))
    batch = draw(task, torch.full((6000,), 3), torch.Generator().manual_seed(0))
    keys, held = batch.keys[:, :8], batch.keys[:, :8] != 6
    for counts, share in (
        (keys[held].bincount(), 1 / 6),
        (batch.values[:, :8][held].bincount(), 1 / 3),
        (held.sum(0), 1 / 8),
        (batch.keys[:, 8:].flatten().bincount(), 1 / 6),
        (batch.answers.flatten().bincount(), 1 / 3),
    ):
        assert (counts / counts.sum() - share).abs().max() < 0.1 * share


def test_softmax_learns_what_it_could_not_know_at_first():
    untrained = Recaller(SMALL, Recipe(), NORMALISERS["softmax"], seed=0)
    assert 0.15 < accuracy(untrained, 5, 200) < 0.35
    trained = train(SMALL, Recipe(), NORMALISERS["softmax"], steps=150, seed=0, bar=tqdm(disable=True))
    assert accuracy(trained, 2) > 0.9 and accuracy(trained, 5) > 0.9


@pytest.mark.parametrize("name", NORMALISERS)
def test_every_normaliser_trains_every_weight(name):
    model = Recaller(SMALL, Recipe(), NORMALISERS[name], seed=0)
    keys, values, answers = draw(SMALL, torch.tensor([2, 5, 5]), torch.Generator().manual_seed(0))
    cross_entropy(model(keys, values).flatten(0, 1), answers.flatten()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_normalisers_start_from_the_same_weights_and_differ_in_what_they_give():
    models = {name: Recaller(SMALL, Recipe(), section, seed=0) for name, section in NORMALISERS.items()}
    keys, values, _ = draw(SMALL, torch.tensor([5]), torch.Generator().manual_seed(0))
    outputs = {name: model(keys, values) for name, model in models.items()}
    first = models["softmax"]
    for name, model in models.items():
        shared = dict(model.named_parameters())
        assert all(torch.equal(shared[key], parameter) for key, parameter in first.named_parameters())
        others = [other for other in outputs if other not in (name, "poly", "softmax")]  # poly is softmax within 1e-4
        assert not any(torch.allclose(outputs[name], outputs[other], atol=1e-4) for other in others)


def test_a_seed_gives_the_same_rows_again_and_another_seed_others():
    def rows(seed: int):
        return retrieval(SMALL, Recipe(width=16), steps=[30], seeds=[seed], normalisers=["softmax", "linear favor"])

    assert rows(0) == rows(0)
    assert [row.accuracy for row in rows(0)] != [row.accuracy for row in rows(1)]


def test_a_run_leaves_its_numbers_and_a_picture(tmp_path, capsys):
    rows = run(tmp_path / "new", steps=(1, 2), seeds=(0,))
    assert len(rows) == 2 * len(NORMALISERS) * len(Task().pairs)
    written = json.loads((tmp_path / "new" / "probe.json").read_text())
    assert [row["accuracy"] for row in written["rows"]] == [row.accuracy for row in rows]
    assert (tmp_path / "new" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert table(rows) in capsys.readouterr().out
    (one,) = select(rows, normaliser="relu", steps=2, pairs=4)
    assert f"{one:.1%}" in table(rows)

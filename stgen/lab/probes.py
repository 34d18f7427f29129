"""Exact retrieval: can attention with a given normaliser fetch one of many things that it has seen?

The task is associative recall (as in Zoology, arXiv:2312.04927) on the tokens of a short video: key-value pairs lie
scattered over the frames, every token of the last frame holds a key, and the answer is that key's value. One attention
layer without an MLP is enough for softmax, which can put all weight on one place; a linear normaliser must hold all
pairs at once in a state of the head's size. All else is the same: width, data, optimiser, steps, and the weights at the
start. A gap may be one of speed, not of capacity, and so several numbers of steps can be compared.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stgen.attention import spec
from stgen.attention.normalisers import Features, build
from stgen.attention.sinks import Sink
from stgen.ops.dense_attention import dense_attention
from stgen.ops.linear_attention import linear_attention
from stgen.ops.rms_norm import rms_norm
from stgen.step import generator

NORMALISERS: dict[str, spec.Normaliser] = {
    "softmax": spec.Softmax(),
    "off_by_one": spec.OffByOne(),
    "poly": spec.Poly(),
    "relu": spec.Relu(),
    "relu2": spec.Relu2(),
    "linear elu": spec.Linear(features="elu"),
    "linear relu": spec.Linear(features="relu"),
    "linear favor": spec.Linear(features="favor"),
    "linear learned": spec.Linear(features="learned"),
}

# ---------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Task:
    """Recall on a grid of tokens; the last frame asks, the frames before it hold the pairs."""

    grid: tuple[int, int, int] = (4, 4, 8)  # frames, rows, columns
    keys: int = 64
    values: int = 16
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)

    @property
    def questions(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def places(self) -> int:
        """Tokens that may hold a pair."""
        return (self.grid[0] - 1) * self.questions


class Batch(NamedTuple):
    keys: Tensor  # [B, tokens] key of each token; `task.keys` where there is none
    values: Tensor  # [B, tokens] value of each token; `task.values` where there is none
    answers: Tensor  # [B, questions]


def draw(task: Task, pairs: Tensor, g: torch.Generator) -> Batch:
    """Sequences with pairs[b] pairs each: keys all different, places and values random, questions among the keys."""
    b, most = len(pairs), max(task.pairs)
    key = torch.rand(b, task.keys, generator=g).argsort(-1)[:, :most]  # [B, most]; the first pairs[b] are used
    value = torch.randint(task.values, (b, most), generator=g)
    place = torch.rand(b, task.places, generator=g).argsort(-1)[:, :most]
    unused = torch.arange(most) >= pairs[:, None]
    keys = torch.full((b, task.places), task.keys).scatter(1, place, key.masked_fill(unused, task.keys))
    values = torch.full((b, task.places), task.values).scatter(1, place, value.masked_fill(unused, task.values))
    asked = (torch.rand(b, task.questions, generator=g) * pairs[:, None]).long()  # number of the pair
    nothing = torch.full((b, task.questions), task.values)
    return Batch(
        torch.cat([keys, key.gather(1, asked)], dim=1), torch.cat([values, nothing], dim=1), value.gather(1, asked)
    )


# --------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Recipe:
    """What all normalisers share."""

    width: int = 32
    heads: int = 2
    batch: int = 16
    learning_rate: float = 1e-2  # at its highest


class Recaller(nn.Module):
    """Embeddings of key, value and place, one attention layer, and a reading of the value."""

    def __init__(self, task: Task, recipe: Recipe, normaliser: spec.Normaliser, seed: int):
        super().__init__()
        g = generator("probe", seed, "weights")

        def weight(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=g) * std)

        self.task, self.heads = task, recipe.heads
        width, head_dim = recipe.width, recipe.width // recipe.heads
        self.key, self.value = (weight(n + 1, width, std=0.2) for n in (task.keys, task.values))
        self.axes = nn.ParameterList(weight(extent, width, std=0.02) for extent in task.grid)
        self.qkv, self.out = weight(width, 3 * width, std=width**-0.5), weight(width, width, std=width**-0.5)
        self.head = weight(width, task.values, std=width**-0.5)
        self.gains = nn.ParameterList(torch.ones(n) for n in (width, head_dim, head_dim, width))
        self.normaliser: Any = build(normaliser, recipe.heads, head_dim, seed)
        self.sink = Sink(spec.NoSink(), normaliser, recipe.heads, head_dim)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Keys and values [B, tokens] -> logits of the answers [B, questions, task.values]."""
        before, of_query, of_key, after = self.gains
        t, h, w = self.axes
        place = (t[:, None, None] + h[:, None] + w).flatten(0, 2)  # [tokens, width]
        x = self.key[keys] + self.value[values] + place  # [B, tokens, width]
        qkv = (rms_norm(x, before) @ self.qkv).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, tokens, D] each
        asking = slice(self.task.places, None)  # no other token's output is read
        seen = self.attend(rms_norm(q[:, :, asking], of_query), rms_norm(k, of_key), v)
        x = x[:, asking] + seen.transpose(1, 2).flatten(2) @ self.out
        return rms_norm(x, after) @ self.head

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.normaliser, Features):
            return linear_attention(self.normaliser(q, True), self.normaliser(k, False), v)
        return dense_attention(q, k, v, impl="reference", normaliser=self.normaliser, sink=self.sink.logit(q))


# ------------------------------------------------------------------------------------------------------------ training


def train(task: Task, recipe: Recipe, normaliser: spec.Normaliser, steps: int, seed: int, bar: tqdm) -> Recaller:
    """A model after `steps` of Adam, whose rate rises and falls to zero; every batch mixes all numbers of pairs."""
    model = Recaller(task, recipe, normaliser, seed)
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, steps + 1, cycle_momentum=False)
    choices = torch.tensor(task.pairs)
    for step in range(steps):
        g = generator("probe", seed, "step", step)
        pairs = choices[torch.randint(len(choices), (recipe.batch,), generator=g)]
        keys, values, answers = draw(task, pairs, g)
        optimiser.zero_grad()
        cross_entropy(model(keys, values).flatten(0, 1), answers.flatten()).backward()
        optimiser.step()
        schedule.step()
        bar.update()
    return model


@torch.no_grad()
def accuracy(model: Recaller, pairs: int, sequences: int = 64) -> float:
    """Share of questions answered right in sequences of `pairs` pairs that training has not seen."""
    keys, values, answers = draw(model.task, torch.full((sequences,), pairs), generator("probe", "held out", pairs))
    return float((model(keys, values).argmax(-1) == answers).float().mean())


@dataclass(frozen=True)
class Row:
    normaliser: str
    steps: int
    seed: int
    pairs: int
    accuracy: float


def retrieval(
    task: Task,
    recipe: Recipe,
    steps: Sequence[int],
    seeds: Sequence[int],
    normalisers: Sequence[str] = tuple(NORMALISERS),
) -> list[Row]:
    """Train every normaliser with every number of steps and seed, and ask it for every number of pairs."""
    rows = []
    with tqdm(total=sum(steps) * len(seeds) * len(normalisers), unit="step") as bar:
        for number in steps:
            for name in normalisers:
                for seed in seeds:
                    bar.set_description(f"{name}, {number} steps, seed {seed}")
                    model = train(task, recipe, NORMALISERS[name], number, seed, bar)
                    rows += [Row(name, number, seed, pairs, accuracy(model, pairs)) for pairs in task.pairs]
    return rows


# ----------------------------------------------------------------------------------------------------------- reporting


def select(rows: Sequence[Row], **values: object) -> list[float]:
    """Accuracies, one a seed, of the rows that have these values."""
    return [row.accuracy for row in rows if all(getattr(row, key) == value for key, value in values.items())]


def table(rows: Sequence[Row]) -> str:
    """Mean over the seeds, a line for each normaliser and a column for each number of pairs."""
    pairs = sorted({row.pairs for row in rows})
    lines = []
    for steps in sorted({row.steps for row in rows}):
        lines.append(f"{f'{steps} steps, pairs:':<24}" + "".join(f"{n:>8}" for n in pairs))
        for name in dict.fromkeys(row.normaliser for row in rows):
            means = (fmean(select(rows, normaliser=name, steps=steps, pairs=n)) for n in pairs)
            lines.append(f"{name:<24}" + "".join(f"{mean:>8.1%}" for mean in means))
    return "\n".join(lines)


def plot(rows: Sequence[Row], chance: float, path: Path) -> None:
    """Accuracy against pairs as a PNG, a panel for each number of steps; bands are the range of the seeds."""
    from matplotlib.figure import Figure

    budgets, pairs = (sorted({getattr(row, key) for row in rows}) for key in ("steps", "pairs"))
    names = list(dict.fromkeys(row.normaliser for row in rows))
    figure = Figure(figsize=(1.5 + 4 * len(budgets), 4), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0], budgets, strict=True):
        for i, name in enumerate(names):
            values = [select(rows, normaliser=name, steps=steps, pairs=n) for n in pairs]
            style = "--" if name.startswith("linear") else "-"
            width = max(1.6, 9 - 2 * i)  # lines that lie on each other show as stripes
            axes.plot(pairs, [fmean(v) for v in values], style, lw=width, label=name)
            axes.fill_between(pairs, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        axes.axhline(chance, color="grey", lw=1, ls=":", label="chance")
        axes.set_xscale("log", base=2)
        axes.set_xticks(pairs, [str(n) for n in pairs])
        axes.set(xlabel="pairs in the video", ylim=(0, 1.04), title=f"{steps} training steps")
    figure.axes[0].set_ylabel("questions answered right")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def run(output_dir: Path, steps: Sequence[int] = (500,), seeds: Sequence[int] = (0, 1, 2)) -> list[Row]:
    """The probe from end to end: print the table, write probe.json and probe.png into `output_dir`."""
    task, recipe, start = Task(), Recipe(), time.perf_counter()
    rows = retrieval(task, recipe, steps, seeds)
    print(table(rows))
    machine = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start, 1),
    }
    results = {"machine": machine, "task": asdict(task), "recipe": asdict(recipe), "rows": [asdict(r) for r in rows]}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "probe.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(rows, 1 / task.values, output_dir / "probe.png")
    return rows

"""What rounding attention to low bits costs: in words, run against run, as a picture, as JSON, to metrics.jsonl and W&B."""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stgen.lab.tables import percent, table
from stgen.logger import Logger

BITS = (8, 4)
PARTS = ("map", "q", "k", "v")
ROWS = {
    "map": "map",
    "rows": "map, by rows",
    "q": "q",
    "k": "k",
    "v": "v",
    "qkv": "q, k and v",
    "all": "all",
}  # in words
MEANT = (
    "  Error: root of the squared error over that of the squares, a mean over heads and layers. itself: of what is rounded;\n"
    "  output: of what the heads put out when it alone is rounded; prediction: of the model's output when it is rounded in\n"
    "  every layer. Steps: one for each sequence and head (by rows: one for each query). zeros: share of the allowed weights\n"
    "  that are exactly 0. peak: largest weight over the root mean square of those that are not 0, to which the error of a map\n"
    "  is about proportional: zeros stay exact, and cost nothing."
)


@dataclass
class UseErrors:
    """What rounding costs one use of a mixer; numbers by name, [heads] each, NaN where a head has none."""

    layer: int
    mixer: str
    normaliser: str  # of its heads; empty where there is nothing to measure
    note: str  # why, or what it lacks
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class RunErrors:
    """What rounding costs a run.

    Names of values: `{part}/int{bits}` is the error of a part itself, with `/output` behind it that of the heads' output
    (`rows/...`: of the map with a step for each row); `zeros` and `zeros/int{bits}` the share of allowed weights that
    are 0 before and after; `largest/{part}` the largest magnitude of a sequence, a mean over sequences, of which a step
    is the (2^bits - 1)th part for maps and the (2^(bits - 1) - 1)th for others; `peak` the largest weight over the root
    mean square of those that are not 0.
    """

    name: str
    uses: list[UseErrors]
    prediction: dict[str, float]  # `{map | qkv | all}/int{bits}`: error of the model's output

    @property
    def normaliser(self) -> str:
        return " + ".join(dict.fromkeys(one.normaliser for one in self.uses if one.values)) or "none measured"

    @property
    def means(self) -> dict[str, float]:
        """Over heads and layers, by name."""
        return {name: self.mean(name) for one in self.uses for name in one.values}

    def mean(self, name: str) -> float:
        """NaN where no head has it."""
        found = [one.values[name] for one in self.uses if name in one.values]
        return float(torch.cat(found).nanmean()) if found else math.nan


# ------------------------------------------------------------------------------------------------------------- in words


def in_words(runs: Sequence[RunErrors]) -> str:
    """What rounding costs each run, part by part; then the weights that are zeros; then layer by layer."""
    costs = [["run", "normaliser", "rounded"]]
    costs[0] += [f"int{bits} {kind}" for bits in BITS for kind in ("itself", "output", "prediction")]
    zeros = [["run", "zeros", *(f"zeros in int{bits}" for bits in BITS), "peak"]]
    layers = [["run", "layer", "mixer", "normaliser", *(f"output, map in int{bits}" for bits in BITS), "zeros"]]
    for run in runs:
        costs += [
            [run.name, run.normaliser, words, *cells] for row, words in ROWS.items() if any(cells := _costs(run, row))
        ]
        shares = [_share(run.mean(name)) for name in ("zeros", *(f"zeros/int{bits}" for bits in BITS))]
        zeros += [[run.name, *shares, f"{run.mean('peak'):.3g}"]] if shares[0] else []
        for one in run.uses:
            spread = [_spread(one, name) for name in (*(f"map/int{bits}/output" for bits in BITS), "zeros")]
            layers.append([run.name, str(one.layer), one.mixer, one.normaliser, *spread])
    notes = [
        f"  {run.name}, layer {one.layer}, {one.mixer}: {one.note}" for run in runs for one in run.uses if one.note
    ]
    return "\n\n".join([_filled(costs) + "\n" + MEANT, _filled(zeros), "\n".join([_filled(layers), *notes])])


def _costs(run: RunErrors, row: str) -> list[str]:
    """The cells of a row: itself, output and prediction for each number of bits; empty where there is nothing."""
    cells = []
    for name in (f"{row}/int{bits}" for bits in BITS):
        cells += [run.mean(name), run.mean(f"{name}/output"), run.prediction.get(name, math.nan)]
    return [_share(cell) for cell in cells]


def _filled(lines: list[list[str]]) -> str:
    return table([[cell or "–" for cell in line] for line in lines])


def _share(x: float) -> str:
    return "" if math.isnan(x) else percent(x)


def _spread(one: UseErrors, name: str) -> str:
    """Mean over heads, and the lowest and highest; empty where there is nothing."""
    known = one.values[name][~one.values[name].isnan()] if name in one.values else torch.empty(0)
    if not len(known):
        return ""
    low, middle, high = (_share(float(x)) for x in (known.min(), known.mean(), known.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


# --------------------------------------------------------------------------------------------------------- run and run


def compare(runs: Sequence[RunErrors]) -> list[dict[str, Any]]:
    """Every other run against the first: what rounding costs both, and how many times less it costs the other one."""
    found, first = [], _outputs(runs[0])
    for run in runs[1:]:
        for name, cost in _outputs(run).items():
            if name in first and cost > 0:
                ratio = first[name] / cost
                found.append({"run": run.name, "of": name, "error": cost, "first": first[name], "times_less": ratio})
    return found


def _outputs(run: RunErrors) -> dict[str, float]:
    """Errors of the heads' output and of the prediction, where there are any."""
    outputs = {name: mean for name, mean in run.means.items() if name.endswith("/output") and not math.isnan(mean)}
    return outputs | {f"{name}/prediction": cost for name, cost in run.prediction.items()}


def compared_in_words(compared: Sequence[dict[str, Any]], runs: Sequence[RunErrors]) -> str:
    """For each run a table: by how much rounding costs it less than the first, for each part and number of bits."""
    tables = []
    for run in runs[1:]:
        words = {one["of"]: _verdict(one) for one in compared if one["run"] == run.name}
        lines = [["rounded", "error of", *(f"int{bits}" for bits in BITS)]]
        for what in ("output", "prediction"):
            for row, said in ROWS.items():
                cells = [words.get(f"{row}/int{bits}/{what}", "") for bits in BITS]
                lines += [[said, what, *cells]] if any(cells) else []
        title = f"{run.name} ({run.normaliser}) against {runs[0].name} ({runs[0].normaliser})"
        tables.append(f"{title}\n{_filled(lines)}")
    return "\n\n".join(tables)


def _verdict(one: dict[str, Any]) -> str:
    ratio = one["times_less"]
    verdict = f"{ratio:.2f} times less" if ratio >= 1 else f"{1 / ratio:.2f} times more"
    return f"{verdict} ({_share(one['error'])} against {_share(one['first'])})"


# ---------------------------------------------------------------------------------------------------- picture and files


def draw(runs: Sequence[RunErrors], path: Path) -> Path:
    """Layer by layer: the error of the output under a rounded map, for each number of bits, and the zeros."""
    from matplotlib.figure import Figure

    panels = {f"map/int{bits}/output": f"error of the output, map in int{bits}" for bits in BITS}
    panels["zeros"] = "share of the allowed weights that are 0"
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for run in runs:
            measured = [(i, one.values[name]) for i, one in enumerate(run.uses) if name in one.values]
            means = [float(values.nanmean()) for _, values in measured]
            [line] = axes.plot([i for i, _ in measured], means, "o-", label=f"{run.name} ({run.normaliser})")
            for i, values in measured:
                axes.plot([i] * len(values), values, ".", color=line.get_color(), alpha=0.4)  # its heads
        axes.set(title=title, xlabel="attention, in the order of the plan")
        axes.set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2)
    figure.savefig(path, dpi=120)
    return path


def as_json(runs: Sequence[RunErrors]) -> list[dict[str, Any]]:
    """Every run, layer and head; null stands for what is not there."""
    return [
        {
            "run": run.name,
            "normaliser": run.normaliser,
            "mean": _plain(run.means),
            "prediction": _plain(run.prediction),
            "layers": [
                {"layer": one.layer, "mixer": one.mixer, "normaliser": one.normaliser, "note": one.note}
                | {"heads": {name: [_digits(x) for x in values.tolist()] for name, values in one.values.items()}}
                for one in run.uses
            ],
        }
        for run in runs
    ]


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _digits(value) for name, value in values.items()}


def _digits(x: float) -> float | None:
    return float(f"{x:.6g}") if math.isfinite(x) else None


def log(args: Namespace, out: Path, runs: Sequence[RunErrors], drawn: Path) -> None:
    """Means, a table of them all and the picture to metrics.jsonl and W&B."""
    group = runs[0].name
    logger = Logger(
        out, vars(args), mode=args.wandb, project="stgen", group=group, name=f"{group}-quantise", job_type="quantise"
    )
    try:
        rows = []
        for run in runs:
            found = run.means | {f"{name}/prediction": cost for name, cost in run.prediction.items()}
            known = {name: value for name, value in found.items() if not math.isnan(value)}
            logger.log(0, {f"quantise/{run.name}/{name}": value for name, value in known.items()})
            rows += [[run.name, run.normaliser, name, value] for name, value in known.items()]
        logger.table(0, "quantise/all", ["run", "normaliser", "of", "mean"], rows)
        logger.image(0, "quantise/picture", drawn)
    finally:
        logger.finish()
    print(logger.where)

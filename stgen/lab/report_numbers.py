"""Numbers of a study's results, found and written out."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stgen.flops import readable
from stgen.lab.results import Cell, Difference, Measure, Ranked, Results, Run

NONE = "–"
NAMED = 6  # cells that a sentence lists; the table has them all
HELD_OUT = Measure("held-out loss", ("held_out", "mean"), True)


def value(run: Run, path: Sequence[str]) -> float | None:
    """The number at `path` of a run's measures; None where there is none."""
    found: Any = run.measures
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    finite = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if finite else None


def values(cell: Cell, path: Sequence[str]) -> list[float]:
    """Over the runs of a cell."""
    return [found for run in cell.done if (found := value(run, path)) is not None]


def mean(cell: Cell, path: Sequence[str]) -> float | None:
    found = values(cell, path)
    return statistics.fmean(found) if found else None


def spread(cell: Cell, path: Sequence[str]) -> float | None:
    """Standard deviation over the runs; None of a single one."""
    found = values(cell, path)
    return statistics.stdev(found) if len(found) > 1 else None


def main_measure(results: Results) -> Measure:
    """What the study is decided by."""
    return results.comparison.measures[0] if results.comparison and results.comparison.measures else HELD_OUT


def is_share(measure: Measure) -> bool:
    """Whether a measure is a share of clips, which is told in percent."""
    return measure.path[0] == "accuracy"


def ordered(results: Results) -> list[Cell]:
    """The cells that were measured: the base, then the others, best first by the main measure."""
    measure, base = main_measure(results), results.cells[0]
    others = [cell for cell in results.cells[1:] if cell.done]

    def key(cell: Cell) -> tuple[bool, float]:
        found = mean(cell, measure.path)
        worth = math.inf if found is None else found if measure.lower_is_better else -found
        return not _ranked(results, cell), worth

    return ([base] if base.done else []) + sorted(others, key=key)


def comparable(results: Results) -> list[Cell]:
    """Those of them whose main measure means what the base's does: a loss under another objective is something else."""
    return [cell for cell in ordered(results) if _ranked(results, cell)]


def _ranked(results: Results, cell: Cell) -> bool:
    return results.comparison is None or ranked(results, cell.name, main_measure(results).name) is not None


def difference(results: Results, cell: str, measure: str) -> Difference | None:
    found = results.comparison.differences if results.comparison else ()
    return next((one for one in found if (one.cell, one.measure) == (cell, measure)), None)


def ranked(results: Results, cell: str, measure: str) -> Ranked | None:
    found = results.comparison.rankings.get(measure, ()) if results.comparison else ()
    return next((one for one in found if one.cell == cell), None)


def flops_of(cell: Cell) -> tuple[float | None, float | None]:
    """FLOPs of a step, executed and if dense: of the plan, else as measured."""
    executed, dense = cell.flops_per_step, cell.dense_flops_per_step
    return (
        mean(cell, ("cost", "flops_per_step")) if executed is None else executed,
        mean(cell, ("cost", "dense_flops_per_step")) if dense is None else dense,
    )


def steps_of(cell: Cell) -> float | None:
    return mean(cell, ("steps",)) if cell.steps is None else cell.steps


def total_flops(cell: Cell) -> float | None:
    """Executed over the whole training."""
    steps, executed = steps_of(cell), flops_of(cell)[0]
    return None if steps is None or executed is None else steps * executed


# ---------------------------------------------------------------------------------------------------------- in writing


def number(x: float | None, digits: int = 3) -> str:
    """To so many significant digits, without powers of ten where they can be helped."""
    if x is None:
        return NONE
    if x == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(x)))
    text = f"{x:,.{max(0, places)}f}" if -3 <= digits - 1 - places < 7 else f"{x:.{digits - 1}e}"
    return minus(text)


def minus(text: str) -> str:
    return text.replace("-", "−")


def places_for(size: float) -> int:
    """Decimals that show two digits of a number of such a size, and no more than six."""
    return 4 if size <= 0 else min(6, max(0, 1 - math.floor(math.log10(size))))


def with_spread(cell: Cell, path: Sequence[str], percent: bool = False) -> str:
    """`0.2622 ± 0.0031`: mean and standard deviation over seeds."""
    middle, around = mean(cell, path), spread(cell, path)
    if middle is None:
        return NONE
    if percent:
        return f"{middle:.0%}" + (f" ± {100 * around:.0f}" if around is not None else "")
    if around is None:
        return number(middle, 4)
    places = min(places_for(around), places_for(abs(middle)) + 2)
    return minus(f"{middle:.{places}f} ± {around:.{places}f}")


def signed(x: float, places: int) -> str:
    return minus(f"{x:+.{places}f}")


def interval(one: Difference, percent: bool = False) -> str:
    """`−0.016 [−0.020, −0.012]`, in points for shares."""
    middle, low, high = (None if x is None else x * (100 if percent else 1) for x in (one.mean, one.low, one.high))
    assert middle is not None
    if low is None or high is None:
        return signed(middle, places_for(abs(middle))) + " [unknown]"
    places = places_for(max((high - low) / 2, abs(middle) / 100))
    return f"{signed(middle, places)} [{signed(low, places)}, {signed(high, places)}]"


def count(x: float | None, unit: str = "") -> str:
    return NONE if x is None else readable(x, unit)


def several(names: Sequence[str]) -> str:
    """`a, b and c`"""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""


def plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def level(x: float, share: bool) -> str:
    """A number of a measure by itself."""
    return f"{x:.0%}" if share else number(x, 4)


def place_words(best: int, worst: int) -> str:
    """`2` or `1–3`"""
    return str(best) if best == worst else f"{best}–{worst}"


def whole(x: float | None) -> str:
    return NONE if x is None else f"{x:,.0f}"


def percent(x: float | None) -> str:
    return NONE if x is None else minus(f"{100 * x:.2g} %")


def listed(items: Sequence[str], most: int = NAMED, where: str = "the table") -> str:
    """All of a few; of many the first, and how many more and where."""
    if len(items) <= most + 1:
        return several(items)
    return f"{', '.join(items[:most])} and {len(items) - most} more (in {where})"


def changes_words(changes: Mapping[str, Any]) -> str:
    if not changes:
        return NONE
    return ", ".join(f"`{key}: {plain(one)}`" for key, one in changes.items())


def plain(one: Any) -> str:
    """A value of a config on one line, without quotes."""
    if isinstance(one, dict):
        return "{" + ", ".join(f"{key}: {plain(value)}" for key, value in one.items() if value is not None) + "}"
    return one if isinstance(one, str) else json.dumps(one, ensure_ascii=False).replace('"', "")

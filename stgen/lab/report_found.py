"""What a report says first: what was asked, what was found and how surely, what was varied and what was held."""

from collections.abc import Iterator, Sequence

from stgen.lab.report_numbers import (
    NAMED,
    NONE,
    changes_words,
    comparable,
    difference,
    interval,
    is_share,
    level,
    listed,
    main_measure,
    mean,
    minus,
    number,
    ordered,
    percent,
    places_for,
    plural,
    several,
    signed,
    total_flops,
)
from stgen.lab.report_page import Block, Bullets, Heading, Paragraph, Table, Verbatim
from stgen.lab.results import Difference, Measure, Results

BRIEFLY = 3  # cells that are listed of a measure that is not the main one
SAME = 0.005  # of a cost; less is not worth a word


def opening(results: Results) -> Iterator[Block]:
    if results.about:
        yield Paragraph(results.about)
    runs = [run for cell in results.cells for run in cell.runs]
    done = sum(run.status == "done" for run in runs)
    seeds = sorted({len(cell.runs) for cell in results.cells})
    each = plural(seeds[0], "seed") + " each" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds each"
    state = f"{done} of {plural(len(runs), 'run')} {'is' if done == 1 else 'are'} measured"
    state = state if done < len(runs) else "all runs are measured" if done > 1 else "its run is measured"
    yield Paragraph(f"{plural(len(results.cells), 'cell')}, {each}; {state}. The base is **{results.cells[0].name}**.")
    same = comparable(results)
    if other := [f"**{cell.name}**" for cell in ordered(results) if cell not in same]:
        yield Paragraph(
            f"**Not to be compared by {main_measure(results).name}:** {several(other)}. It is another quantity under "
            "another codec, objective or data, or was not measured."
        )


def found(results: Results) -> Iterator[Block]:
    yield Heading("What was found")
    known = ordered(results)
    if results.comparison is None or not results.comparison.measures or len(known) < 2:
        alone = f"**{known[0].name}** alone" if known else "Nothing"
        yield Paragraph(f"{alone} was measured, so there is nothing to compare yet.")
        return
    first, *others = results.comparison.measures
    lines = [*_first_place(results, first), *_against_base(results, first), *_price(results, first)]
    lines += [line for measure in others for line in _against_base(results, measure, brief=True)]
    yield Bullets(lines)
    yield Paragraph(_how_sure(results, first))


def _first_place(results: Results, measure: Measure) -> list[str]:
    """Who comes first by the measure, and who cannot be told from it."""
    assert results.comparison is not None
    ranking = results.comparison.rankings.get(measure.name, ())
    if len(ranking) < 2:
        return []
    best = ranking[0]
    mine = level(best.mean, is_share(measure))
    word = "Lowest" if measure.lower_is_better else "Highest"
    if len(best.tied) == len(ranking) - 1:
        return [
            f"{word} {measure.name}: **{best.cell}**, {mine}; but no cell is distinguishable from it, so no order "
            "among them is told."
        ]
    tied = f"not distinguishable from it: {listed(best.tied)}" if best.tied else "distinguishable from each other cell"
    return [f"{word} {measure.name}: **{best.cell}**, {mine}; {tied}."]


def _against_base(results: Results, measure: Measure, brief: bool = False) -> list[str]:
    """What is better and worse than the base, by how much and how surely; `brief` says it in one line."""
    base, found = results.cells[0].name, [difference(results, cell.name, measure.name) for cell in ordered(results)]
    found = [one for one in found if one is not None]
    sure = [one for one in found if one.distinguishable]
    better = [one for one in sure if (one.mean < 0) == measure.lower_is_better]
    worse = [one for one in sure if one not in better]
    unsure = [one for one in found if not one.distinguishable and one.low is not None]
    unknown = [one for one in found if one.low is None and not one.distinguishable]
    share = is_share(measure)
    most, where = (BRIEFLY, "`results.jsonl`") if brief else (NAMED, "the table")
    lines = [
        f"{kind} than {base} in {measure.name} (95 % intervals in brackets): "
        f"{listed([_by(one, share) for one in group], most, where)}."
        for kind, group in (("Better", better), ("Worse", worse))
        if group
    ]
    if brief:
        rest = f"; the other {plural(len(unsure), 'cell')} not distinguishable from it" if sure and unsure else ""
        none = f"No cell is distinguishable from {base} in {measure.name}."
        return [lines[0][:-1] + rest + ".", *lines[1:]] if lines else [none] if unsure else []
    if unsure:
        names = listed([f"**{one.cell}** ({interval(one, share)})" for one in unsure])
        lines.append(f"Not distinguishable from {base} in {measure.name}: {names}.")
    if unknown:
        names = listed([f"**{one.cell}** by {signed(one.mean, places_for(abs(one.mean)))}" for one in unknown])
        lines.append(f"Different from {base}, with nothing to tell how surely: {names}.")
    return lines


def _by(one: Difference, share: bool) -> str:
    """`**local** by 0.024 (0.018 to 0.030, p < 0.001)`"""
    scale = 100 if share else 1
    size, low, high = (None if x is None else scale * x for x in (one.mean, one.low, one.high))
    assert size is not None
    if size < 0:
        size, low, high = -size, None if high is None else -high, None if low is None else -low
    unit = " points" if share else ""
    if low is None or high is None:
        return f"**{one.cell}** by {number(size)}{unit}"
    places = places_for(max((high - low) / 2, size / 100))
    p = "" if one.p is None else ", p < 0.001" if one.p < 0.001 else f", p = {one.p:.2g}"
    between = minus(f"{low:.{places}f} to {high:.{places}f}")
    return f"**{one.cell}** by {size:.{places}f}{unit} ({between}{p})"


def _price(results: Results, measure: Measure) -> list[str]:
    """What the cell in first place costs beside the base."""
    base = results.cells[0]
    others = [cell for cell in ordered(results) if cell.name != base.name]
    if not others or not base.done:
        return []
    best = others[0]
    one = difference(results, best.name, measure.name)
    if one is None or not one.distinguishable or (one.mean < 0) != measure.lower_is_better:
        return []
    words = [
        _ratio(total_flops(best), total_flops(base), "FLOPs in training"),
        _ratio(
            mean(best, ("cost", "step_ms")), mean(base, ("cost", "step_ms")), "time a step (measured, not repeatable)"
        ),
        _ratio(mean(best, ("cost", "parameters")), mean(base, ("cost", "parameters")), "parameters"),
    ]
    return [f"Beside {base.name}, **{best.name}** takes {several([word for word in words if word])}."]


def _ratio(a: float | None, b: float | None, what: str) -> str:
    if not a or not b:
        return ""
    return f"the same {what}" if abs(a / b - 1) < SAME else f"{a / b:.3g} times the {what}"


def _how_sure(results: Results, measure: Measure) -> str:
    """What the differences were paired over, and the method."""
    assert results.comparison is not None
    found = [one for one in results.comparison.differences if one.measure == measure.name]
    by_clip = [one.pairs for one in found if one.paired_over == "clips"]
    by_seed = [one.pairs for one in found if one.paired_over == "seeds"]
    kinds = {"seed": by_seed, "held-out clip": by_clip}
    words = [f"by {_range(pairs, what)}" for what, pairs in kinds.items() if pairs]
    paired = f"Differences are paired {several(words)}. " if words else ""
    return f"**How sure.** {paired}{results.comparison.method}"


def _range(numbers: Sequence[int], what: str) -> str:
    low, high = min(numbers), max(numbers)
    return plural(high, what) if low == high else f"{low} to {plural(high, what)}"


def varied(results: Results) -> Iterator[Block]:
    yield Heading("What was varied, and what was held")
    keys: dict[str, list[str]] = {}
    for cell in results.cells[1:]:
        for key in cell.changes:
            keys.setdefault(key, []).append(cell.name)
    if keys:
        yield Bullets([f"`{key}`: {listed(names)}" for key, names in keys.items()])
    rows = [
        (cell.name, changes_words(cell.changes), changes_words(cell.solved), percent(cell.mismatch))
        for cell in results.cells
    ]
    header = ("cell", "changes of the base", "chosen by the budget", "mismatch left")
    used = [i for i in range(4) if i < 2 or any(row[i] != NONE for row in rows)]
    yield Table([header[i] for i in used], [[row[i] for i in used] for row in rows])
    but = " but what the budget chose" if any(cell.solved for cell in results.cells) else ""
    held = f"Everything else{but} is the base's"
    held += ": data, codec, objective, optimiser, draws of order, noise, times and dropout." if results.text else "."
    where = f" (`{results.base}`)" if results.base else ""
    yield Paragraph(f"**Held.** {results.budget.words} {held}{where}".replace("**Held.**  ", "**Held.** "))
    if results.text:
        yield Verbatim("The study file", results.text)

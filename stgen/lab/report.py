"""The page that tells a study: report.md and report.html, results.csv, results.jsonl and plots/.

Every sentence is made from the numbers, and none says that a cell is better without the interval that says how sure.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stgen.lab import report_clips, report_files, report_found, report_plots
from stgen.lab.report_numbers import (
    NONE,
    count,
    difference,
    flops_of,
    interval,
    is_share,
    main_measure,
    mean,
    number,
    ordered,
    percent,
    place_words,
    plain,
    plural,
    ranked,
    several,
    steps_of,
    total_flops,
    whole,
    with_spread,
)
from stgen.lab.report_page import Block, Bullets, Heading, Paragraph, Picture, Table, Verbatim, markdown, page
from stgen.lab.results import Cell, Results


def write(results: Results, folder: Path) -> Path:
    """Write the report of a study into `folder`, over an earlier one; returns report.html."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for old in (*plots.glob("*.png"), *plots.glob("*.gif")):
        old.unlink()
    title, blocks = results.name, list(_blocks(results, plots))
    _put(folder / "report.md", markdown(title, blocks, folder))
    _put(folder / "report.html", page(title, blocks))
    _put(
        folder / "results.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in report_files.lines(results)),
    )
    _put(folder / "results.csv", report_files.table(results))
    return folder / "report.html"


def _blocks(results: Results, plots: Path) -> Iterator[Block]:
    yield from report_found.opening(results)
    yield from report_found.found(results)
    yield from report_found.varied(results)
    yield from _numbers(results, plots)
    yield from _costs(results, plots)
    yield from _loss(results, plots)
    yield from _clips(results, plots)
    yield from _attention(results, plots)
    yield from _not_here(results)
    yield from _method(results)


def _numbers(results: Results, plots: Path) -> Iterator[Block]:
    cells = ordered(results)
    if not cells:
        return
    yield Heading("The numbers")
    measure, base = main_measure(results), results.cells[0].name
    shares = [
        one for one in (("seen",), ("held_out",)) if any(mean(cell, ("accuracy", *one)) is not None for cell in cells)
    ]
    names = {"seen": "prompts right, seen", "held_out": "prompts right, never trained"}
    header = ["cell", measure.name, f"less {base}'s [95 %]", "place", *(names[one[0]] for one in shares), "steps"]
    header += ["FLOPs in all", "ms a step"]
    rows = []
    for cell in cells:
        one, place = difference(results, cell.name, measure.name), ranked(results, cell.name, measure.name)
        rows.append(
            [
                f"**{cell.name}**" if cell.name == base else cell.name,
                with_spread(cell, measure.path, is_share(measure)),
                interval(one, is_share(measure)) if one else NONE,
                place_words(place.best, place.worst) if place else NONE,
                *(with_spread(cell, ("accuracy", *one), percent=True) for one in shares),
                whole(steps_of(cell)),
                count(total_flops(cell)),
                number(mean(cell, ("cost", "step_ms"))),
            ]
        )
    yield Table(header, rows)
    yield Paragraph(
        "Means over seeds, ± their standard deviation where there are several; the cells in order of the first column. A place "
        "such as 1–3 says that the cell is surely neither above nor below those places. Steps may differ where cells spend "
        "the same FLOPs or time."
    )
    for i, one in enumerate(results.comparison.measures if results.comparison else ()):
        path = report_plots.differences(results, one, plots / f"differences-{_slug(one.name)}.png")
        if path and (i == 0 or is_share(one)):
            yield Picture(path, f"{one.name.capitalize()}: paired differences to {base} with 95 % intervals.")
        elif path:
            path.unlink()


def _costs(results: Results, plots: Path) -> Iterator[Block]:
    cells = ordered(results)
    if not cells:
        return
    yield Heading("Quality against cost")
    if path := report_plots.pareto(results, plots / "pareto.png"):
        yield Picture(
            path,
            "Quality against cost. Bars are the 95 % intervals of the paired differences to the base, which has none; the grey "
            "line joins the cells that none beats in both. FLOPs are counted; times are measured and not repeatable.",
        )
    rows = []
    for cell in cells:
        executed, dense = flops_of(cell)
        parameters = mean(cell, ("cost", "parameters"))
        rows.append(
            [
                cell.name,
                count(cell.parameters if parameters is None else parameters),
                count(executed),
                count(dense),
                *(count(mean(cell, ("cost", key))) for key in ("tokens_per_second",)),
                number(mean(cell, ("cost", "step_ms"))),
                count(mean(cell, ("cost", "peak_memory_bytes")), "B"),
                number(mean(cell, ("cost", "tflops"))),
                percent(mean(cell, ("cost", "mfu"))),
            ]
        )
    header = ["cell", "parameters", "FLOPs a step", "if dense", "tokens/s", "ms a step", "memory", "TFLOP/s", "MFU"]
    yield Table(header, rows)
    yield Paragraph(
        "FLOPs of an optimiser step as executed, and as they would be if every query attended every key of its sequence. MFU: "
        "FLOPs of the forward pass and twice that of the backward pass, by those of the fastest of several square matrix "
        f"products in the same type on the same device. Memory: {_memory(cells)}."
    )


def _memory(cells: Sequence[Cell]) -> str:
    """Where the numbers come from, as the runs say."""
    costs = [run.measures["cost"] for cell in cells for run in cell.done if run.measures and run.measures.get("cost")]
    return several(list(dict.fromkeys(str(cost.get("memory", "as measured")) for cost in costs))) or "not known"


def _loss(results: Results, plots: Path) -> Iterator[Block]:
    pictures = []
    if path := report_plots.by_time(results, plots / "by_time.png"):
        pictures.append(
            Picture(
                path,
                "Held-out loss by noise level: a point is the mean of a bin; the bins are equally likely in training. Single "
                "bins scatter more than the mean of all, for which alone intervals are given.",
            )
        )
    if path := report_plots.curves(results, plots / "curves.png"):
        words = "Training loss, smoothed, a mean over seeds, against steps, executed FLOPs and seconds."
        pictures.append(Picture(path, words + " The same draws in every cell, so bumps are shared."))
    if pictures:
        yield Heading("Where and when the loss differs")
        yield from pictures


def _clips(results: Results, plots: Path) -> Iterator[Block]:
    blocks = []
    clips = report_clips.sampled(results)
    prompts = report_clips.common_prompts(clips) if clips else []
    if prompts:
        words = "The same prompt and seed in every cell, frames from first to last."
        blocks.append(Picture(report_clips.strip(clips, prompts, plots / "strip.png"), words))
        if path := report_clips.animation(clips, prompts, plots / "strip.gif"):
            words = (
                f"The same clips moving: columns are cells; rows, from the top: {several([f'“{p}”' for p in prompts])}."
            )
            blocks.append(Picture(path, words))
    if table := _clip_table(results):
        blocks += table
    if blocks:
        yield Heading("Sampled clips")
        yield from blocks


# Of the table of clips: words, where the number of a run is, and where that of real clips.
CLIP_COLUMNS = (
    ("", ("frechet", "value"), ("frechet", "real")),  # its name depends on the features
    ("MMD²", ("mmd", "value"), ("mmd", "real")),
    ("change", ("flicker", "change"), ("flicker", "real", "change")),
    ("flicker", ("flicker", "flicker"), ("flicker", "real", "flicker")),
    ("consistency", ("flicker", "consistency"), ("flicker", "real", "consistency")),
    ("nearest training clip", ("nearest", "median"), ("nearest", "real", "median")),
    ("of real clips'", ("nearest", "ratio"), ()),
)


def _clip_table(results: Results) -> list[Block]:
    cells = [cell for cell in ordered(results) if any(mean(cell, path) is not None for _, path, _ in CLIP_COLUMNS)]
    if not cells:
        return []
    some: Any = next(run.measures for run in cells[0].done if run.measures)
    name = (some.get("frechet") or {}).get("name", "Fréchet distance")
    columns = [one for one in CLIP_COLUMNS if any(mean(cell, one[1]) is not None for cell in cells)]
    rows = [[cell.name, *(with_spread(cell, path) for _, path, _ in columns)] for cell in cells]
    rows.append(["real, held out", *(with_spread(cells[0], path) if path else NONE for _, _, path in columns)])
    header = ["cell", *(words or name for words, _, _ in columns)]
    told = [_distances_explained(some, name), _pixels_explained(some), _nearest_explained(some)]
    return [Table(header, rows), *(Paragraph(one) for one in told if one)]


def _distances_explained(some: Any, name: str) -> str:
    about = some.get("frechet") or some.get("mmd")
    if not about:
        return ""
    kernel = (some.get("mmd") or {}).get("kernel", "")
    words = (
        f"**{name}** and squared maximum mean discrepancy ({'RBF' if kernel == 'rbf' else kernel} kernel, unbiased) are between "
        f"{about['n']} sampled and {about['n_training']} training clips of a run, on features of {about['features']}."
    )
    if name != "FVD":
        words += " It is no FVD, which is of I3D's features."
    if "random" in about["features"]:
        words += " Features of random weights tell that clips differ, not how good they look."
    return words + (
        " The Fréchet distance is biased upwards by so few clips; the last row is what "
        f"{about['n_held_out']} real held-out clips get (of the base)."
    )


def _pixels_explained(some: Any) -> str:
    about = some.get("flicker")
    return about and (
        "**Change** is the mean absolute difference of a frame and the next, **flicker** that of the second difference in "
        f"time, both in {about['unit']}; **consistency** the correlation of a frame and the next. By themselves they are neither "
        "good nor bad: compare with the real clips."
    )


def _nearest_explained(some: Any) -> str:
    about = some.get("nearest")
    return about and (
        f"**Nearest training clip** is the median distance to it in pixels ({about['unit']}), of {about.get('looked_at')} of "
        f"{about.get('of')} training clips; far below that of the real clips would mean that clips are copied."
    )


def _attention(results: Results, plots: Path) -> Iterator[Block]:
    drawn = report_clips.masks(results, plots / "masks.png")
    cells = [
        cell for cell in ordered(results) if any(run.measures and run.measures.get("attention") for run in cell.done)
    ]
    if drawn is None and not cells:
        return
    yield Heading("What attention may see, and what it attends")
    if drawn:
        path, left_out = drawn
        more = f" Not drawn: {'; '.join(left_out)}." if left_out else ""
        yield Picture(
            path,
            "Masks. Left: rows are queries, columns keys; blue may be attended. Right: what the query in the red square sees, "
            f"frame by frame.{more}",
        )
    if cells:
        keys = ("entropy", "sink_mass", "density", "of_clip")
        rows = [[cell.name, *(number(mean(cell, ("attention", key))) for key in keys)] for cell in cells]
        yield Table(["cell", "entropy", "mass on sinks", "density", "of the clip"], rows)
        yield Paragraph(
            "Means over layers, heads, clips and noise levels. Entropy is that of a row of the map as a share of an even row's; "
            "density the share of the pairs of a sequence that is attended, and of all pairs of the clip."
        )


def _not_here(results: Results) -> Iterator[Block]:
    lines = []
    for cell in results.cells:
        for run in cell.runs:
            if run.status != "done":
                reason = run.reason.strip().splitlines()
                lines.append(f"**{cell.name}**, seed {run.seed}: {run.status}{': ' + reason[0] if reason else ''}.")
    if not lines:
        return
    yield Heading("What is not here")
    verb = "is" if len(lines) == 1 else "are"
    yield Paragraph(f"{plural(len(lines), 'run')} failed or {verb} missing; no number above counts them.")
    yield Bullets(lines)
    logs = [(cell, run) for cell in results.cells for run in cell.runs if len(run.reason.strip().splitlines()) > 1]
    for cell, run in logs:
        yield Verbatim(f"{cell.name}, seed {run.seed}: end of its log", run.reason)


def _method(results: Results) -> Iterator[Block]:
    yield Heading("How it was measured")
    some = next((run.measures for cell in ordered(results) for run in cell.done if run.measures), None)
    lines = []
    if some:
        lines = list(_protocol(results, some))
    if results.machine:
        lines.append("Machine: " + ", ".join(f"{key} {plain(one)}" for key, one in results.machine.items()) + ".")
    if lines:
        yield Bullets(lines)
    files = "`results.csv` has a line a run, `results.jsonl` everything, per clip and noise level too."
    yield Paragraph(files)


def _protocol(results: Results, some: Any) -> Iterator[str]:
    """The protocol in sentences, of the first run; a line says where others differ."""
    protocol, held = some.get("protocol", {}), some.get("held_out")
    if held:
        clips, bins = len(held["per_clip"]), len(held["t_bins"])
        yield (
            f"Held-out loss: averaged weights, {plural(clips, 'clip')} of each seed that no run trained on, each once in each "
            f"of {plural(bins, 'bin')} of noise levels that are equally likely in training; noise and times are keyed by seed "
            "and clip."
        )
    detail = (some.get("accuracy") or {}).get("detail", {})
    if "seen" in detail:
        real = detail.get("real", {})
        yield (
            f"Prompts right: {detail['seen']['n']} clips a run of prompts seen, and as many of combinations never trained; an "
            "oracle that does not see the prompt reads colour, shape and direction. Of real clips it reads "
            f"{real.get('all', 0):.0%} right (n = {real.get('n', 0)})."
        )
    if protocol:
        features = protocol.get("features", {})
        yield (
            f"Clips: {protocol['frames']} frames of {protocol['size'][0]}x{protocol['size'][1]}, "
            f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}. Features: "
            f"{features.get('name')}, weights {features.get('weights')}, sha256 `{str(features.get('sha256'))[:16]}`."
        )
    asked = [
        run.measures.get("protocol", {}).get("asked") for cell in results.cells for run in cell.done if run.measures
    ]
    if any(one != asked[0] for one in asked):
        yield "**Not all runs were measured by the same protocol**; `results.jsonl` says which."
    yield "Everything is repeatable but times, rates and measured memory, which are those of a machine that may be busy."


def _put(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")

"""A study's results for other programs: a table of runs, and lines that hold everything."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from stgen.lab.results import Cell, Results, Run

BARE = {"protocol", "detail", "not_repeatable"}  # of measures, what is no number of a run


def lines(results: Results) -> Iterator[dict[str, Any]]:
    """A line a run with all its measures, then a line a difference and a line a place."""
    for cell, run in _runs(results):
        yield {"kind": "run", **_of_run(cell, run), "measures": run.measures}
    if results.comparison:
        for one in results.comparison.differences:
            yield {"kind": "difference", **asdict(one)}
        for ranking in results.comparison.rankings.values():
            for place in ranking:
                yield {"kind": "place", **asdict(place)}


def table(results: Results) -> str:
    """A row a run as CSV: its numbers by dotted keys."""
    rows = [{**_of_run(cell, run), **_flat(run.measures or {})} for cell, run in _runs(results)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _entry(one) for key, one in row.items()} for row in rows)
    return text.getvalue()


def _runs(results: Results) -> Iterator[tuple[Cell, Run]]:
    return ((cell, run) for cell in results.cells for run in cell.runs)


def _of_run(cell: Cell, run: Run) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason.strip().splitlines()[0] if run.reason.strip() else "",
        "folder": str(run.folder),
        "changes": dict(cell.changes),
        "solved": dict(cell.solved),
        "mismatch": cell.mismatch,
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to numbers and words; lists, which a cell of a table cannot hold, are left to results.jsonl."""
    flat = {}
    for key, one in tree.items():
        if isinstance(one, dict):
            flat |= {} if key in BARE else _flat(one, f"{prefix}{key}.")
        elif not isinstance(one, list) and key not in BARE:
            flat[f"{prefix}{key}"] = one
    return flat


def _entry(one: Any) -> Any:
    return json.dumps(one, ensure_ascii=False) if isinstance(one, dict) else one

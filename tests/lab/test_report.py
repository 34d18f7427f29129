"""The page of a study: what it must say, that it says no more than its numbers, and that it stands alone."""

import base64
import csv
import io
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from stgen import cli, config, schema
from stgen.lab import report, report_clips, report_numbers, report_runs, statistics
from stgen.lab.measure import Protocol
from stgen.lab.report_page import Bullets, Heading, Paragraph, Picture, Table, Verbatim, markdown, page
from stgen.lab.results import Budget, Cell, Difference, Results, Run
from stgen.train import train

BINS = [[0.0, 0.5], [0.5, 0.8], [0.8, 1.0]]
EFFECTS = {"base": 0.0, "better": -0.04, "worse": 0.05, "same": 0.001}


def measures(effect: float, seed: int, spread: float = 0.004) -> dict:
    """As measures.json holds them; clips and seeds have levels of their own, which all cells share."""
    shared, own = random.Random(seed), random.Random(f"{effect}-{seed}")
    luck = own.gauss(0, spread)
    level = 0.5 + shared.gauss(0, 0.05)
    clips = [[level + effect + luck + 0.02 * i + own.gauss(0, spread) for _ in BINS] for i in range(6)]
    mean = sum(map(sum, clips)) / 18
    return {
        "steps": 100,
        "held_out": {"mean": mean, "per_clip": clips, "t_bins": BINS},
        "accuracy": {"seen": 0.5 - effect + 0.05 * own.random(), "held_out": 0.4 + 0.1 * own.random(), "real": 1.0},
        "frechet": {"value": 1.5 + effect + own.gauss(0, 0.1), "real": 0.2, "name": "Fréchet distance", "n": 64,
                    "n_training": 300, "n_held_out": 6, "features": "a fixed random 3-D convolutional network (96 features)"},
        "mmd": {"value": 0.1 + effect + own.gauss(0, 0.01), "real": 0.01, "kernel": "rbf", "n": 64, "n_training": 300,
                "n_held_out": 6, "features": "a fixed random 3-D convolutional network (96 features)"},
        "flicker": {"change": 3.0, "flicker": 4.0, "consistency": 0.9, "unit": "grey levels of 255",
                    "real": {"change": 2.0, "flicker": 2.5, "consistency": 0.95}},
        "nearest": {"median": 20.0, "least": 9.0, "ratio": 1.1, "unit": "grey levels", "looked_at": 300, "of": 320,
                    "real": {"median": 18.0, "least": 8.0}},
        "cost": {"parameters": 1_500_000, "flops_per_step": 2e10 * (1 + effect), "dense_flops_per_step": 2e10,
                 "tokens_per_second": 9e3, "step_ms": 140.0 + 1000 * effect, "peak_memory_bytes": 130_000_000, "tflops": 0.12,
                 "mfu": 0.08, "memory": "counted"},
        "attention": {"entropy": 0.8, "sink_mass": 0.0, "density": 0.5, "of_clip": 0.25},
        "protocol": {"frames": 16, "size": [48, 48], "num_inference_steps": 20, "guidance_scale": 3.0, "asked": {"seed": 0},
                     "features": {"name": "random", "weights": "random, seed 0", "sha256": "ab" * 32}},
        "seconds": 30.0,
    }  # fmt: skip


def cell(name: str, effect: float, seeds=(0, 1, 2), folder=Path("nowhere"), **keys) -> Cell:
    runs = tuple(Run(seed, folder / name / f"seed-{seed}", "done", measures=measures(effect, seed)) for seed in seeds)
    changes = {} if name == "base" else {"model.mixers.joint.pattern": {"kind": "local", "radius": 2}}
    return Cell(
        name, changes, runs, steps=100, parameters=1_500_000, flops_per_step=2e10, dense_flops_per_step=2e10, **keys
    )


def study(cells, **keys) -> Results:
    return Results(
        "patterns", "Which pattern loses least?", "base: base.yaml\n", "base.yaml",
        Budget("flops", (), "Each cell executes the base's FLOPs."), tuple(cells), statistics.compare(cells),
        {"device": "cpu", "threads": 1}, **keys,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Results, Path]:
    """A study of four cells, a run of which failed and two of which are missing."""
    cells = [cell(name, effect) for name, effect in EFFECTS.items()]
    failed = Run(
        2, Path("nowhere/same/seed-2"), "failed", "ran out of memory\nTraceback (most recent call last)\n  <module>"
    )
    cells[3] = Cell(
        "same", cells[3].changes, (*cells[3].runs[:2], failed), mismatch=0.013, solved={"model.mlp.ratio": 3.5}
    )
    never = tuple(Run(seed, Path(f"nowhere/x/{seed}"), "missing", "not started") for seed in (0, 1))
    cells.append(Cell("never <run> & | told", {"model.plan": "a|b"}, never))
    results, folder = study(cells), tmp_path_factory.mktemp("report")
    report.write(results, folder)
    return results, folder


def text_of(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


def section(folder: Path, title: str) -> str:
    return next(part for part in text_of(folder).split("\n## ") if part.startswith(title))


# ------------------------------------------------------------------------------------------------------------- the words


def test_it_says_what_was_varied_what_was_held_and_what_was_found(whole):
    _, folder = whole
    text = text_of(folder)
    assert text.startswith(
        "# patterns\n\nWhich pattern loses least?\n\n5 cells, 2 to 3 seeds each; 11 of 14 runs are measured."
    )
    assert "`model.mixers.joint.pattern`: better, worse and same" in text
    assert "**Held.** Each cell executes the base's FLOPs. Everything else but what the budget chose is" in text
    found = section(folder, "What was found")
    assert "Lowest held-out loss: **better**" in found
    assert re.search(
        r"Better than base in held-out loss \(95 % intervals in brackets\): \*\*better\*\* by 0\.0\d+ \(0\.0\d+ to 0\.0\d+, p",
        found,
    )
    assert re.search(
        r"Worse than base in held-out loss \([^)]+\): \*\*worse\*\* by 0\.0\d+ \(0\.0\d+ to 0\.0\d+, p", found
    )
    assert re.search(
        r"Not distinguishable from base in held-out loss: \*\*same\*\* \([+−]0\.\d+ \[−0\.\d+, \+0\.\d+\]\)", found
    )
    assert "Differences are paired by 2 to 3 seeds." in found and "Holm" in found


def test_its_numbers_are_those_of_the_comparison(whole):
    results, folder = whole
    one = report_numbers.difference(results, "better", "held-out loss")
    assert one is not None and one.low is not None and one.high is not None and one.distinguishable
    assert f"by {-one.mean:.4f} ({-one.high:.4f} to {-one.low:.4f}, p" in section(folder, "What was found")
    row = next(line for line in section(folder, "The numbers").splitlines() if line.startswith("| better"))
    mean, interval = row.split(" | ")[1:3]
    assert float(mean.split(" ± ")[0]) == pytest.approx(
        report_numbers.mean(results.cells[1], ("held_out", "mean")), abs=5e-4
    )
    assert interval == report_numbers.minus(f"{one.mean:+.4f} [{one.low:+.4f}, {one.high:+.4f}]")


def test_nothing_is_called_better_or_worse_without_its_interval(whole):
    found = section(whole[1], "What was found")
    claims = [line for line in found.splitlines() if re.match(r"- (Better|Worse) than", line)]
    assert len(claims) >= 3
    for claim in claims:
        assert "95 % intervals in brackets" in claim
        assert claim.count("**") // 2 == len(re.findall(r" by [\d.]+(?: points)? \([\d.]+ to [\d.]+, p", claim)), claim


def test_failed_and_missing_runs_are_told(whole):
    told = section(whole[1], "What is not here")
    assert "3 runs failed or are missing" in told
    assert "**same**, seed 2: failed: ran out of memory." in told
    assert "**never &lt;run> & | told**, seed 1: missing: not started." in told
    assert "Traceback" in told


def test_the_protocol_is_told_and_no_number_is_called_fvd(whole):
    text = text_of(whole[1])
    assert "64 sampled and 300 training clips" in text and "sha256 `abababababababab`" in text
    assert "It is no FVD" in text and "tell that clips differ, not how good they look" in text
    assert "| real, held out |" in text
    assert not re.search(r"\| FVD", text)


def test_fvd_is_called_so_where_the_features_are_those_of_i3d(tmp_path):
    cells = [cell(name, EFFECTS[name]) for name in ("base", "better")]
    for one in (run.measures for c in cells for run in c.runs):
        one["frechet"] |= {"name": "FVD", "features": "I3D"}
    report.write(study(cells), tmp_path)
    assert "| cell | FVD |" in text_of(tmp_path) and "It is no FVD" not in text_of(tmp_path)


# ------------------------------------------------------------------------------------------------------------- the files


class Reader(HTMLParser):
    """What a browser would load, and whether every element is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "style")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_opens(whole):
    text = (whole[1] / "report.html").read_text(encoding="utf-8")
    read = Reader(text)
    assert not read.open and not {"script", "link", "iframe", "object"} & set(read.tags)
    assert read.loads and all(one.startswith("data:image/png;base64,") for one in read.loads)
    for one in read.loads:
        Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).verify()
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "never &lt;run&gt; &amp; | told" in text and "<run>" not in text


def test_markdown_shows_the_same_pictures(whole):
    _, folder = whole
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_of(folder))
    assert {"plots/pareto.png", "plots/by_time.png", "plots/differences-held-out-loss.png"} <= set(shown)
    assert {f"plots/{path.name}" for path in (folder / "plots").iterdir()} == set(shown)
    assert len(shown) == (folder / "report.html").read_text().count("<img")


def test_tables_have_as_many_entries_as_columns(whole):
    for block in re.findall(r"(?:^\|.*\n)+", text_of(whole[1]), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_csv_and_jsonl_hold_every_run(whole):
    results, folder = whole
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cell"], row["seed"], row["status"]) for row in rows] == [
        (one.name, str(run.seed), run.status) for one in results.cells for run in one.runs
    ]
    assert float(rows[0]["held_out.mean"]) == results.cells[0].runs[0].measures["held_out"]["mean"]
    assert rows[-1]["held_out.mean"] == "" and json.loads(rows[-1]["changes"]) == {"model.plan": "a|b"}
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "results.jsonl").read_text().splitlines()
    ]
    runs = [line for line in lines if line["kind"] == "run"]
    assert len(runs) == 14 and runs[3]["measures"] == results.cells[1].runs[0].measures
    assert {line["kind"] for line in lines} == {"run", "difference", "place"}


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_of_before(whole):
    results, folder = whole
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "plots" / "strip.png").write_bytes(b"of an earlier report")
    report.write(results, folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------------------------------------- odd studies


def test_one_seed_is_compared_over_clips_and_says_so(tmp_path):
    report.write(study([cell(name, effect, seeds=(0,)) for name, effect in EFFECTS.items()]), tmp_path)
    text = text_of(tmp_path)
    assert (
        "4 cells, 1 seed each" in text
        and "paired by 6 held-out clips" in text
        and "say nothing about another seed" in text
    )
    assert "±" not in section(tmp_path, "The numbers").split("Means over seeds")[0]


def test_many_cells(tmp_path):
    names = [f"cell number {i}" for i in range(24)]
    cells = [cell("base", 0.0), *(cell(name, 0.03 * (i % 7) - 0.09) for i, name in enumerate(names))]
    report.write(study(cells), tmp_path)
    text = text_of(tmp_path)
    assert all(f"| {name} |" in text for name in names)
    assert "more (in the table)" in section(tmp_path, "What was found")
    assert Reader((tmp_path / "report.html").read_text()).open == []


def test_nothing_to_compare(tmp_path):
    missing = Run(0, Path("x"), "missing", "not started")
    for cells, alone in (
        ([cell("base", 0.0)], "**base** alone"),
        ([Cell("base", {}, (missing,))], "Nothing"),
        ([cell("base", 0.0), Cell("other", {}, (missing,))], "**base** alone"),
    ):
        report.write(study(cells), tmp_path)
        found = section(tmp_path, "What was found")
        assert found.strip() == f"What was found\n\n{alone} was measured, so there is nothing to compare yet."
        assert Reader((tmp_path / "report.html").read_text()).open == []


def test_a_base_that_failed_leaves_the_others_told(tmp_path):
    failed = Cell("base", {}, (Run(0, Path("x"), "failed", "CUDA error"),))
    report.write(study([failed, cell("better", -0.1), cell("worse", 0.1)]), tmp_path)
    text = text_of(tmp_path)
    assert "**base**, seed 0: failed: CUDA error." in text and "| better |" in text and "than base" not in text


def test_a_loss_under_another_objective_is_not_compared(tmp_path):
    other = cell("other", -0.2)
    other = Cell("other", {"objective.prediction_type": "sample"}, other.runs)
    report.write(study([cell("base", 0.0), cell("worse", 0.05), other]), tmp_path)
    opening = (tmp_path / "report.md").read_text().split("## What was found")[0]
    assert "**Not to be compared by held-out loss:** **other**. It is another quantity" in opening
    assert "**other**" not in section(tmp_path, "What was found").split("prompts right")[0]
    rows = [line for line in section(tmp_path, "The numbers").splitlines() if line.startswith("| ")]
    assert rows[-1].startswith("| other") and rows[-1].split(" | ")[2:4] == ["–", "–"]


def test_measures_with_gaps(tmp_path):
    """What could not be measured is null; the page shows a dash and the rest."""
    cells = [cell(name, EFFECTS[name]) for name in ("base", "worse")]
    for one in (run.measures for c in cells for run in c.runs):
        one |= {"held_out": None, "accuracy": None, "frechet": None, "mmd": None, "nearest": None, "attention": None}
        one["cost"] |= {"step_ms": None, "tokens_per_second": None, "mfu": None}
    report.write(study(cells), tmp_path)
    text = text_of(tmp_path)
    assert "nan" not in text.lower() and "None" not in text and "| – |" in text


# ----------------------------------------------------------------------------------------------------- writing numbers


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.01234, "0.0123"),
        (-1.5, "−1.50"),
        (123.4, "123"),
        (98765.0, "98,765"),
        (1e-9, "1.00e−09"),
    ],
)
def test_numbers(x, text):
    assert report_numbers.number(x) == text


@pytest.mark.parametrize(
    ("mean", "low", "high", "percent", "text"),
    [
        (-0.0162, -0.0204, -0.012, False, "−0.0162 [−0.0204, −0.0120]"),
        (0.051, -0.02, 0.12, True, "+5.1 [−2.0, +12.0]"),
        (0.5, None, None, False, "+0.50 [unknown]"),
    ],
)
def test_intervals(mean, low, high, percent, text):
    one = Difference("x", "y", mean, low, high, None, False, 3, "seeds")
    assert report_numbers.interval(one, percent) == text


def test_page_and_markdown_mark_the_same_words(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    blocks = [
        Heading("A < B"), Paragraph("**strong** and `a|b**c**` & <i>"), Bullets(["one", "`two`"]),
        Table(["name", "n"], [["a|b", "−1.5"], ["c", "–"]]), Picture(tmp_path / "p.png", "A [plot]. More."),
        Verbatim("log", "a < b\n```\n"),
    ]  # fmt: skip
    html, md = page("T", blocks), markdown("T", blocks, tmp_path)
    assert "<strong>strong</strong> and <code>a|b**c**</code> &amp; &lt;i&gt;" in html
    assert '<th class="n">n</th>' in html and "<th>name</th>" in html and 'alt="A plot"' in html
    assert "| a\\|b | −1.5 |" in md and "| --- | ---: |" in md and "![A plot](p.png)" in md and "~~~~" in md
    assert Reader(html).open == []


# --------------------------------------------------------------------------------------------------------- existing runs

TINY = [
    "data.num_frames=4", "data.height=16", "data.width=16", "data.shapes.clips=40", "data.shapes.held_out=2",
    "data.held_out_clips=4", "data.dataloader_num_workers=0", "codec.patch_size=[2,8,8]", "codec.components=6",
    "codec.fit_clips=8", "text.width=16", "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=4",
    "train.max_train_steps=3", "validation.steps=null", "validation.num_inference_steps=2", "log.wandb=disabled", "log.every=1",
]  # fmt: skip
SHORT = Protocol(t_bins=2, samples=2, real=8, attention_clips=1, attention_times=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two configs, the first with two seeds."""
    home = tmp_path_factory.mktemp("runs")
    (home / "tiny.yaml").write_text("{}\n")
    changes = {"plain": [], "again": ["run.seed=1"], "causal": ["model.mixers.temporal.pattern=causal"]}
    for name, change in changes.items():
        train(config.load(home / "tiny.yaml", [*TINY, f"run.output_dir={home / name}", *change], schema.Config))
    return home


@pytest.fixture(scope="module")
def told(runs) -> Results:
    return report_runs.results_of([runs / name for name in ("plain", "again", "causal")], SHORT, lambda _: None)


def test_runs_of_one_config_are_seeds_of_a_cell(runs, told):
    assert [(one.name, [run.seed for run in one.runs]) for one in told.cells] == [("plain", [0, 1]), ("causal", [0])]
    assert told.cells[1].changes == {"model.mixers.temporal.pattern": {"kind": "causal"}}
    assert told.comparison is not None and told.comparison.differences[0].cell == "causal"


def test_a_report_of_runs_has_their_clips_and_masks(runs, told, tmp_path):
    report.write(told, tmp_path)
    text = text_of(tmp_path)
    assert {"strip.png", "strip.gif", "masks.png", "curves.png"} <= {
        path.name for path in (tmp_path / "plots").iterdir()
    }
    prompts = report_clips.common_prompts(report_clips.sampled(told))
    assert prompts and all(f"“{prompt}”" in text for prompt in prompts)
    with Image.open(tmp_path / "plots" / "strip.gif") as moving:
        assert getattr(moving, "n_frames", 1) == 4
    assert "data:image/gif;base64," in (tmp_path / "report.html").read_text()


def test_masks_are_those_of_the_config(told):
    plain, causal = (report_clips.masks_of(one) for one in told.cells)
    assert len(plain) == len(causal) == 2  # spatial, temporal
    seen = causal[1].drawing.views[0].seen  # of the query in frame 1
    assert seen[0, 1, 1] == seen[1, 1, 1] == 1 and "causal" in causal[1].words
    first = causal[1].drawing.views[1].seen  # of the query in frame 0
    assert first[0, 0, 0] == 1 and first[1, 0, 0] == 0


def test_runs_on_other_data_are_not_compared_by_their_loss(runs, tmp_path):
    other = shutil.copytree(runs / "causal", tmp_path / "other")
    marker = other / "data" / "shapes.json"
    recipe = json.loads(marker.read_text())
    recipe["recipe"]["clips"] = 39
    marker.write_text(json.dumps(recipe))
    found = report_runs.results_of([runs / "plain", other], SHORT, lambda _: None)
    assert "data.train_data_dir" in found.cells[1].changes
    assert found.comparison is not None
    assert not [one for one in found.comparison.differences if one.measure == "held-out loss"]


def test_one_run_twice_is_refused(runs, tmp_path):
    copy = shutil.copytree(runs / "plain", tmp_path / "copy")
    with pytest.raises(report_runs.MeasureError, match="runs of one config and seed"):
        report_runs.results_of([runs / "plain", copy], SHORT, lambda _: None)


def test_the_door_writes_the_page_and_refuses_in_one_line(runs, tmp_path, capsys):
    cli.main(
        ["report", str(runs / "plain"), str(runs / "causal"), "--samples", "2", "--output_dir", str(tmp_path / "out")]
    )
    assert f"report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(tmp_path / "absent")])
    assert end.value.code == 1
    assert capsys.readouterr().err.strip() == f"error: {tmp_path / 'absent'} is no run folder; it holds no config.yaml"
    with pytest.raises(SystemExit):
        cli.main(["report", str(runs / "plain"), "--features", "inception"])
    assert capsys.readouterr().err.count("\n") == 1

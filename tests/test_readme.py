"""Every example that is written down is run, cut to seconds, or stands here with the reason why it is not.

Examples are the fenced blocks of the pages, the commands named in their text, and those named in the comments of configs. An
example that this file does not know fails: give it a cut or a reason.
"""

import ast
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from stgen import cli, config, schema, shapes, video
from stgen.describe import dry_run
from stgen.lab import study

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.S | re.M)
COMMAND = r"(?:python|stgen|pytest|ruff|pyright|pip|git) "

TINY = [
    "train.max_train_steps=2", "train.max_train_seconds=null", "train.train_batch_size=2", "optim.lr_warmup_steps=1",
    "data.shapes.clips=24", "data.held_out_clips=0", "data.dataloader_num_workers=0", "codec.fit_clips=16",
    "validation.steps=null", "validation.num_inference_steps=1", "validation.judged_noises=0",
    "validation.prompts=[a red circle]", "model.width=32", "model.heads=2", "log.wandb=disabled",
]  # fmt: skip
STEPS = ["--num_inference_steps", "2"]


@dataclass(frozen=True)
class Cut:
    """How an example is run: words that stand in place of others, words that follow; `slow` ones not by default."""

    swap: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    slow: bool = False


def cut(*more: str, slow: bool = False, **swap: str) -> Cut:
    return Cut(swap, more, slow)


INSTALLS = "installs from the network; .ci/run does so in a fresh environment"
TESTS = "the tests themselves; .ci/run runs them"
MEASURES = "measures for minutes to hours; benchmarks/results holds what it wrote, and tests run its parts"
MINE = {"configs/mine.yaml": "configs/quickstart.yaml"}  # whose pretrained parts are not at hand
LORA = (
    "python train.py configs/quickstart.yaml model.pretrained=runs/quickstart lora.rank=8 data.train_data_dir=some/folder "
    "run.output_dir=runs/mine"
)
COMMANDS: dict[str, Cut | str] = {
    "git clone <this repository> stgen": INSTALLS,
    "cd stgen": INSTALLS,
    "python -m venv .venv": INSTALLS,
    ". .venv/bin/activate": INSTALLS,
    'pip install -e ".[dev]"': INSTALLS,
    "pytest -n auto --dist loadfile": TESTS,
    "pytest -n auto --dist loadfile -m slow": TESTS,
    "ruff check .": TESTS,
    "ruff format --check .": TESTS,
    "pyright": TESTS,
    'pytest tests/faults -m "slow or not slow"': TESTS,
    "python train.py configs/quickstart.yaml": cut(*TINY),
    "python train.py configs/streaming.yaml": cut(*TINY),
    "python train.py configs/quickstart.yaml data.train_data_dir=some/folder data.cache=none run.output_dir=runs/mine":
        cut(*TINY),
    "python train.py CONFIG --dry-run": cut(CONFIG="configs/quickstart.yaml"),
    "python train.py --help": cut(),
    "python train.py RUN/config.yaml run.resume_from_checkpoint=RUN/not-finite-step-N run.output_dir=RUN-again":
        "needs a run that met NaN; tests/faults/test_fault_numbers.py makes one and repeats it so",
    'python sample.py runs/quickstart --prompt "a blue square moving left" --seed 0': cut(*STEPS),
    'python sample.py runs/quickstart --prompt "a red circle moving up" "a green triangle moving down" '
    "--num_videos_per_prompt 4 --guidance_scale 4 --num_inference_steps 30 --scheduler unipc --output mp4 gif sheet":
        cut(*STEPS),
    "python sample.py runs/quickstart --prompt_file prompts.csv": cut(*STEPS),
    'python sample.py runs/quickstart --prompt "a yellow square moving right" --weights raw': cut(*STEPS),
    'python sample.py runs/streaming --prompt "a red circle moving left" --num_frames 160':
        cut(*STEPS, "--num_frames", "24"),
    "stgen data check some/folder": cut(),
    "stgen data cache configs/mine.yaml --jobs 2": Cut(MINE, (*TINY, "data.train_data_dir=some/folder")),
    "python train.py configs/mine.yaml data.cache=disk": Cut(MINE, (*TINY, "data.train_data_dir=some/folder"), slow=True),
    "stgen data shapes shapes --clips 500 --num_frames 16 --height 64 --width 96": cut(),
    "stgen launch configs/mine.yaml --gpus-per-node 8": "needs GPUs; tests/lab/test_launch.py launches two processes",
    "stgen launch configs/mine.yaml --nodes 4 --gpus-per-node 8 --dry-run": Cut(MINE),
    'pip install "stgen[lora]"': INSTALLS,
    'pip install "stgen[datasets]"': INSTALLS,
    LORA: cut(*TINY),
    'python sample.py runs/quickstart --lora runs/mine --lora_scale 0.8 --prompt "a blue square moving left"': cut(*STEPS),
    "stgen export runs/quickstart --output my-model --dtype bf16": cut(),
    'python sample.py ORG/NAME --prompt "…"': "fetches from the hub; tests/spine/test_export_run.py does so from one of its own",
    "stgen inspect configs/ablations/base.yaml "
    "'model.mixers.joint.pattern=[{kind: local, radius: [2, 1, 1]}, {kind: global, frames: 1}]'": cut(),
    "stgen inspect runs/quickstart": cut(slow=True),
    "stgen inspect": "named, not shown",
    "stgen inspect RUN": cut(slow=True, RUN="runs/quickstart"),
    "python -m stgen inspect configs/quickstart.yaml model.mixers.spatial.pattern=checkerboard": cut(),
    "stgen quantise RUN [RUN …]": "measures trained runs for minutes; tests/lab/test_quantisation.py runs it on small ones",
    "stgen ablate configs/ablations/mine.yaml --dry-run": cut(slow=True),
    "stgen ablate configs/ablations/mine.yaml --jobs 2": "trains for hours; tests/lab/test_ablate.py runs a small study so",
    "stgen ablate configs/ablations/factorisation.yaml --jobs 2": "trains for hours; tests/faults/test_fault_shipped.py "
        "takes a step of each cell",
    "stgen report runs/a runs/b": "measures trained runs for minutes; tests/lab/test_report.py runs it on small ones",
    "stgen export --push_to_hub": "uploads; the tests of stgen/export.py do so to a hub of their own",
    "stgen export --self-describing": "named, not shown; the tests of stgen/export.py run it",
    "stgen probe": "trains for a minute and a half; tests/lab/test_probes.py trains it shortly",
    "stgen doctor": cut(slow=True),
    "stgen bench attention --config CONFIG": "measures for a minute; tests/lab/test_bench.py runs it on a small one",
    "python -m stgen.testing.compiled tests/kernels/launches_*.py --quick": "compiles for a minute; "
        "tests/kernels/test_compiled.py does so",
}  # fmt: skip


def reason_for(command: str) -> str | None:
    return MEASURES if command.startswith("python benchmarks/") else None


# ---------------------------------------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    return [Block(page, *match.group(2, 3)) for page in PAGES for match in FENCE.finditer((ROOT / page).read_text())]


def commands_in(shell: str) -> list[str]:
    """The commands of a block, without comments and line breaks."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        kept = re.sub(r"(^|\s)#\s.*$", "", line)
        found += [re.sub(r"\s+", " ", command).strip() for command in kept.split(" && ")]
    return [command for command in found if command]


def all_commands() -> dict[str, str]:
    """Every command that is written down, and where."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        shells = [match.group(3) for match in FENCE.finditer(text) if match.group(2) == "bash"]
        outside = FENCE.sub("", text)
        shells += re.findall(rf"`({COMMAND}[^`\n]*)`", outside)
        shells += re.findall(rf"^ {{4}}({COMMAND}.*)$", outside, re.M)
        found |= {command: page for shell in shells for command in commands_in(shell)}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        comments = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
        shells = re.findall(rf"^ {{5}}({COMMAND}.*)$", comments, re.M)
        shells += re.findall(
            r"((?:stgen [a-z]+|python benchmarks/\w+\.py)(?: configs/[\w/.]+\w| --[a-z]+ \d+)*)", comments
        )
        found |= {command: path.name for shell in shells for command in commands_in(shell)}
    return found


WRITTEN = all_commands()


def test_every_command_that_is_written_down_is_run_or_has_a_reason():
    unknown = {
        command: where for command, where in WRITTEN.items() if command not in COMMANDS and not reason_for(command)
    }
    assert not unknown, f"give each a cut or a reason in COMMANDS: {unknown}"
    gone = [command for command in COMMANDS if command not in WRITTEN and not command.startswith("pytest tests/faults")]
    assert not gone, f"written down nowhere any more: {gone}"
    scripts = {command.split()[1] for command in WRITTEN if reason_for(command)}
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def docstring_commands() -> list[tuple[str, str]]:
    """Commands shown by docstrings, with placeholders as they are: (file, command)."""
    found = []
    for path in (
        ROOT / "train.py",
        ROOT / "sample.py",
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "stgen").rglob("*.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                shown = re.findall(r"`((?:python|stgen) [a-z][^`]*)`|^ {2,}((?:python|stgen) [a-z].*)$", text, re.M)
                found += [(path.relative_to(ROOT).as_posix(), one or other) for one, other in shown]
    return found


def test_docstrings_name_doors_and_options_that_there_are():
    """They are usage lines with placeholders; those without one are in the README, or are a benchmark's."""
    shown = docstring_commands()
    package = "".join(path.read_text() for path in (ROOT / "stgen").rglob("*.py"))
    assert len(shown) > 20
    for file, command in shown:
        words = command.split()
        if words[0] == "stgen":
            source, known = package, re.search(rf'"{re.escape(words[1])}": \(', (ROOT / "stgen/cli.py").read_text())
        elif words[1] == "-m":
            source = package
            known = (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        else:
            known = (ROOT / words[1]).is_file()
            source = (ROOT / words[1]).read_text() + package
        assert known, f"{file}: {command}"
        for option in re.findall(r"--[a-z][\w-]*", command):
            assert f'"{option}"' in source, f"{file}: {command}: no option {option}"


# --------------------------------------------------------------------------------------------------------- run, cut


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder like the repository's, where the quickstart was run with two steps."""
    home = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", home / "configs")
    for block in blocks():
        if match := re.match(r"# (configs/\S+\.yaml)\n", block.text):
            (home / match.group(1)).write_text(block.text)
    (home / "prompts.csv").write_text("prompt,seed,guidance_scale\na red circle,3,2.5\n")
    for i, combo in enumerate(shapes.ALL[:6]):
        clip = video.Clip(shapes.render(combo, 20, 64, 64, i), 8.0)
        video.write(home / "some" / "folder" / f"{i}.mp4", clip)
        (home / "some" / "folder" / f"{i}.txt").write_text(combo.prompt)
    execute(home, "python train.py configs/quickstart.yaml")
    return home


def execute(home: Path, command: str) -> None:
    """Run a command of COMMANDS as cut, in this process, with `home` as the folder it was called in."""
    how = COMMANDS[command]
    assert isinstance(how, Cut)
    for word, instead in how.swap.items():
        command = command.replace(word, instead)
    words = shlex.split(command) + list(how.more)
    before, arguments = os.getcwd(), sys.argv
    os.chdir(home)
    try:
        if words[0] == "stgen" or words[:3] == ["python", "-m", "stgen"]:
            cli.main(words[1:] if words[0] == "stgen" else words[3:])
        else:
            sys.argv = words[1:]
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{command} ended with {end.code}"
    finally:
        os.chdir(before)
        sys.argv = arguments


RUN = [
    pytest.param(command, marks=[pytest.mark.slow] if how.slow else [])
    for command, how in COMMANDS.items()
    if isinstance(how, Cut) and command in WRITTEN and command != "python train.py configs/quickstart.yaml"
]


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(home, command, capsys):
    if "runs/streaming" in command:
        execute(home, "python train.py configs/streaming.yaml")
    if "--lora" in command:
        execute(home, LORA)
    if command.endswith("data.cache=disk"):
        execute(home, "stgen data cache configs/mine.yaml --jobs 2")
    before = {path: path.lstat().st_mtime_ns for path in home.rglob("*")}
    execute(home, command)
    written = [path for path in home.rglob("*") if before.get(path) != path.lstat().st_mtime_ns]
    assert written or len(capsys.readouterr().out) > 200


def test_the_same_command_gives_the_same_bytes(home):
    command = 'python sample.py runs/quickstart --prompt "a blue square moving left" --seed 0'
    files = []
    for _ in range(2):
        execute(home, command)
        files.append((home / "runs/quickstart/samples/000-seed0.mp4").read_bytes())
    assert files[0] == files[1] and len(files[0]) > 500


# ------------------------------------------------------------------------------------------------- the other blocks


def _from_python(home: Path, block: Block) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.chdir(home)
    text = re.sub(r'(pipe\(\n? *"[^"]*",)', r"\1 num_inference_steps=2,", block.text)
    try:
        names: dict = {}
        exec(compile(text, block.page, "exec"), names)  # the page's own code
    finally:
        monkey.undo()
    clip = names["clip"]
    assert clip.ndim == 5 and clip.shape[0] == 1 and clip.shape[2] == 3 and "num_inference_steps=2" in text


def _operations_alone(home: Path, block: Block) -> None:
    names: dict = {}
    exec(compile(block.text, block.page, "exec"), names)
    assert names["out"].shape == (2, 4, 1000, 64) and names["out"].isfinite().all()
    assert names["lse"].shape[:3] == (2, 4, 1000)[: names["lse"].ndim]


def _own_config(home: Path, block: Block) -> None:
    cfg = config.load(home / "configs/mine.yaml", [], schema.Config)
    assert cfg.data.height == 256 and cfg.codec.kind == "diffusers"


def _model_section(home: Path, block: Block) -> None:
    file = home / "configs" / "section.yaml"
    file.write_text("extends: quickstart.yaml\n" + block.text)
    cfg = config.load(file, ["model.depth=6"], schema.Config)
    assert "parameters" in dry_run(cfg, ["a red circle"])


def _buckets(home: Path, block: Block) -> None:
    file = home / "configs" / "buckets.yaml"
    file.write_text("extends: quickstart.yaml\ncodec: {kind: pixels}\n" + block.text)
    cfg = config.load(file, [], schema.Config)
    assert [bucket.batch_size for bucket in cfg.data.buckets] == [4, 4, 32]


def _adapted(home: Path, block: Block) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.chdir(home)
    try:
        names: dict = {}
        exec(compile(block.text, block.page, "exec"), names)
    finally:
        monkey.undo()
    assert len(list(names["sparse"].parameters())) == 2 and (home / "sparse-wan").is_dir()


def _study(home: Path, block: Block) -> None:
    assert len(study.load(home / "configs/ablations/mine.yaml", [])) >= 4


def _is_in(*files: str):
    def check(home: Path, block: Block) -> None:
        wanted = [line.strip() for line in dedent(block.text).splitlines() if line.strip()]
        written = [line.strip() for file in files for line in (ROOT / file).read_text().splitlines()]
        assert not [line for line in wanted if line not in written]
        ast.parse(dedent(block.text))

    return check


def _tree_of_the_house(home: Path, block: Block) -> None:
    folder: list[str] = []
    for line in block.text.splitlines():
        names = re.match(r"( *)((?:[\w./*]+ )*[\w./*]+)(?: {2,}|$)", line)
        if not names or (names.group(1) and not folder):
            continue
        folder = folder[: len(names.group(1)) // 2]
        for name in names.group(2).split():
            if name.endswith((".py", "/")) and "*" not in name:
                assert (ROOT / "/".join(folder) / name).exists(), f"{'/'.join(folder)}/{name} is no more"
        first = names.group(2).split()[0]
        folder = [*folder, first.rstrip("/")] if first.endswith("/") else folder


OTHERS = {  # words that only this block has -> how it is tried
    "VideoPipeline.from_pretrained(": _from_python,
    "import Support, block_sparse_attention": _operations_alone,
    "# configs/mine.yaml": _own_config,
    "local: {layout: window": _model_section,
    "# f and its mass": _model_section,
    "# configs/ablations/mine.yaml": _study,
    "  buckets:\n": _buckets,
    "stgen.adapt(": _adapted,
    "class Checkerboard(Fixed)": _is_in("stgen/attention/patterns/checkerboard.py"),
    "def checkerboard(i, j": _is_in("tests/laws/patterns.py"),
    "train.py sample.py            two doors": _tree_of_the_house,
}


def test_every_block_is_known():
    rest = [block for block in blocks() if block.language != "bash"]
    for block in rest:
        known = [words for words in OTHERS if words in block.text]
        assert len(known) == 1, f"{block.page}: give this block a row in OTHERS:\n{block.text}"
    assert len(rest) == len(OTHERS)


@pytest.mark.parametrize("words", OTHERS)
def test_a_block_holds(home, words):
    torch.manual_seed(0)
    (block,) = (block for block in blocks() if words in block.text)
    OTHERS[words](home, block)

"""Malformed configs: each ends in one clear line a fault that names file, key and value, with exit code 2, before torch.

Hand-made ones cover what users and YAML do to each other; generated ones damage a whole config at seeded places.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stgen import config, schema

ROOT = Path(__file__).parents[2]
LIMIT = "train: {max_train_steps: 10}\n"

HAND_MADE: dict[str, tuple[str | bytes, str]] = {  # name: the file after LIMIT (bytes: the whole file), what is said
    # wrong types
    "a word for a number": ("model: {width: wide}", "model.width: should be a whole number greater than 0, got 'wide'"),
    "a number in quotes": ('model: {depth: "6"}', "model.depth: should be a whole number from 1 to 1024, got '6'"),
    "a fraction": ("model: {heads: 1.5}", "model.heads: should be a whole number greater than 0, got 1.5"),
    "yes for true": ("model: {qk_norm: yes}", "model.qk_norm: should be true or false, got 'yes'"),
    "one for true": ("train: {compile: 1}", "train: the key is given twice"),
    "null for a number": ("ema: {decay: null}", "ema.decay: should be a number of at least 0 and less than 1, got null"),
    "a list for a number": ("optim: {learning_rate: [1e-3]}", "optim.learning_rate: should be a number greater than 0"),
    "a map for a number": ("optim: {learning_rate: {max: 1}}", "optim.learning_rate: should be a number greater than 0"),
    "a map for a string": ("log: {project: {a: 1}}", 'log.project: should be a string, got {"a": 1}'),
    "a number for a string": ("log: {project: 7}", "log.project: should be a string, got 7; put it in quotes"),
    "a list for a section": ("data: [a, b]", 'data: should be a mapping of keys, got ["a", "b"]'),
    "a word for a section": ("data: some/folder", "data: should be a mapping of keys, got 'some/folder'"),
    "nothing for a section": ("data:", "data: should be a mapping of keys, got null"),
    "a word for a list": ("tokens: {patch_size: all}", "tokens.patch_size: should be a list of 3 values"),
    "two of three": ("tokens: {patch_size: [1, 2]}", "tokens.patch_size: should be a list of 3 values"),
    "four of three": ("tokens: {patch_size: [1, 2, 2, 2]}", "tokens.patch_size: should be a list of 3 values"),
    "one prompt": ("validation: {prompts: a cat}", "validation.prompts: should be a list of 1 or more values"),
    "a mixer that is a list": ("model: {mixers: {joint: [full]}}", "model.mixers.joint: should be a mapping of keys"),
    "mixers that are a list": ("model: {mixers: [joint]}", "model.mixers: should be a mapping of keys"),
    "a date for a seed": ("run: {seed: 2024-01-01}", "run.seed: should be a whole number of at least 0, got '2024-01-01'"),
    "a time for a number": ("model: {width: 1:30}", "model.width: should be a whole number greater than 0, got '1:30'"),
    # out of range, or beyond any machine
    "zero": ("model: {width: 0}", "model.width: should be a whole number greater than 0, got 0"),
    "minus one": ("run: {seed: -1}", "run.seed: should be a whole number of at least 0, got -1"),
    "NaN": ("optim: {learning_rate: .nan}", "optim.learning_rate: should be a number greater than 0, got .nan"),
    "infinity": ("optim: {learning_rate: .inf}", "optim.learning_rate: should be a number greater than 0, got .inf"),
    "minus infinity": ("objective: {logit_mean: -.inf}", "objective.logit_mean: should be a number, got -.inf"),
    "overflow": ("optim: {adam_epsilon: 1e999}", "optim.adam_epsilon: should be a number greater than 0, got .inf"),
    "a huge rate": ("optim: {learning_rate: 1e300}", "optim.learning_rate: 1e+300 is beyond 1e+12"),
    "a huge ratio": ("model: {mlp: {ratio: 1e308}}", "model.mlp.ratio: 1e+308 is beyond 4096"),
    "a huge width": ("model: {width: 1_000_000_000}", "model.width: 1e+09 is beyond 65536"),
    "a huge clip": ("data: {num_frames: 4000000000}", "data.num_frames: 4e+09 is beyond 100000"),
    "a huge batch": ("ema: {}\nrun: {seed: 0x1ffffffffffffffff}", "run.seed: 0x1ffffffffffffffff is beyond 2^63"),
    "five thousand digits": ("model: {width: " + "9" * 5000 + "}", "is beyond 2^63"),
    "many workers": ("data: {dataloader_num_workers: 1e6}", "data.dataloader_num_workers: 1e+06 is beyond 1024"),
    "a very slow clip": ("data: {fps: 1e-320}", "data.fps: 9.99989e-321 is below 0.0001"),
    "deep convolutions": ("model: {mixers: {tcn: {kind: tcn, levels: 100000}}}", "model.mixers.tcn.levels: 100000 is beyond 64"),
    "all heads there are": ('model: {mixers: {joint: {heads: {"0-99999999": {}}}}}', "'0-99999999' is no range of heads"),
    # unknown and misspelt keys, at every depth
    "a misspelt section": ("modle: {width: 3}", "modle: unknown key; did you mean model?"),
    "a misspelt key": ("model: {widht: 3}", "model.widht: unknown key; did you mean model.width?"),
    "a misspelt deep key": ("model: {mlp: {ratoi: 3}}", "model.mlp.ratoi: unknown key; did you mean model.mlp.ratio?"),
    "a misspelt key of a mixer": ("model: {mixers: {a: {patern: full}}}", "did you mean model.mixers.a.pattern?"),
    "a misspelt key of a pattern": ("model: {mixers: {joint: {pattern: {kind: local, raduis: 2}}}}", "pattern.raduis"),
    "a misspelt kind": ("codec: pixel", "codec: should be one of pca, pixels, diffusers, got 'pixel'; did you mean pixels?"),
    "a misspelt choice": ("log: {wandb: offlin}", "log.wandb: should be one of auto, online, offline, disabled, got 'offlin'"),
    "a key of another kind": ("codec: {path: x}", "codec.path: unknown key for kind pca; it belongs to kind diffusers"),
    "a capital": ("Model: {width: 3}", "Model: unknown key; did you mean model?"),
    "a dash": ("model: {qk-norm: true}", "model.qk-norm: unknown key; did you mean model.qk_norm?"),
    "a blank": ("'model ': {}", "model : unknown key; did you mean model?"),
    "a flat key": ("learning_rate: 1e-4", "learning_rate: unknown key; did you mean optim.learning_rate?"),
    "a dotted key": ("model.width: 3", "dotted keys are for overrides: in a file, nest them"),
    "a key from elsewhere": ("optimizer: adam", "optimizer: unknown key"),
    "a name no plan can say": ("model: {mixers: {'a b|c': {}}}", "'a b|c' cannot be written in a plan"),
    "an empty name": ("model: {mixers: {'': {}}}", "'' cannot be written in a plan"),
    "a plan of unknown mixers": ("model: {plan: spatial tempral}", "plan: no mixer is called 'tempral'"),
    "a plan that repeats for ever": ("model: {plan: spatial*1000000000}", "'*' wants a whole number from 1 to 1000"),
    "a plan of parentheses": ("model: {plan: '" + "(" * 9000 + "'}", "model.plan: '((("),
    # paths
    "no run folder": ("run: {output_dir: ''}", "run.output_dir: '' names no folder"),
    "a NUL in a path": ('run: {output_dir: "a\\0b"}', r"run.output_dir: 'a\x00b' names no folder"),
    # keys given twice, and what YAML makes of characters
    "a section given twice": ("train: {}", "train: the key is given twice"),
    "a key given twice": ("model: {width: 1, width: 2}", "model.width: the key is given twice"),
    "a tab": ("model:\n\twidth: 3", "found character '\\t' that cannot start any token; indent with spaces"),
    "uneven columns": ("model:\n  width: 3\n depth: 2", "the keys of a mapping begin in one column"),
    "an open bracket": ("model: {width: 1", "not valid YAML: expected ',' or '}'"),
    "an open quote": ("run: {output_dir: 'abc}", "not valid YAML: found unexpected end of stream"),
    "two colons": ("model: width: 3", "put a value that holds ': ' in quotes"),
    "an at sign": ("run: {output_dir: @home}", "found character '@' that cannot start any token; put the value in quotes"),
    "a backtick": ("run: {output_dir: `pwd`}", "put the value in quotes"),
    "a directive": (b"%YAML 1.1\n---\na: no\n", "YAML directives (lines that begin with %) are not allowed"),
    "two documents": ("---\nmodel: {}", "not valid YAML: but found another document"),
    "no key": (": 3", "keys are plain or quoted strings, got none"),
    "a number as key": ("1: 2", "keys are plain or quoted strings, got 1"),
    "a list as key": ("? [a, b]\n: 2", "keys are plain or quoted strings, got a list or mapping"),
    "a colour as key": ('"\\e[31mred": 1', r"\x1b[31mred: unknown key"),
    "a line break as key": ('"a\\nb": 1', "a b: unknown key"),
    # anchors, merges and tags
    "an anchor": ("model: &m {width: 64}", "model: anchors and aliases (& and *) are not allowed"),
    "a cycle": ("x: &x [*x]", "x: anchors and aliases (& and *) are not allowed"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "a: anchors and aliases (& and *) are not allowed"),
    "an alias of nothing": ("x: *x", "not valid YAML: found undefined alias 'x'"),
    "a merge": ("model: {<<: {width: 1}}", "merge keys (<<) are not allowed; use extends"),
    "a python object": ("run: !!python/object/apply:os.system [id]", "python/object/apply:os.system is not allowed"),
    "a python name": ("run: !!python/name:os.system x", "cannot be read as a value of type python/name:os.system"),
    "a python module": ("run: !!python/module:os x", "cannot be read as a value of type python/module:os"),
    "an object of python": ("run: !!python/object/new:subprocess.Popen [[id]]", "subprocess.Popen is not allowed"),
    "a set": ("run: !!set {a}", "the tag tag:yaml.org,2002:set is not allowed"),
    "binary data": ("run: {output_dir: !!binary aGVsbG8=}", "cannot be read as a value of type binary"),
    "a tag of one's own": ("run: {seed: !env SEED}", "'SEED' cannot be read as a value of type !env"),
    "a tag that lies": ("run: {seed: !!int one}", "run.seed: 'one' cannot be read as a value of type int"),
    # whole files
    "an empty file": (b"", "train: give exactly one of max_train_steps, max_train_seconds, num_train_epochs (none is given)"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "train: give exactly one of"),
    "a list": (b"- a\n- b\n", 'a config is a mapping of keys, got ["a", "b"]'),
    "a number": (b"3\n", "a config is a mapping of keys, got 3"),
    "prose": (b"train for ten steps\n", "a config is a mapping of keys, got 'train for ten steps'"),
    "JSON of a list": (b'[{"train": 1}]', "a config is a mapping of keys"),
    "UTF-16": (LIMIT.encode("utf-16"), "the file is not UTF-8 text (byte 0xff)"),
    "Latin-1": ("run: {output_dir: caf\u00e9}".encode("latin-1"), "the file is not UTF-8 text (byte 0xe9)"),
    "a video": (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "not valid YAML: unacceptable character #x0000"),
    "a PNG": (b"\x89PNG\r\n\x1a\n", "the file is not UTF-8 text (byte 0x89)"),
    "safetensors": (b'@\0\0\0\0\0\0\0{"w":{}}', "not valid YAML: unacceptable character #x0000"),
    "brackets without end": (b"a: " + b"[" * 20_000, "nested too deep"),
    "braces without end": (b"{a: " * 20_000, "nested too deep"),
    "questions without end": (b"? " * 3000 + b"1\n", "nested too deep"),
    "a deep but whole list": (b"a: " + b"[" * 51 + b"]" * 51, "nested too deep"),
    "a file of megabytes": (b"# " + b"x" * 10**6 + b"\n", "a config has at most 262144"),
    # extends
    "extends a number": ("extends: 3", "extends: should be a file name or a list of file names, got 3"),
    "extends null": ("extends: null", "extends: should be a file name or a list of file names, got null"),
    "extends a map": ("extends: {a: b}", "extends: should be a file name or a list of file names"),
    "extends nothing": ("extends: ''", ".: is a directory (extended by x.yaml:2)"),
    "extends what is not there": ("extends: ../none.yaml", "none.yaml: no such file (extended by x.yaml:2)"),
    "extends a folder": ("extends: .", ".: is a directory (extended by x.yaml:2)"),
    "extends itself": ("extends: x.yaml", "extends: the files extend each other: x.yaml -> x.yaml"),
    "extends in a circle": ("extends: circle.yaml", "x.yaml -> circle.yaml -> x.yaml (circle.yaml:1)"),
    "extends a device": ("extends: /dev/zero", "/dev/zero: not a regular file"),
    "extends a pipe": ("extends: pipe.yaml", "pipe.yaml: not a regular file"),
    "extends the passwords": ("extends: /etc/passwd", "(/etc/passwd:1)"),
    "extends a URL": ("extends: http://127.0.0.1:9/x.yaml", "no such file (extended by x.yaml:2)"),
    "extends a NUL": ('extends: "a\\0b"', r"a\x00b: embedded null byte"),
    "extends a fault": ("extends: faulty.yaml", "model.widht: unknown key; did you mean model.width? (faulty.yaml:2)"),
    # keys that disagree
    "two limits": (
        b"train: {max_train_steps: 1, max_train_seconds: 3}",
        "(max_train_steps and max_train_seconds are given; write null to the others)",
    ),
    "heads that do not divide": ("model: {width: 64, heads: 7}", "model: width 64 is not divisible by heads 7"),
    "a patch that does not divide": ("data: {height: 50}", "data.height 50 is not divisible by 12 of codec.patch_size"),
    "a sampler of the other path": ("validation: {scheduler: ddim}", "validation.scheduler: ddim does not fit"),
    "a sink under relu": (
        "model: {mixers: {temporal: {normaliser: relu, sink: logit}}}",
        "model.mixers.temporal.sink: ",
    ),
}  # fmt: skip

SEVERAL = {"laughs": 3, "a misspelt key of a pattern": 2}  # these have more than one fault

OVERRIDES = {  # override: what is said
    "foo": "override 'foo' is not of the form section.key=value",
    "": "override '' is not of the form section.key=value",
    "=3": "override '=3' is not of the form section.key=value",
    "a..b=3": "override 'a..b=3' is not of the form section.key=value",
    "model.width =3": "override 'model.width =3' is not of the form section.key=value",
    "model.widht=3": "model.widht: unknown key; did you mean model.width? (override model.widht=3)",
    "model.width=wide": "model.width: should be a whole number greater than 0, got 'wide' (override model.width=wide)",
    "model.width=[1": "model.width: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "model=3": "model: should be a mapping of keys, got 3 (override model=3)",
    "extends=x.yaml": "extends: unknown key",
    "tokens.patch_size.0=2": "tokens.patch_size: should be a list of 3 values",
    "model.width=&a 3": "model.width: anchors and aliases",
    "run.output_dir=!!python/name:os.system x": "cannot be read as a value of type python/name:os.system",
    "train.max_train_seconds=5": "(max_train_steps and max_train_seconds are given; write null to the others)",
    "model.width=1e400": "model.width: should be a whole number greater than 0, got .inf",
    "run.output_dir=\udcff": r"unacceptable character #xdcff: special characters are not allowed",
}

BESIDE = {"circle.yaml": "extends: x.yaml\n", "faulty.yaml": "model:\n  widht: 3\n"}

RUN = """
import io, json, sys
from contextlib import redirect_stderr
from pathlib import Path
from stgen import cli, config
config.help_text = lambda schema: ""  # of every parser; it is not what is tested, and takes longer than a case
told = []
for content, overrides in json.loads(Path("cases.json").read_text()):
    Path("x.yaml").write_bytes(content.encode("latin-1"))
    said, code = io.StringIO(), None
    with redirect_stderr(said):
        try:
            cli.train(["x.yaml", "--dry-run", "--", *overrides])
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    told.append((code, said.getvalue()))
heavy = sorted({"torch", "numpy", "diffusers", "transformers", "av", "wandb"} & set(sys.modules))
Path("told.json").write_text(json.dumps([told, heavy]))
"""


def tell(folder: Path, cases: list[tuple[bytes, list[str]]]) -> list[tuple[Any, str]]:
    """Exit code and standard error of `train.py x.yaml` for each file and its overrides; nothing heavy was imported."""
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    if not (folder / "pipe.yaml").exists():
        os.mkfifo(folder / "pipe.yaml")
    (folder / "cases.json").write_text(json.dumps([(content.decode("latin-1"), own) for content, own in cases]))
    command, environment = [sys.executable, "-c", RUN], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told, heavy = json.loads((folder / "told.json").read_text())
    assert not heavy, "imported before the config was judged"
    return told


def fault_of(code: Any, said: str) -> str | None:
    """What is wrong with how a malformed config was told; None if nothing is."""
    lines = said.splitlines()
    if code != 2:
        return f"exit code {code!r}"
    if not lines or "Traceback" in said or not all(line.startswith("config error: ") for line in lines):
        return f"not told in lines of their own: {said[:300]!r}"
    if long := [line for line in lines if len(line) > 500]:
        return f"a line of {len(long[0])} characters"
    if not all(c.isprintable() for line in lines for c in line):
        return "a character that moves the cursor"
    return None


def test_hand_made_faults_are_told_in_one_line(tmp_path, figure):
    files = [text if isinstance(text, bytes) else f"{LIMIT}{text}\n".encode() for text, _ in HAND_MADE.values()]
    cases = [*((file, []) for file in files), *((LIMIT.encode(), [override]) for override in OVERRIDES)]
    expected = [*(said for _, said in HAND_MADE.values()), *OVERRIDES.values()]
    assert len(cases) >= 120
    wrong = []
    for name, (code, said), part in zip([*HAND_MADE, *OVERRIDES], tell(tmp_path, cases), expected, strict=True):
        fault = fault_of(code, said) or (None if part in said else f"{part!r} is not in {said!r}")
        fault = fault or (None if said.count("\n") == SEVERAL.get(name, 1) else f"as many lines as faults: {said}")
        wrong += [f"{name}: {fault}"] if fault else []
    assert not wrong, "\n".join(wrong)
    figure("hand-made malformed configs told in a line each, exit 2, nothing heavy imported", len(cases))


# ------------------------------------------------------------------------------------------------ generated faults

WHOLE = """
model:
  plan: joint win
  mixers:
    joint:
      order: tile
      block: [2, 2, 2]
      pattern: [{kind: local, radius: [2, 1, 1]}, {kind: global, frames: 1}]
      reuse: {what: map, every: 2}
    win: {layout: window, size: [2, 2, 2], heads: {"0": {pattern: {kind: topk, ratio: 0.5}}}}
"""
OPEN = ("mixers", "heads", "prompts")  # below these a user chooses names, or any string will do


def whole_tree(folder: Path) -> dict[str, Any]:
    """A config with every key written, as plain data."""
    (folder / "whole.yaml").write_text(WHOLE)
    cfg = config.load(folder / "whole.yaml", ["train.max_train_steps=10"], schema.Config)
    return YAML(typ="safe", pure=True).load(config.dump(cfg))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def misspelt(chance: random.Random, key: str) -> str:
    """The key with one letter lost, doubled or changed."""
    i = chance.randrange(len(key))
    return key[:i] + chance.choice(["", key[i] * 2, "x"]) + key[i + 1 :]


def damaged(chance: random.Random, tree: dict[str, Any]) -> tuple[bytes, str, str]:
    """A copy of the tree as YAML with one fault, the dotted key of the fault, and what a line must hold beside it."""
    tree = json.loads(json.dumps(tree))
    while True:
        path = chance.choice(places(tree))
        home, key = at(tree, path[:-1]), path[-1]
        dotted = ".".join(map(str, path))
        if chance.random() < 0.4:
            other = misspelt(chance, key) if isinstance(key, str) else ""
            if not other or key == "kind" or other in home or (len(path) > 1 and path[-2] in OPEN):
                continue
            items = list(home.items())
            home.clear()
            home.update({other if name == key else name: value for name, value in items})
            return written(tree), ".".join(map(str, (*path[:-1], other))), "unknown key"
        value = home[key]
        if key in OPEN or isinstance(value, dict | list) or value is None or key == "kind":
            continue
        wrong = 7 if isinstance(value, str) else chance.choice(["no such", [["x"]], {"no_such": 1}, False, ".nan"])
        if isinstance(value, bool):
            wrong = chance.choice(["no such", 1, [True]])
        home[key] = float("nan") if wrong == ".nan" else wrong
        return written(tree), dotted, "" if isinstance(wrong, dict) else "got "


def written(tree: dict[str, Any]) -> bytes:
    """A tree as block YAML, a key a line; JSON is YAML, but for NaN."""
    return json.dumps(tree, indent=1).replace("NaN", ".nan").encode()


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_generated_faults_are_told_at_their_key(tmp_path, count, figure):
    chance = random.Random(8)
    tree = whole_tree(tmp_path)
    cases = [damaged(chance, tree) for _ in range(count)]
    wrong = []
    for (_, key, part), (code, said) in zip(cases, tell(tmp_path, [(c, []) for c, _, _ in cases]), strict=True):
        fault = fault_of(code, said)
        key = re.sub(r"(\.\d+)+$", "", key)  # of an item of a list, perhaps told of the list
        lines = [line for line in said.splitlines() if f"config error: {key}" in line and "(x.yaml:" in line]
        if fault is None and not any(part in line for line in lines):
            fault = f"no line names the key and says {part!r}: {said!r}"
        if fault:
            wrong.append(f"{key}: {fault}")
    assert not wrong, "\n".join(wrong[:20])
    figure("generated malformed configs told at their key, exit 2, nothing heavy imported", count)


def test_the_undamaged_tree_is_accepted(tmp_path):
    """Else the generated faults would prove nothing."""
    (tmp_path / "x.yaml").write_bytes(written(whole_tree(tmp_path)))
    assert config.load(tmp_path / "x.yaml", [], schema.Config).model.plan == "joint win"


def test_a_flood_of_faults_is_cut_short(tmp_path):
    (tmp_path / "x.yaml").write_text("".join(f"k{i}: 1\n" for i in range(3000)))
    with pytest.raises(config.ConfigError) as refusal:
        config.load(tmp_path / "x.yaml", [], schema.Config)
    assert len(refusal.value.errors) == 51 and "and 2951 more" in refusal.value.errors[-1]


@pytest.mark.parametrize("name", ["a\x1b[2Jb.yaml", "a\nb.yaml", "a\u202eb.yaml", "x" * 300, "pipe", "a\udcffb.yaml"])
def test_strange_file_names_are_told_in_one_line(tmp_path, name):
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    with pytest.raises(config.ConfigError) as refusal:
        config.load(tmp_path / name, [], schema.Config)
    (line,) = refusal.value.errors
    assert all(c.isprintable() for c in line) and len(line) < 300

"""The config loader: every fault is one line that says which key, what is wrong and where it was written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, model_validator

from stgen.attention.patterns import KINDS
from stgen.config import ConfigError, differences, dump, help_text, load
from stgen.schema import Config

LIMIT = "train: {max_train_steps: 10}\n"
SECTIONS = ", ".join(Config.model_fields)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files are named relative to the folder, as a user names them."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def read(text: str | bytes, *overrides: str, schema: type[BaseModel] = Config) -> Any:
    return load(write("x.yaml", text), overrides, schema)


def faults(text: str | bytes, *overrides: str, schema: type[BaseModel] = Config) -> list[str]:
    """The lines of the refusal, each without its prefix."""
    with pytest.raises(ConfigError) as refusal:
        read(text, *overrides, schema=schema)
    assert str(refusal.value) == "\n".join(refusal.value.errors)
    assert len(str(refusal.value).splitlines()) == len(refusal.value.errors)
    assert all(line.startswith("config error: ") for line in refusal.value.errors)
    return [line.removeprefix("config error: ") for line in refusal.value.errors]


# --- one fault, one line: the keys below `train` stand on the second line of the file ---------------------------------

IN_FILE = {  # second line of the file -> the whole refusal
    "model: {widht: 3}": "model.widht: unknown key; did you mean model.width? (x.yaml:2)",
    "modle: {width: 3}": "modle: unknown key; did you mean model? (x.yaml:2)",
    "learning_rate: 1e-4": "learning_rate: unknown key; did you mean optim.learning_rate? (x.yaml:2)",
    "seed: 1": "seed: unknown key; did you mean run.seed or validation.seed? (x.yaml:2)",
    "model: {layuot: joint}": "model.layuot: unknown key; did you mean model.mixers.NAME.layout? (x.yaml:2)",
    "model: {mixers: {win: {layuot: joint}}}": (
        "model.mixers.win.layuot: unknown key; did you mean model.mixers.win.layout? (x.yaml:2)"
    ),
    "zzz: 1": f"zzz: unknown key; the keys here are {SECTIONS} (x.yaml:2)",
    "ema: {zzz: 1}": "ema.zzz: unknown key; the keys here are decay (x.yaml:2)",
    "optim.learning_rate: 3": (
        "optim.learning_rate: unknown key; dotted keys are for overrides: in a file, nest them (x.yaml:2)"
    ),
    '"a\\nb": 1': f"a b: unknown key; the keys here are {SECTIONS} (x.yaml:2)",
    "codec: {path: x}": "codec.path: unknown key for kind pca; it belongs to kind diffusers (x.yaml:2)",
    "codec: {kind: pixels, components: 3}": (
        "codec.components: unknown key for kind pixels; it belongs to kind pca (x.yaml:2)"
    ),
    "codec: {kind: vae}": "codec.kind: should be one of pca, pixels, diffusers, got 'vae' (x.yaml:2)",
    "codec: {kind: [pca]}": 'codec.kind: should be one of pca, pixels, diffusers, got ["pca"] (x.yaml:2)',
    "codec: {kind: null}": "codec.kind: should be one of pca, pixels, diffusers, got null (x.yaml:2)",
    "codec: {kind: diffusers}": "codec.path: is required (a string) (x.yaml:2)",
    "codec: diffusers": "codec.path: is required (a string) (x.yaml:2)",
    "codec: pixel": "codec: should be one of pca, pixels, diffusers, got 'pixel'; did you mean pixels? (x.yaml:2)",
    "codec: {kind: pixel}": (
        "codec.kind: should be one of pca, pixels, diffusers, got 'pixel'; did you mean pixels? (x.yaml:2)"
    ),
    "codec: 3": "codec: should be a mapping of keys or one of pca, pixels, diffusers, got 3 (x.yaml:2)",
    "codec: [pca]": 'codec: should be a mapping of keys or one of pca, pixels, diffusers, got ["pca"] (x.yaml:2)',
    "model: {width: wide}": "model.width: should be a whole number greater than 0, got 'wide' (x.yaml:2)",
    'model: {width: "64"}': "model.width: should be a whole number greater than 0, got '64' (x.yaml:2)",
    "model: {width: true}": "model.width: should be a whole number greater than 0, got true (x.yaml:2)",
    "model: {width: 64.5}": "model.width: should be a whole number greater than 0, got 64.5 (x.yaml:2)",
    "model: {width: 0}": "model.width: should be a whole number greater than 0, got 0 (x.yaml:2)",
    "model: {width: null}": "model.width: should be a whole number greater than 0, got null (x.yaml:2)",
    "model: {width: [64]}": "model.width: should be a whole number greater than 0, got [64] (x.yaml:2)",
    "model: {qk_norm: no}": "model.qk_norm: should be true or false, got 'no' (x.yaml:2)",
    "model: {qk_norm: 1}": "model.qk_norm: should be true or false, got 1 (x.yaml:2)",
    "run: {seed: -1}": "run.seed: should be a whole number of at least 0, got -1 (x.yaml:2)",
    "run: {output_dir: 123}": "run.output_dir: should be a string, got 123; put it in quotes (x.yaml:2)",
    "log: {group: 2}": "log.group: should be a string or null, got 2; put it in quotes (x.yaml:2)",
    "run: {device: tpu}": "run.device: should be one of auto, cpu, cuda, got 'tpu' (x.yaml:2)",
    "data: {fps: 0}": "data.fps: should be a number greater than 0 or null, got 0 (x.yaml:2)",
    "optim: {learning_rate: true}": "optim.learning_rate: should be a number greater than 0, got true (x.yaml:2)",
    "optim: {learning_rate: .nan}": "optim.learning_rate: should be a number greater than 0, got .nan (x.yaml:2)",
    "optim: {learning_rate: 1e999}": "optim.learning_rate: should be a number greater than 0, got .inf (x.yaml:2)",
    "optim: {learning_rate: '1e-4'}": "optim.learning_rate: should be a number greater than 0, got '1e-4' (x.yaml:2)",
    "optim: {adam_beta1: 2}": "optim.adam_beta1: should be a number of at least 0 and less than 1, got 2 (x.yaml:2)",
    "optim:": "optim: should be a mapping of keys, got null (x.yaml:2)",
    "optim: [1]": "optim: should be a mapping of keys, got [1] (x.yaml:2)",
    "tokens: {patch_size: [1, 2]}": (
        "tokens.patch_size: should be a list of 3 values, each a whole number greater than 0, got [1, 2] (x.yaml:2)"
    ),
    "tokens: {patch_size: []}": (
        "tokens.patch_size: should be a list of 3 values, each a whole number greater than 0, got [] (x.yaml:2)"
    ),
    "tokens: {patch_size: 2}": (
        "tokens.patch_size: should be a list of 3 values, each a whole number greater than 0, got 2 (x.yaml:2)"
    ),
    "tokens: {patch_size: [1, 0, 1]}": (
        "tokens.patch_size.1: should be a whole number greater than 0, got 0 (x.yaml:2)"
    ),
    "validation: {prompts: a}": (
        "validation.prompts: should be a list of 1 or more values, each a string or null, got 'a' (x.yaml:2)"
    ),
    "validation: {prompts: []}": (
        "validation.prompts: should be a list of 1 or more values, each a string or null, got [] (x.yaml:2)"
    ),
    "validation: {prompts: [a, 1]}": "validation.prompts.1: should be a string, got 1; put it in quotes (x.yaml:2)",
    "model: {mixers: {win: 3}}": "model.mixers.win: should be a mapping of keys or one of attention, tcn, rnn, lstm, gru, "
    "got 3 (x.yaml:2)",
    "model: {width: 64, heads: 7}": "model: width 64 is not divisible by heads 7 (x.yaml:2)",
    "data: {height: 50}": "data.height 50 is not divisible by 12 of codec.patch_size (x.yaml:2)",
    # YAML's traps
    "train: {}": "train: the key is given twice (x.yaml:2)",
    "model: {width: 1, width: 1}": "model.width: the key is given twice (x.yaml:2)",
    "model: &m {width: 64}": (
        "model: anchors and aliases (& and *) are not allowed; write the value out, or use extends (x.yaml:2)"
    ),
    "x: &x [*x]": "x: anchors and aliases (& and *) are not allowed; write the value out, or use extends (x.yaml:2)",
    "x: *x": "not valid YAML: found undefined alias 'x' (x.yaml:2)",
    "model: {<<: {width: 1}}": "model: merge keys (<<) are not allowed; use extends (x.yaml:2)",
    "run: !!python/object/apply:os.system [ls]": (
        "run: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed (x.yaml:2)"
    ),
    "run: !!python/name:os.system ls": ("run: 'ls' cannot be read as a value of type python/name:os.system (x.yaml:2)"),
    "run: !!set {a}": "run: the tag tag:yaml.org,2002:set is not allowed (x.yaml:2)",
    "run: {seed: !!int one}": "run.seed: 'one' cannot be read as a value of type int (x.yaml:2)",
    'run: {output_dir: "\\ud800"}': "run.output_dir: '\\ud800' cannot be read as a value of type str (x.yaml:2)",
    "1: 2": "keys are plain or quoted strings, got 1 (x.yaml:2)",
    "true: 2": "keys are plain or quoted strings, got true (x.yaml:2)",
    "? [a, b]\n: 2": "keys are plain or quoted strings, got a list or mapping (x.yaml:2)",
    "&k model: {}": "keys are plain or quoted strings, got model (x.yaml:2)",
    "\tmodel: {}": "not valid YAML: found character '\\t' that cannot start any token; indent with spaces (x.yaml:2)",
    "---\nmodel: {}": "not valid YAML: but found another document (x.yaml:2)",
    "model: {width: 1": "not valid YAML: expected ',' or '}', but got '<stream end>' (x.yaml:3)",
    "extends: 3": "extends: should be a file name or a list of file names, got 3 (x.yaml:2)",
    "extends: [a.yaml, 3]": 'extends: should be a file name or a list of file names, got ["a.yaml", 3] (x.yaml:2)',
    "extends: base.yaml": "base.yaml: no such file (extended by x.yaml:2)",
    "extends: .": ".: is a directory (extended by x.yaml:2)",
    "extends: x.yaml": "extends: the files extend each other: x.yaml -> x.yaml (x.yaml:2)",
}


@pytest.mark.parametrize("line", IN_FILE)
def test_a_fault_in_the_file_is_one_line(line):
    assert faults(f"{LIMIT}{line}\n") == [IN_FILE[line]]


WHOLE_FILES = {
    b"": "train: give exactly one of max_train_steps, max_train_seconds, num_train_epochs (none is given) (x.yaml)",
    b"# nothing\n": (
        "train: give exactly one of max_train_steps, max_train_seconds, num_train_epochs (none is given) (x.yaml)"
    ),
    b"- a\n- b\n": 'a config is a mapping of keys, got ["a", "b"] (x.yaml:1)',
    b"text": "a config is a mapping of keys, got 'text' (x.yaml:1)",
    b"a: 1\nb: \xff\n": "the file is not UTF-8 text (byte 0xff) (x.yaml:2)",
    "a: 1".encode("utf-16"): "the file is not UTF-8 text (byte 0xff) (x.yaml:1)",
    b"a: \x00": "not valid YAML: unacceptable character #x0000: special characters are not allowed (x.yaml:1)",
    b"\xef\xbb\xbf%YAML 1.1\n---\na: no\n": "YAML directives (lines that begin with %) are not allowed (x.yaml:1)",
    b"%YAML 1.1\n---\na: no\n": "YAML directives (lines that begin with %) are not allowed (x.yaml:1)",
    b"a: " + b"[" * 20_000 + b"]" * 20_000: "nested too deep (x.yaml:1)",
    b"a: " + b"[" * 51 + b"]" * 51: "a" + ".0" * 39 + "…: nested too deep (x.yaml:1)",
}


@pytest.mark.parametrize("raw", WHOLE_FILES, ids=range(len(WHOLE_FILES)))
def test_a_file_that_is_no_config_is_one_line(raw):
    assert faults(raw) == [WHOLE_FILES[raw]]


IN_OVERRIDE = {
    "model.widht=3": "model.widht: unknown key; did you mean model.width? (override model.widht=3)",
    "model.width=wide": (
        "model.width: should be a whole number greater than 0, got 'wide' (override model.width=wide)"
    ),
    "--model.width=3": "--model: unknown key; did you mean model? (override --model.width=3)",
    "foo": "override 'foo' is not of the form section.key=value",
    "": "override '' is not of the form section.key=value",
    "=3": "override '=3' is not of the form section.key=value",
    ".a=3": "override '.a=3' is not of the form section.key=value",
    "a..b=3": "override 'a..b=3' is not of the form section.key=value",
    "model.width =3": "override 'model.width =3' is not of the form section.key=value",
    "ema.decay=[1": ("ema.decay: not valid YAML: expected ',' or ']', but got '<stream end>' (override ema.decay=[1)"),
    "run.output_dir={a: b}": (
        'run.output_dir: should be a string, got {"a": "b"}; put it in quotes (override run.output_dir={a: b})'
    ),
    "run.output_dir=null": "run.output_dir: should be a string, got null (override run.output_dir=null)",
    "model=3": "model: should be a mapping of keys, got 3 (override model=3)",
    "extends=x.yaml": f"extends: unknown key; the keys here are {SECTIONS} (override extends=x.yaml)",
    "model.plan=foo": (
        "model.plan: no mixer is called 'foo'; known are gru, height, joint, lstm, rnn, spatial, tcn, temporal, width "
        "(add it to model.mixers) (override model.plan=foo)"
    ),
    "train.max_train_seconds=5": (
        "train: give exactly one of max_train_steps, max_train_seconds, num_train_epochs "
        "(max_train_steps and max_train_seconds are given; write null to the others) "
        "(x.yaml:1, override train.max_train_seconds=5)"
    ),
    "model.depth=" + "9" * 5000: (
        f"model.depth: {'9' * 79}… is beyond 2^63, the largest whole number that is read (override model.depth={'9' * 67}…)"
    ),
    "run.output_dir=\udcff": (
        "run.output_dir: not valid YAML: unacceptable character #xdcff: special characters are not allowed "
        "(override run.output_dir=\\udcff)"
    ),
}


@pytest.mark.parametrize("override", IN_OVERRIDE, ids=range(len(IN_OVERRIDE)))
def test_a_fault_in_an_override_is_one_line(override):
    assert faults(LIMIT, override) == [IN_OVERRIDE[override]]


def test_all_faults_are_told_at_once():
    lines = faults(
        "model:\n  layuot: joint\n  width: wide\ncodec:\n  components: -1\n", "optim.learning_rate=0", "zzz=1"
    )
    assert sorted(lines) == sorted(
        [
            "model.layuot: unknown key; did you mean model.mixers.NAME.layout? (x.yaml:2)",
            "model.width: should be a whole number greater than 0, got 'wide' (x.yaml:3)",
            "codec.components: should be a whole number greater than 0, got -1 (x.yaml:5)",
            "optim.learning_rate: should be a number greater than 0, got 0 (override optim.learning_rate=0)",
            f"zzz: unknown key; the keys here are {SECTIONS} (override zzz=1)",
            "train: give exactly one of max_train_steps, max_train_seconds, num_train_epochs (none is given) (x.yaml)",
        ]
    )
    assert faults("a: 1\na: 2\nb: 1\nb: 2\n", "foo", "=3") == [
        "a: the key is given twice (x.yaml:2)",
        "b: the key is given twice (x.yaml:4)",
        "override 'foo' is not of the form section.key=value",
        "override '=3' is not of the form section.key=value",
    ]


def test_a_file_that_cannot_be_read_is_one_line(monkeypatch):
    for name, fault in {
        "absent.yaml": "absent.yaml: no such file",
        ".": ".: is a directory",
        "a\0b": "a\\x00b: embedded null byte",
    }.items():
        with pytest.raises(ConfigError) as refusal:
            load(name, [], Config)
        assert refusal.value.errors == [f"config error: {fault}"]

    def denied(path):
        raise PermissionError(13, "Permission denied")

    write("secret.yaml", LIMIT)
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ConfigError, match=r"^config error: secret\.yaml: permission denied$"):
        load("secret.yaml", [], Config)


# --- values ----------------------------------------------------------------------------------------------------------


def test_yaml_is_1_2():
    config = read(
        LIMIT + "optim: {learning_rate: 1e-4, adam_weight_decay: 1}\n"
        "model: {width: 1e3, heads: 0xA}\nrun: {output_dir: no, seed: 012}\n"
        "validation: {prompts: [on, 16:9, 2024-01-01]}\n"
    )
    assert config.optim.learning_rate == 1e-4
    assert config.optim.adam_weight_decay == 1.0
    assert (config.model.width, config.model.heads, config.run.seed) == (1000, 10, 12)
    assert (config.run.output_dir, config.validation.prompts) == ("no", ["on", "16:9", "2024-01-01"])
    assert read(LIMIT, "train.mixed_precision=no").train.mixed_precision == "no"


def test_a_byte_order_mark_is_not_part_of_a_key():
    assert read(b"\xef\xbb\xbf" + LIMIT.encode()).train.max_train_steps == 10


def test_a_string_may_be_typed_without_quotes_on_the_command_line():
    config = read(LIMIT, "run.output_dir=0123", "log.group=1e3", "validation.negative_prompt=", "log.name=null")
    assert (config.run.output_dir, config.log.group) == ("0123", "1e3")
    assert (config.validation.negative_prompt, config.log.name) == ("", None)


def test_overrides():
    config = read(
        LIMIT + "model: {width: 96, heads: 3}\n",
        "model.width=66",
        "model.width=60",
        "model.plan=win spatial",
        "tokens.patch_size=[1, 2, 2]",
        "model.mixers.win={layout: window, size: [1, 2, 2]}",
        "model.mixers.win.shift=[0, 1, 1]",
        "train.max_train_steps=null",
        "train.max_train_seconds=30",
    )
    assert (config.model.width, config.model.heads, config.tokens.patch_size) == (60, 3, (1, 2, 2))
    assert (config.model.mixers["win"].size, config.model.mixers["win"].shift) == ((1, 2, 2), (0, 1, 1))
    assert (config.train.max_train_steps, config.train.max_train_seconds) == (None, 30.0)


# --- extends ---------------------------------------------------------------------------------------------------------


def test_extends_merges_deeply_and_later_wins():
    write("bases/data.yaml", "data: {height: 24, width: 24}\nvalidation: {prompts: [a, b]}\n")
    write("bases/common.yaml", f"extends: data.yaml\n{LIMIT}data: {{height: 36}}\nmodel: {{width: 32, heads: 1}}\n")
    write("bases/wide.yaml", "model: {width: 64}\n")
    config = read("extends: [bases/common.yaml, bases/wide.yaml]\nvalidation: {prompts: [c]}\nmodel: {depth: 2}\n")
    assert (config.data.height, config.data.width) == (36, 24)
    assert (config.model.width, config.model.heads, config.model.depth) == (64, 1, 2)
    assert config.validation.prompts == ["c"]


def test_an_extended_file_is_named_where_it_is_at_fault():
    write("bases/common.yaml", f"{LIMIT}\nmodel:\n  widht: 3\n  depth: 0\n")
    assert faults("extends: bases/common.yaml\n") == [
        "model.depth: should be a whole number from 1 to 1024, got 0 (bases/common.yaml:5)",
        "model.widht: unknown key; did you mean model.width? (bases/common.yaml:4)",
    ]


def test_a_loop_of_extends_names_the_chain():
    write("bases/a.yaml", "extends: b.yaml\n")
    write("bases/b.yaml", "extends: ../x.yaml\n")
    assert faults("\nextends: bases/a.yaml\n") == [
        "extends: the files extend each other: x.yaml -> bases/a.yaml -> bases/b.yaml -> x.yaml (bases/b.yaml:1)"
    ]


def test_one_base_may_be_extended_twice():
    write("base.yaml", LIMIT)
    write("a.yaml", "extends: base.yaml\nmodel: {depth: 2}\n")
    write("b.yaml", "extends: base.yaml\nema: {decay: 0.5}\n")
    config = read("extends: [a.yaml, b.yaml]\n")
    assert (config.model.depth, config.ema.decay, config.train.max_train_steps) == (2, 0.5, 10)


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_the_default_kind_need_not_be_written():
    assert read(LIMIT, "codec.components=64").codec.components == 64
    assert read(LIMIT, "text.width=64").text.kind == "words"


def test_choosing_another_kind_drops_the_keys_of_the_first():
    pca = LIMIT + "codec: {kind: pca, components: 64}\n"
    assert read(pca, "codec.kind=pixels").codec.kind == "pixels"
    assert read(LIMIT + "codec: {components: 64}\n", "codec.kind=pixels").codec.kind == "pixels"
    for overrides in (["codec.kind=diffusers", "codec.path=x"], ["codec.path=x", "codec.kind=diffusers"]):
        assert (read(pca, *overrides).codec.kind, read(pca, *overrides).codec.path) == ("diffusers", "x")
    write("base.yaml", pca)
    assert read("extends: base.yaml\ncodec: {kind: diffusers, path: y}\n").codec.path == "y"


def test_choosing_the_same_section_keeps_its_keys():
    assert read(LIMIT + "codec: {components: 64}\n", "codec.kind=pca").codec.components == 64
    text = read(LIMIT + "text: {kind: words, width: 32}\n", "text.kind=bytes").text
    assert (text.kind, text.width) == ("bytes", 32)


# --- short forms of unions -------------------------------------------------------------------------------------------

PATTERN = "model.mixers.temporal.pattern"
KIND_LIST = ", ".join(KINDS)
WITH_RADIUS = " or ".join(kind for kind, keys in KINDS.items() if "radius" in keys.model_fields)
FORMS = f"a mapping of keys, a list or one of {KIND_LIST}"
PER_AXIS = "a whole number of at least 0 or a list of 3 values, each a whole number of at least 0"
PER_AXIS += ", or a mapping of kind linear, cosine, stairs, plateau"


def mixer(text: str) -> str:
    """A config whose mixer `temporal` has the keys in `text`, which begins on the fifth line."""
    lines = "".join(f"      {line}\n" for line in text.splitlines())
    return f"{LIMIT}model:\n  mixers:\n    temporal:\n{lines}      layout: temporal\n"


def pattern(text: str, *overrides: str):
    """The pattern of the mixer, as plain data."""
    return read(mixer(text), *overrides).model.mixers["temporal"].pattern.model_dump(mode="json")


FULL, CAUSAL = {"kind": "full"}, {"kind": "causal"}


def local(radius):
    return {"kind": "local", "radius": radius, "border": "cut"}


@pytest.mark.parametrize(
    "text, meant",
    {
        "full": FULL,
        "[full]": {"kind": "any", "any": [FULL]},
        "{any: [full]}": {"kind": "any", "any": [FULL]},
        "{all: [full, causal]}": {"kind": "all", "all": [FULL, CAUSAL]},
        "[{kind: local, radius: 2}, causal]": {"kind": "any", "any": [local(2), CAUSAL]},
        "{kind: all, all: [[full, {all: [causal]}], {kind: local, radius: [1, 2, 3]}]}": {
            "kind": "all",
            "all": [{"kind": "any", "any": [FULL, {"kind": "all", "all": [CAUSAL]}]}, local([1, 2, 3])],
        },
    }.items(),
)
def test_short_forms_in_a_file_and_in_an_override(text, meant):
    assert pattern(f"pattern: {text}") == meant
    assert pattern("", f"{PATTERN}={text}") == meant
    write("base.yaml", mixer(f"pattern: {text}"))
    assert read("extends: base.yaml").model.mixers["temporal"].pattern.model_dump(mode="json") == meant


def test_short_forms_of_other_unions():
    assert read(LIMIT + "codec: pixels\ntext: bytes\n").codec.kind == "pixels"
    assert read(LIMIT, "text=bytes").text.kind == "bytes"
    heads = (
        read(mixer('heads: {"0": {pattern: [full], sink: logit}, "1": {pattern: null}}')).model.mixers["temporal"].heads
    )
    assert heads["0"].pattern.model_dump(mode="json") == {"kind": "any", "any": [FULL]}
    assert (heads["0"].sink.kind, heads["0"].normaliser, heads["1"].pattern) == ("logit", None, None)


OVER = {  # pattern of the base, pattern of the layer above it -> what the two mean
    ("{kind: local, radius: 2, border: clamp}", "{radius: 3}"): {"kind": "local", "radius": 3, "border": "clamp"},
    ("{kind: local, radius: 2}", "full"): FULL,
    ("local", "{radius: 3}"): local(3),
    ("{kind: local, radius: 2}", "local"): local(2),  # the bare kind is no more than {kind: local}
    ("{kind: local, radius: 2}", "[causal]"): {"kind": "any", "any": [CAUSAL]},
    ("{kind: local, radius: 2}", "{all: [causal]}"): {"kind": "all", "all": [CAUSAL]},
    ("full", "{kind: local, radius: 3}"): local(3),
    ("[full, causal]", "[causal]"): {"kind": "any", "any": [CAUSAL]},
    ("[full, causal]", "{all: [causal]}"): {"kind": "all", "all": [CAUSAL]},
    ("{all: [full]}", "{all: [causal]}"): {"kind": "all", "all": [CAUSAL]},
    ("{all: [full]}", "full"): FULL,
}


@pytest.mark.parametrize("base, layer", OVER)
def test_short_forms_over_one_another(base, layer):
    write("base.yaml", mixer(f"pattern: {base}"))
    above = read(f"extends: base.yaml\nmodel: {{mixers: {{temporal: {{pattern: {layer}}}}}}}\n")
    assert above.model.mixers["temporal"].pattern.model_dump(mode="json") == OVER[base, layer]
    assert pattern(f"pattern: {base}", f"{PATTERN}={layer}") == OVER[base, layer]


def test_overrides_of_one_pattern_come_in_any_order():
    for overrides in ([f"{PATTERN}=local", f"{PATTERN}.radius=3"], [f"{PATTERN}.radius=3", f"{PATTERN}=local"]):
        assert pattern("pattern: [full]", *overrides) == local(3)
    heads = 'heads: {"0": {pattern: {radius: 3}}}'  # no default to be of another kind
    completed = read(mixer(heads), "model.mixers.temporal.heads.0.pattern=local").model.mixers["temporal"]
    assert completed.heads["0"].pattern.model_dump(mode="json") == local(3)
    assert pattern("", f"{PATTERN}={{kind: local, radius: 2}}", f"{PATTERN}=[causal]", f"{PATTERN}=full") == FULL


IN_PATTERN = {  # pattern, which begins on the fifth line -> the whole refusal
    "locl": f": should be one of {KIND_LIST}, got 'locl'; did you mean local? (x.yaml:5)",
    "{kind: locl}": f".kind: should be one of {KIND_LIST}, got 'locl'; did you mean local? (x.yaml:5)",
    "zzz": f": should be one of {KIND_LIST}, got 'zzz' (x.yaml:5)",
    "local": f".radius: is required ({PER_AXIS}) (x.yaml:5)",
    "3": f": should be {FORMS}, got 3 (x.yaml:5)",
    "null": f": should be {FORMS}, got null (x.yaml:5)",
    "[]": ": should be a list of 1 or more values, each a mapping of keys, a list or a kind, got [] (x.yaml:5)",
    "any": ".any: is required (a list of 1 or more values, each a mapping of keys, a list or a kind) (x.yaml:5)",
    "{all: full}": (
        ".all: should be a list of 1 or more values, each a mapping of keys, a list or a kind, got 'full' (x.yaml:5)"
    ),
    "{radius: 3}": f".radius: unknown key for kind full; it belongs to kind {WITH_RADIUS} (x.yaml:5)",
    "{al: [full]}": ".al: unknown key; did you mean model.mixers.NAME.pattern.all? (x.yaml:5)",
    "\n- full\n- local": f".1.radius: is required ({PER_AXIS}) (x.yaml:7)",
    "\n- {kind: local,\n   radius: x}": f".0.radius: should be {PER_AXIS}, got 'x' (x.yaml:7)",
    "\n- full\n- {kind: local, radius: 1, bordr: cut}": (
        f".1.bordr: unknown key; did you mean {PATTERN}.1.border? (x.yaml:7)"
    ),
    "\n- {radius: 3}": f".0.kind: is required (one of {KIND_LIST}) (x.yaml:6)",
    "\n- {}": f".0.kind: is required (one of {KIND_LIST}) (x.yaml:6)",
    "\n- full\n-\n  - causl": f".1.0: should be one of {KIND_LIST}, got 'causl'; did you mean causal? (x.yaml:8)",
    "\n- full\n- all:\n  - full\n  - 3": f".1.all.1: should be {FORMS}, got 3 (x.yaml:9)",
    "\n- full\n-": f".1: should be {FORMS}, got null (x.yaml:7)",
}


@pytest.mark.parametrize("text", IN_PATTERN)
def test_a_fault_in_a_pattern_is_told_where_the_user_wrote_it(text):
    block = "pattern:" + text.replace("\n", "\n  ") if text.startswith("\n") else f"pattern: {text}"
    assert faults(mixer(block)) == [PATTERN + IN_PATTERN[text]]


def test_a_fault_in_the_pattern_of_an_override():
    override = f"{PATTERN}=[full, locl]"
    assert faults(mixer(""), override) == [
        f"{PATTERN}.1: should be one of {KIND_LIST}, got 'locl'; did you mean local? (override {override})"
    ]
    assert faults(mixer("pattern: [full]"), f"{PATTERN}.0=causal") == [
        f"{PATTERN}.0: unknown key; the items of a list cannot be set one by one: write the whole list "
        f"(override {PATTERN}.0=causal)"
    ]


def test_a_fault_in_the_pattern_of_some_heads():
    heads = "model.mixers.temporal.heads.0-1"
    assert faults(mixer('heads:\n  "0-1":\n    sink: logi\n    pattern: 3\n    normaliser: [relu]')) == [
        f"{heads}.pattern: should be null, {FORMS}, got 3 (x.yaml:8)",
        f"{heads}.normaliser: should be null, a mapping of keys or one of softmax, off_by_one, relu, relu2, poly, "
        "poly_logits, linear, "
        'got ["relu"] (x.yaml:9)',
        f"{heads}.sink: should be one of none, logit, tokens, got 'logi'; did you mean logit? (x.yaml:7)",
    ]
    assert faults(mixer('heads:\n  "0-1": {pattern: {radius: 3}}')) == [
        f"{heads}.pattern.kind: is required (one of {KIND_LIST}) (x.yaml:6)"
    ]


def test_a_rule_is_told_at_the_key_that_it_names():
    class Leaf(BaseModel, extra="forbid"):
        size: int = 1

    class Branch(BaseModel, extra="forbid"):
        leaves: dict[str, Leaf] = {}
        tokens: int = 0
        order: str = ""
        rule: str = ""

        @model_validator(mode="after")
        def _breaks(self):
            raise ValueError(self.rule)

    class Tree(BaseModel, extra="forbid"):
        tokens: int = 0
        branch: Branch = Branch.model_construct()

    def told(rule: str) -> str:
        text = f"tokens: 1\nbranch:\n  leaves:\n    0-1:\n      size: 3\n  order: tile\n  rule: '{rule}'\n"
        (line,) = faults(text, schema=Tree)
        return line

    assert told("order: not of tokens.") == "branch.order: not of tokens. (x.yaml:6)"  # the words are prose here
    assert told("order: not of leaves") == "branch.order: not of leaves (x.yaml:6)"
    assert told("order: not with branch.rule") == "branch.order: not with branch.rule (x.yaml:6, x.yaml:7)"
    assert told("leaves.0-1.size: too large") == "branch.leaves.0-1.size: too large (x.yaml:5)"
    assert told("leaves.0-1: too large") == "branch.leaves.0-1: too large (x.yaml:4)"
    assert told("tokens: too few") == "branch.tokens: too few (x.yaml:2)"
    assert told("order and rule: no") == "branch: order and rule: no (x.yaml:6, x.yaml:7)"
    assert told("no") == "branch: no (x.yaml:2)"


def test_the_rules_of_a_mixer_are_told_at_its_keys():
    lines = faults(mixer("normaliser: relu\npattern:\n  - full\nsink:\n  kind: logit"))
    assert [line.split(":")[0] for line in lines] == ["model.mixers.temporal.sink"]
    assert lines[0].endswith(" (x.yaml:8)")
    lines = faults(mixer('heads:\n  "a": {}'))
    assert [line.split(":")[0] for line in lines] == ["model.mixers.temporal.heads"]
    assert lines[0].endswith(" (x.yaml:5)")


def lengthened(value):
    """A pattern in its long form."""
    match value:
        case str():
            return {"kind": value}
        case list():
            return {"kind": "any", "any": [lengthened(item) for item in value]}
        case {"all": items}:
            return {"kind": "all", "all": [lengthened(item) for item in items]}
    return value


singles = st.sampled_from(["full", "causal", {"kind": "full"}, local(0), local([1, 0, 2])])
patterns = st.recursive(
    singles, lambda inner: st.one_of(lists := st.lists(inner, min_size=1, max_size=3), lists.map(lambda i: {"all": i}))
)


@given(own=patterns, of_a_head=patterns)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pattern_is_read_short_or_long_and_dumped(own, of_a_head):
    def written(own, of_a_head) -> str:
        return mixer(f"pattern: {json.dumps(own)}\nheads: {{'1': {{pattern: {json.dumps(of_a_head)}}}}}")

    config = read(written(own, of_a_head))
    assert read(written(lengthened(own), lengthened(of_a_head))) == config
    assert config.model.mixers["temporal"].pattern.model_dump(mode="json") == lengthened(own)
    assert read(dump(config)) == config


def test_a_pattern_as_deep_as_a_file_may_be_is_dumped_as_deep():
    config = read(mixer(f"pattern: {'[' * 46}full{']' * 46}"))
    assert read(dump(config)) == config
    (line,) = faults(mixer(f"pattern: {'[' * 47}full{']' * 47}"))
    assert line.endswith(": nested too deep (x.yaml:5)")


# --- faces of the loader ---------------------------------------------------------------------------------------------

NASTY = [
    "no",
    "1e-4",
    "a: b",
    "# c",
    "",
    " pad ",
    "two\nlines",
    "tab\t",
    "'\"",
    "é 日本 🎬",
    "null",
    "x" * 300,
    "2024-01-01",
]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["codec.kind=diffusers", "codec.path=x"],
        ["text.kind=bytes", "codec.kind=pixels", "data.fps=7.5", "optim.learning_rate=1e-12"],
        ["model.mixers.win={layout: window, size: [1, 2, 2]}", "model.plan=win>spatial"],
    ],
)
def test_a_dump_reads_back_equal(overrides):
    config = read(LIMIT, *overrides)
    prompts = config.validation.model_copy(update={"prompts": NASTY})
    config = config.model_copy(update={"validation": prompts})
    assert read(dump(config)) == config
    assert config.validation.prompts == NASTY


def test_a_dump_writes_every_key_in_order():
    text = dump(read(LIMIT))
    assert [line[:-1] for line in text.splitlines() if line[0].isalpha()] == list(Config.model_fields)
    assert "\n  patch_size: [4, 12, 12]\n" in text
    assert "\n  max_train_seconds: null\n" in text


def members(annotation) -> list[type[BaseModel]]:
    """The sections of a union, or the section alone."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, tuple, dict):
        return []
    return [member for arg in get_args(annotation) for member in members(arg)]


def schema_leaves(annotation, prefix: str = "", met: list | None = None) -> list[str]:
    """Every key below an annotation, walked without the loader's help: a union where it is met, its members once."""
    met = [] if met is None else met
    if get_origin(annotation) is dict:
        return schema_leaves(get_args(annotation)[1], f"{prefix}.NAME", met)
    sections = members(annotation)
    own = [] if len(sections) == 1 else [prefix.lstrip(".")]
    if len(sections) > 1 and sections in met:
        return own
    met.append(sections)
    fields = [field for section in sections for field in section.model_fields.items()]
    return own + [leaf for key, field in fields for leaf in schema_leaves(field.annotation, f"{prefix}.{key}", met)]


def test_help_lists_every_key_with_its_meaning():
    text = help_text(Config)
    lines = text.splitlines()
    leaves = schema_leaves(Config)
    assert len(leaves) > 80 and {"optim.learning_rate", "model.mixers.NAME.layout", "codec.path"} <= set(leaves)
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert sorted(listed) == sorted(leaves)
    assert max(map(len, lines)) <= 120
    assert {"codec (kind: pca)", "codec (kind: pixels)", "text (kind: words, bytes)", "model.mlp"} <= set(lines)
    rows = [" ".join(line.split()) for line in lines]
    assert "optim.learning_rate float > 0 = 0.0003 Peak learning rate." in rows
    assert "ema.decay float >= 0, < 1 = 0.999 Decay" in " ".join(rows)
    assert "log.wandb auto | online | offline | disabled = auto" in rows  # too long a type: the meaning follows below
    assert any(row.startswith("codec.path str, required Folder") for row in rows)
    assert any(row.startswith("tokens.patch_size [int, int, int] = [1, 1, 1] ") for row in rows)
    assert any(row.startswith("data.fps float > 0 | null = null ") for row in rows)


def test_help_tells_a_union_once_and_refers_to_it():
    lines = help_text(Config).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    pattern = "model.mixers.NAME.pattern"
    assert f"{pattern} KIND | {{kind: KIND, ...}} | [pattern, ...] | {{all: [pattern, ...]}} = full" in rows
    assert f"{pattern}.any [pattern, ...], required The patterns to unite." in rows
    assert "model.mixers.NAME.sink KIND | {kind: KIND, ...} = none Mass that goes to no token." in rows
    assert [lines.count(f"{pattern} (kind: {kind})") for kind in KINDS] == [1] * len(KINDS)
    assert f"model.mixers.NAME.heads.NAME.pattern as {pattern} | null = null" in rows
    assert not any(row.startswith("model.mixers.NAME.heads.NAME.pattern.") for row in rows)
    heads = lines.index("model.mixers.NAME.heads.NAME")
    assert lines[heads + 1].startswith("    Heads that differ")


def test_a_dump_is_short():
    text = dump(
        read(mixer("pattern:\n- {kind: local, radius: [1, 2, 3]}\n- all: [causal, [{kind: local, radius: 1}]]"))
    )
    assert (
        "      pattern:\n"
        "      - {kind: local, radius: [1, 2, 3], border: cut}\n"
        "      - kind: all\n"
        "        all:\n"
        "        - causal\n"
        "        - - {kind: local, radius: 1, border: cut}\n"
        "      normaliser: softmax\n"
        "      sink: none\n"
    ) in text
    text = dump(read(mixer("pattern: [full, {all: [causal, full]}]")))
    assert "      pattern:\n      - full\n      - {kind: all, all: [causal, full]}\n" in text


def test_differences():
    old = read(LIMIT)
    new = read(LIMIT, "optim.learning_rate=3e-3", "log.name=a", "tokens.patch_size=[1, 2, 2]", "codec.kind=pixels")
    assert differences(old, old) == []
    assert differences(old, new) == [
        "codec.kind: pca -> pixels",
        "codec.patch_size: [4, 12, 12] -> absent",
        "codec.components: 128 -> absent",
        "codec.fit_clips: 512 -> absent",
        "tokens.patch_size: [1, 1, 1] -> [1, 2, 2]",
        "optim.learning_rate: 0.0003 -> 0.003",
        "log.name: null -> a",
    ]
    assert differences(old.model_dump(), old) == []
    lists = [read(mixer(f"pattern: [{{kind: local, radius: {r}}}, causal]")) for r in (1, 2)]
    assert differences(*lists) == [f"{PATTERN}.any.0.radius: 1 -> 2"]
    assert differences(lists[0], read(mixer("pattern: [full]"))) == [
        f"{PATTERN}.any.0.kind: local -> full",
        f"{PATTERN}.any.0.radius: 1 -> absent",
        f"{PATTERN}.any.0.border: cut -> absent",
        f"{PATTERN}.any.1.kind: causal -> absent",
    ]
    assert differences({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2], "c": None}}) == ["a.c: absent -> null"]


def test_the_loader_knows_no_field():
    class Leaf(BaseModel, extra="forbid", use_attribute_docstrings=True):
        size: int = Field(default=3, ge=1, le=9)
        """How big."""

    class Tree(BaseModel, extra="forbid"):
        leaf: Leaf = Leaf()
        amount: str | int = "all"

    assert read("leaf: {size: 4}", schema=Tree).leaf.size == 4
    assert read("amount: 4", schema=Tree).amount == 4
    assert faults("leaf: {sise: 4, size: 10}", schema=Tree) == [
        "leaf.size: should be a whole number from 1 to 9, got 10 (x.yaml:1)",
        "leaf.sise: unknown key; did you mean leaf.size? (x.yaml:1)",
    ]
    assert faults("amount: 1.5", schema=Tree) == ["amount: should be a string or a whole number, got 1.5 (x.yaml:1)"]
    assert " ".join(help_text(Tree).split()) == "amount str | int = all leaf leaf.size int in [1, 9] = 3 How big."


def test_the_loader_knows_no_union():
    class Leaf(BaseModel, extra="forbid"):
        kind: Literal["leaf"] = "leaf"
        note: str = ""

    class Twig(BaseModel, extra="forbid"):
        kind: Literal["twig"] = "twig"
        any: "Annotated[Leaf | Twig, Field(discriminator='kind')]"

    class Pair(BaseModel, extra="forbid"):
        kind: Literal["pair"] = "pair"
        pair: tuple[Annotated[Leaf | Twig, Field(discriminator="kind")], int]

    Twig.model_rebuild(_types_namespace={"Leaf": Leaf, "Twig": Twig})

    class Tree(BaseModel, extra="forbid"):
        trees: dict[str, Annotated[Leaf | Twig | Pair, Field(discriminator="kind")]] = {}
        notes: list[Annotated[Leaf | Twig, Field(discriminator="kind")]] = []

    text = "trees: {a: leaf, b: {kind: twig, any: leaf}, c: {pair: [{kind: twig, any: leaf}, 3]}}\nnotes: [leaf]\n"
    tree = read(text, schema=Tree)
    assert tree.model_dump(mode="json") == {
        "trees": {
            "a": {"kind": "leaf", "note": ""},
            "b": {"kind": "twig", "any": {"kind": "leaf", "note": ""}},
            "c": {"kind": "pair", "pair": [{"kind": "twig", "any": {"kind": "leaf", "note": ""}}, 3]},
        },
        "notes": [{"kind": "leaf", "note": ""}],
    }
    overrides = ["trees.b.any.note=x", "trees.b={kind: twig, any: leaf}"]
    for order in (overrides, overrides[::-1]):
        assert read("", *order, schema=Tree).trees["b"].any.note == "x"
    for note in NASTY:  # a section within a list stands on one line
        tree.notes[0].note = note
        assert read(dump(tree), schema=Tree) == tree
    assert faults("trees: {a: {}, b: [leaf], c: {pair: [leaf, x]}}", schema=Tree) == [
        "trees.a.kind: is required (one of leaf, twig, pair) (x.yaml:1)",
        'trees.b: should be a mapping of keys or one of leaf, twig, pair, got ["leaf"] (x.yaml:1)',
        "trees.c.pair.1: should be a whole number, got 'x' (x.yaml:1)",
    ]
    assert "trees.NAME.any" in help_text(Tree)


def test_neither_loader_nor_schema_imports_torch():
    code = "import sys, stgen.config, stgen.schema; stgen.config.help_text(stgen.schema.Config); print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "stgen.schema" in done.stdout.split()
    assert not {"torch", "numpy", "diffusers"} & set(done.stdout.split())

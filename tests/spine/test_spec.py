"""What a mixer may not be: one sentence each, told when the config loads, that says what to write instead."""

import pytest

from stgen import config, schema

QUICK = "configs/quickstart.yaml"
TILED = "{layout: joint, order: tile, block: [2, 2, 2]"

FAULTS = {
    # the mixer `a`, with changes of the model: what the line says
    "{layout: temporal, normaliser: relu, sink: logit}": "model.mixers.a.sink: a logit is mass in a softmax, but relu "
    "divides by the number of keys; write kind: tokens",
    "{layout: temporal, normaliser: linear, sink: logit}": "divides by a sum of features; write kind: tokens",
    "{layout: temporal, normaliser: off_by_one, sink: logit}": "off_by_one is softmax with a logit sink fixed at 0",
    "{normaliser: linear, pattern: {kind: local, radius: 1}}": "model.mixers.a.normaliser: linear sums over all keys and "
    "cannot leave out those that local does",
    "{normaliser: {kind: linear, features: favor}, pattern: causal}": "favor scales keys by the largest of a sequence",
    "{normaliser: linear, pattern: causal, order: tile}": "model.mixers.a.order: causal linear attention sums frame by frame",
    "{normaliser: linear, reuse: {what: map}}": "model.mixers.a.reuse: linear attention has no map; write what: kv or output",
    "{normaliser: {kind: linear, features: elu, size: 8}}": "size belongs to features favor and learned",
    "{pattern: [{kind: local, radius: 1}, {kind: linformer, keys: 4}]}": "model.mixers.a.pattern: linformer makes keys of "
    "its own and stands alone",
    "{pattern: [{kind: linformer, keys: 4}]}": "linformer makes keys of its own and stands alone",
    "{pattern: {kind: linformer, keys: 4}, reuse: {what: map}}": "so its map fits no other layer; write kv",
    "{pattern: {kind: sliding_tile, window: [1, 1, 1]}}": "sliding_tile moves over tiles of tokens; write order: tile",
    "{layout: window, size: [4, 4, 4], order: tile, pattern: {kind: sliding_tile, window: [1, 1, 1]}}": "not of a window",
    "{pattern: {all: [causal, entropy]}}": "entropy looks at all queries of a clip, so causal would leak the future",
    "{pattern: {all: [causal, topk]}}": "topk pools whole blocks, and blocks of several frames would leak the future",
    TILED + ", pattern: {all: [causal, topk]}}": "write order: tile and block: [1, rows, columns]",
    "{pattern: {kind: strided, stride: 0}}": "model.mixers.a.pattern",
    "{pattern: []}": "model.mixers.a.pattern",
    "{pattern: {kind: local, radius: -1}}": "model.mixers.a.pattern",
    "{reuse: {what: support}}": "full attention has no support to reuse",
    "{reuse: {every: 2}}": "every and source say where to take from; add what",
    "{reuse: {what: kv, every: 2, source: 0}}": "give every (uses of this mixer) or source (a layer), not both",
    "{reuse: {what: kv, source: 9}}": "source 9 is no layer of the plan, which has 0 to 3",
    "{layout: window, size: [2, 2, 2], shift: [1, 1, 1], reuse: {what: map}}": "shift their windows differently",
    "{heads: {a: {sink: logit}}}": 'is no range of heads; write "0-3" or "5"',
    '{heads: {"0-4": {sink: logit}}}': "names head 4, but the mixer has 4 (0 to 3)",
    '{heads: {"0-1": {sink: logit}, "1": {sink: none}}}': "names heads that another entry has named",
    "{layout: spatial, memory: {kind: infini, segment: 1}}": "memory: layout spatial has no time to remember; write memory: "
    "none, or layout: joint or temporal",
    "{layout: window, size: [2, 2, 2], memory: {kind: infini, segment: 1}}": "layout window is cut in time already",
    "{memory: {kind: infini, segment: 0}}": "model.mixers.a.memory",
    "{memory: infini}": "model.mixers.a.memory",
    "{memory: {kind: infini, segment: 1}, reuse: {what: kv}}": "infini keeps what a layer has computed itself, not the kv of "
    "an earlier one; write reuse: none or output",
    "{memory: {kind: infini, segment: 1}, order: tile, pattern: sliding_tile}": "sliding_tile moves over the tiles of a clip, "
    "not of a segment",
    "{memory: {kind: infini, segment: 3}}": "segments of 3 frames do not divide the 2 frames of tokens of a clip; write a "
    "segment that does, such as 2",
    "{memory: {kind: ring, window: 2}}": "model.mixers.a.memory: ring keeps the frames before one's own, but full looks at "
    "later ones; write pattern: causal, or {all: [causal, ...]}",
    '{memory: {kind: ring, window: 2}, heads: {"0-1": {pattern: causal}}}': "but full looks at later ones",
    "{memory: {kind: ring, window: 2}, pattern: causal, normaliser: linear}": "cannot leave out those that a ring does; write "
    "memory: infini, or another normaliser",
    "{memory: {kind: ring, window: 2}, pattern: causal, approximate: {quantise: [k]}}": "under causal write form: fixed",
    "{memory: {kind: ring, window: 0}, pattern: causal}": "model.mixers.a.memory",
    '{normaliser: relu, heads: {"0-1": {sink: logit}}}': "model.mixers.a.heads.0-1.sink: a logit is mass in a softmax",
}


def fault(mixer, *more):
    overrides = ["model.heads=4", "model.depth=4", "model.plan=a", f"model.mixers.a={mixer}", *more]
    with pytest.raises(config.ConfigError) as caught:
        config.load(QUICK, overrides, schema.Config)
    (line,) = caught.value.errors
    assert "\n" not in line and line.startswith("config error: model.")
    return line


@pytest.mark.parametrize("mixer", FAULTS)
def test_a_choice_without_meaning_is_one_sentence(mixer):
    assert FAULTS[mixer] in fault(mixer)


def test_reuse_that_has_nowhere_to_take_from():
    assert "no layer takes from another, since the plan does not use a often enough" in fault(
        "{reuse: {what: kv}}", "model.plan=a spatial*3"
    )
    assert "since the plan does not use a after layer 3" in fault("{reuse: {what: kv, source: 3}}")
    assert "kv of 2 heads in layer 0 cannot serve 4 in layer 1" in fault(
        "{reuse: {what: kv, source: 0}}", "model.plan=a|spatial a*3"
    )
    assert "differ in" in fault("{layout: temporal, reuse: {what: map, source: 0}}", "model.plan=spatial a*3")


def test_registers_refuse_what_they_would_break():
    assert "so causal in mixers.a would leak the future; write registers: 0" in fault(
        "{pattern: causal}", "model.registers=2"
    )
    assert "makes keys of a clip's own tokens" in fault("{pattern: {kind: linformer, keys: 4}}", "model.registers=2")


@pytest.mark.parametrize(
    "mixer",
    [
        "{pattern: {kind: local, radius: 99}}",  # larger than the grid: equals full
        "{pattern: [{kind: local, radius: [1, 2, 2]}, {kind: global, frames: 1}]}",
        TILED + ", pattern: {all: [causal, {kind: topk, level: token}]}}",
        '{heads: {"0-1": {pattern: {kind: local, radius: 1}}, "2-3": {normaliser: relu}}}',
        "{layout: temporal, sink: {kind: tokens, count: 2}, reuse: {what: map, every: 4}}",
        "{layout: temporal, memory: {kind: infini, segment: 1, delta: true, truncate: 1}}",
        "{memory: {kind: ring, window: 9}, pattern: {all: [causal, {kind: local, radius: 1}]}, reuse: {what: output}}",
        '{pattern: topk, normaliser: linear, heads: {"0-3": {pattern: full}}}',  # no head has the pair
        "{normaliser: {kind: linear, features: favor, redraw_steps: 100}, sink: tokens}",
    ],
)
def test_what_has_a_meaning_loads_and_reads_back(mixer, tmp_path):
    overrides = ["model.heads=4", "model.depth=4", "model.plan=a", f"model.mixers.a={mixer}"]
    cfg = config.load(QUICK, overrides, schema.Config)
    (tmp_path / "again.yaml").write_text(config.dump(cfg))
    assert config.load(tmp_path / "again.yaml", [], schema.Config) == cfg


def test_an_entry_named_after_a_layout_has_that_layout():
    overrides = ["model.plan=spatial temporal", "model.mixers.temporal.pattern=causal"]
    cfg = config.load(QUICK, overrides, schema.Config)
    assert cfg.model.mixer("temporal").layout == "temporal" and cfg.model.mixer("spatial").layout == "spatial"
    other = config.load(QUICK, [*overrides, "model.mixers.temporal.layout=width"], schema.Config)
    assert other.model.mixer("temporal").layout == "width"

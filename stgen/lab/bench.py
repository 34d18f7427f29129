"""What a run's attention costs here: each mixer of its plan against dense attention, and from what length on it wins.

Times are medians of calls as a training step makes them (eager, the way into and out of the layout included), on random
queries, keys and values of the run's own shapes. The contenders take turns, so that a busy machine is unfair to none.
"""

import inspect
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from stgen import build, codec, schema, source
from stgen.attention import attend, reuse
from stgen.attention.attend import Mixer
from stgen.attention.pattern import PatternError
from stgen.attention.reuse import Kept, Use
from stgen.attention.spec import AttentionMixer
from stgen.describe import mixer_words
from stgen.lab.tables import percent, table
from stgen.tokens import Grid, grid_of

LONG_SECONDS = 1.0  # a call that takes longer is measured on fewer clips, and ends its curve
RUNG_CALLS = 5  # of each contender on each length; the first warms up, which the median does not see
GROWTH = 3.0  # times as long that twice the length takes, about, for the time left
GROWN = {"spatial": "hw", "height": "h", "width": "w"}  # the axes along which a layout's ladder grows; others: frames
RUNGS = range(-3, 24)  # doublings of the run's own grid on a ladder, if none takes too long
PROMPT_TOKENS = 16
DENSE, JOINT = "dense in its layout", "full joint"


class BenchError(ValueError):
    """Something that cannot be measured; one sentence that says what to do."""


@dataclass(frozen=True)
class Shapes:
    """What attention is measured on."""

    grid: Grid
    clips: int
    head_dim: int
    registers: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Case:
    """Places of the plan at which a mixer does the same at the same cost."""

    name: str
    use: Use
    lender: Use | None  # the place it takes from
    layers: list[int]


@dataclass
class Contender:
    """A forward pass to be timed, and the tensors that its backward pass gives gradients to."""

    name: str
    device: torch.device
    run: Callable[[], Sequence[Tensor]]
    inputs: list[Tensor]
    forward: list[float] = field(default_factory=list)  # seconds
    both: list[float] = field(default_factory=list)
    failure: str = ""
    _d_out: list[Tensor] = field(default_factory=list)

    @property
    def slow(self) -> bool:
        """Whether it takes long, or cannot run at all."""
        return bool(self.failure) or (bool(self.both) and min(self.both) > LONG_SECONDS)

    def measure(self, counted: bool = True) -> None:
        """Time the forward pass, and forward and backward; what cannot run says why and is left alone from then on."""
        try:
            with torch.no_grad():
                forward = _seconds(self.run, self.device)
            both = _seconds(self._forward_backward, self.device)
        except Exception as error:  # refused, out of memory, or whatever a compiler may raise
            self.failure = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            return
        if counted:
            self.forward.append(forward)
            self.both.append(both)

    def _forward_backward(self) -> None:
        outputs = self.run()
        if not self._d_out:
            self._d_out = [torch.randn_like(out) for out in outputs]
        torch.autograd.grad(outputs, self.inputs, self._d_out, allow_unused=True)

    @property
    def ms(self) -> dict[str, float] | None:
        """Medians; None where nothing was measured."""
        if self.failure or not self.both:
            return None
        return {
            "forward_ms": 1e3 * statistics.median(self.forward),
            "forward_backward_ms": 1e3 * statistics.median(self.both),
        }


@dataclass
class Ladder:
    """One mixer and its rivals over growing grids: milliseconds forward and backward of one clip, by contender."""

    name: str
    rungs: list[tuple[Grid, dict[str, float]]] = field(default_factory=list)
    ended: str = ""

    def crossover(self, rival: str) -> tuple[Grid | None, Grid | None] | None:
        """The last grid at which the rival is as fast and the first from which on it is slower; None if never compared."""
        known = [(grid, ms) for grid, ms in self.rungs if rival in ms and self.name in ms]
        if not known:
            return None
        lost = [i for i, (_, ms) in enumerate(known) if ms[self.name] >= ms[rival]]
        last = lost[-1] if lost else -1
        won = known[last + 1][0] if last + 1 < len(known) else None
        return (known[last][0] if lost else None), won


def bench_attention(cfg: schema.Config, device: torch.device, output_dir: Path, repeats: int = 10) -> dict[str, Any]:
    """Measure the attention of a config, print it, and write bench.json and bench.png; returns what the former holds.

    An interruption prints and writes what has been measured, and then goes on to the caller.
    """
    _make(output_dir)
    transformer, latent_shape, grid = _model(cfg, device)
    cases = _cases(cfg)
    dtype = torch.bfloat16 if cfg.train.mixed_precision == "bf16" else torch.float32
    part = cfg.train.train_batch_size // cfg.train.gradient_accumulation_steps
    one = Shapes(grid, 1, cfg.model.width // cfg.model.heads, cfg.model.registers, dtype, device)
    one_step = _step_contender(transformer, latent_shape, one)
    shapes = replace(one, clips=_clips(one, cfg.model.heads, part, one_step))
    print(_announcement(cfg, shapes, cases, repeats, part))

    step = _step_contender(transformer, latent_shape, shapes)
    contenders = {case.name: _contenders(case, shapes) for case in cases}
    impls: dict[str, list[Contender]] = {}
    ladders: list[Ladder] = []
    try:
        _take_turns("mixers", [step, *(c for group in contenders.values() for c in group)], repeats)
        for name, (own, *_) in contenders.items():
            impls |= {} if own.failure else _implementations(name, own, shapes)
        _take_turns("implementations", [c for group in impls.values() for c in group], repeats)
        for case in (case for case in cases if case.lender is None):
            ladders.append(Ladder(case.name))
            _climb(ladders[-1], case, one)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    result = _as_json(cfg, shapes, cases, contenders, step, impls, ladders) | {"interrupted": interrupted}
    _report(result, ladders, output_dir)
    if interrupted:
        raise KeyboardInterrupt
    return result


# ------------------------------------------------------------------------------------------------------ what is there


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--output_dir: {out} cannot be written to: {error.strerror}") from None


def _model(cfg: schema.Config, device: torch.device) -> tuple[Any, tuple[int, ...], Grid]:
    """The transformer with fresh weights, the latents' shape (C, T, H, W) and the token grid."""
    torch.manual_seed(cfg.run.seed)
    _, _, text_width = build.build_text(cfg, source.known_captions(cfg))
    component = build.build_codec(cfg)
    shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    transformer: Any = build.build_transformer(cfg, shape, text_width)
    return transformer.to(device), shape, grid_of(shape[1:], cfg.tokens.patch_size)


def _cases(cfg: schema.Config) -> list[Case]:
    """The uses of the plan, those together that cost the same."""
    mixers = {name: cfg.model.mixer(name) for name in cfg.model.mixer_names}
    placed = reuse.place(cfg.model.layers, mixers, cfg.model.heads)
    uses = [use for layer in placed for term in layer for branch in term for use in branch]
    if not any(use.has_map for use in uses):
        raise BenchError(f'model.plan: "{cfg.model.plan}" has no attention to measure; name a mixer of kind attention')
    found: dict[str, Case] = {}
    for use in (use for use in uses if use.has_map):
        name = _name(use, cfg.model.heads)
        lender = None if use.source is None else uses[use.source]
        found.setdefault(name, Case(name, use, lender, [])).layers.append(use.layer)
    return list(found.values())


def _name(use: Use, heads: int) -> str:
    """A mixer's name and whatever else decides what it costs."""
    notes = [
        f"{use.heads} heads" if use.heads < heads else "",
        f"{use.takes} taken" if use.source is not None else "",
        f"{' and '.join(sorted(use.lends))} lent" if use.lends else "",
        "shifted" if any(use.shift) else "",
    ]
    said = ", ".join(filter(None, notes))
    return f"{use.name} ({said})" if said else use.name


def _clips(one: Shapes, heads: int, part: int, step: Contender) -> int:
    """Clips measured at once: those of a part of the batch, fewer where the model or full joint attention takes long."""
    slowest = 0.0
    for contender in (step, _mixer_contender(JOINT, _plain(AttentionMixer(), heads), None, one)):
        contender.measure(counted=False)  # the first call warms up
        contender.measure()
        slowest = max([slowest, *contender.both])
    return max(1, min(part, int(LONG_SECONDS / slowest))) if slowest else part


def _plain(keys: AttentionMixer, heads: int, turn: int = 0) -> Use:
    return Use(0, 0, keys.layout, keys, heads, turn)


def _contenders(case: Case, shapes: Shapes) -> list[Contender]:
    """The case as the plan has it, then the rivals that differ from it."""
    return [
        _mixer_contender(case.name, case.use, case.lender, shapes),
        *(_mixer_contender(name, use, None, shapes) for name, use in _rivals(case).items()),
    ]


def _rivals(case: Case) -> dict[str, Use]:
    """Dense softmax attention of as many heads, in the same layout and over the whole clip, where it is another thing."""
    keys, turn = case.use.keys, case.use.turn
    dense = AttentionMixer(layout=keys.layout, size=keys.size, shift=keys.shift)
    alone = {"reuse", "order", "block"}  # these do not change what a dense softmax computes
    same = keys.model_dump(exclude=alone) == dense.model_dump(exclude=alone) and case.lender is None
    rivals = {} if same and "map" not in case.use.lends else {DENSE: _plain(dense, case.use.heads, turn)}
    return rivals if keys.layout == "joint" else {**rivals, JOINT: _plain(AttentionMixer(), case.use.heads)}


def _mixer_contender(name: str, use: Use, lender: Use | None, shapes: Shapes) -> Contender:
    """The attention of one use on q, k, v [B, registers + N, heads, D] as the model hands them over."""
    places = shapes.registers + shapes.grid.tokens
    packed = torch.randn(shapes.clips, places, 3, use.heads, shapes.head_dim, dtype=shapes.dtype, device=shapes.device)
    q, k, v = packed.unbind(2)
    q, k, v = (x.detach().requires_grad_() for x in (q.contiguous(), k.contiguous(), v))  # norm and RoPE make new q, k
    mixer = _mixer(use, shapes)
    with _precision(shapes):
        carry = {} if lender is None else {lender.number: _leaves(_mixer(lender, shapes)(q, k, v, shapes.grid, {})[1])}

    def run() -> tuple[Tensor]:
        with _precision(shapes):
            return (mixer(q, k, v, shapes.grid, carry)[0],)

    carried = [x for kept in carry.values() for x in (kept.k, kept.v, kept.output, *kept.maps) if x is not None]
    learned = [p for p in mixer.parameters() if p.requires_grad]
    return Contender(name, shapes.device, run, [q, k, v, *carried, *learned])


def _mixer(use: Use, shapes: Shapes) -> Mixer:
    return Mixer(use, shapes.head_dim, shapes.grid, shapes.registers).to(shapes.device)


def _leaves(kept: Kept) -> Kept:
    """The same without the graph of the layer that made it."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().requires_grad_()

    maps = [x.detach().requires_grad_() for x in kept.maps]
    return replace(kept, k=leaf(kept.k), v=leaf(kept.v), output=leaf(kept.output), maps=maps)


def _precision(shapes: Shapes) -> torch.autocast:
    return torch.autocast(shapes.device.type, torch.bfloat16, enabled=shapes.dtype == torch.bfloat16)


def _step_contender(transformer: Any, latent_shape: tuple[int, ...], shapes: Shapes) -> Contender:
    """The whole model, for what share of a step attention is."""
    generated = {"dtype": torch.float32, "device": shapes.device}
    latents = torch.randn(shapes.clips, *latent_shape, **generated)
    times = torch.rand(shapes.clips, **generated)
    prompt = torch.randn(shapes.clips, PROMPT_TOKENS, transformer.config.text_width, **generated)
    transformer.train()

    def run() -> tuple[Tensor]:
        with _precision(shapes):
            return (transformer(latents, 1000 * times, prompt, return_dict=False)[0],)

    return Contender("step", shapes.device, run, [p for p in transformer.parameters() if p.requires_grad])


# ----------------------------------------------------------------------------------------------------- implementations


def _implementations(name: str, contender: Contender, shapes: Shapes) -> dict[str, list[Contender]]:
    """For each operation with several implementations that a mixer calls: each of them, on what it was called with."""
    calls: list[tuple[Callable, tuple, dict[str, Any]]] = []
    with torch.no_grad(), _recorded(calls):
        contender.run()
    made: dict[str, list[Contender]] = {}
    for op in dict.fromkeys(op for op, _, _ in calls):
        own = [(_leaf_arguments(args), _leaf_arguments(kwargs)) for other, args, kwargs in calls if other is op]
        made[f"{name}: {op.__name__}"] = [
            _op_contender(op, impl, own, shapes) for impl in ("auto", *(i for i in _impls(op) if i != "auto"))
        ]
    return made


def _op_contender(op: Callable, impl: str, calls: list[tuple[Any, Any]], shapes: Shapes) -> Contender:
    def run() -> list[Tensor]:
        with _precision(shapes):
            return [op(*args, **{**kwargs, "impl": impl}) for args, kwargs in calls]

    values = [x for args, kwargs in calls for x in (*args, *kwargs.values())]
    return Contender(impl, shapes.device, run, [x for x in values if isinstance(x, Tensor) and x.requires_grad])


def _leaf_arguments(arguments: Any) -> Any:
    def leaf(x: Any) -> Any:
        return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {k: leaf(x) for k, x in arguments.items()} if isinstance(arguments, dict) else tuple(map(leaf, arguments))


@contextmanager
def _recorded(calls: list[tuple[Callable, tuple, dict[str, Any]]]) -> Iterator[None]:
    """Within it, what attention asks of operations that have several implementations is noted in `calls`."""

    def spy(op: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append((op, args, kwargs))
            return op(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, op in list(vars(attend).items()):
            if inspect.isfunction(op) and _impls(op):
                stack.enter_context(patch.object(attend, name, spy(op)))
        yield


def _impls(op: Callable) -> tuple[str, ...]:
    """The implementations that an operation may be told to take."""
    parameter = inspect.signature(op).parameters.get("impl")
    return () if parameter is None else get_args(parameter.annotation)


# ------------------------------------------------------------------------------------------------------------- timing


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _take_turns(what: str, contenders: Sequence[Contender], repeats: int) -> None:
    """Rounds in which each is measured once; the first warms up."""
    with tqdm(total=(repeats + 1) * len(contenders), desc=what, unit="call") as bar:
        for i in range(repeats + 1):
            for contender in contenders:
                if not contender.failure:
                    contender.measure(counted=i > 0)
                bar.update()


def _climb(ladder: Ladder, case: Case, one: Shapes) -> None:
    """Measure the case and its rivals on growing grids until the case, or the last of its rivals, takes long."""
    uses, slow = {case.name: case.use, **_rivals(case)}, set()
    if len(uses) == 1:
        ladder.ended = "full joint attention itself"
        return
    with tqdm(desc=f"lengths, {case.name}", unit="length", bar_format="{desc}: {n_fmt} in {elapsed}{postfix}") as bar:
        for grid in _grids(case.use.keys.layout, one.grid):
            start, shapes = time.perf_counter(), replace(one, grid=grid)
            try:
                racing = [_mixer_contender(name, use, None, shapes) for name, use in uses.items() if name not in slow]
            except PatternError:  # the pattern, or its sink, needs a larger grid
                continue
            for contender in racing * RUNG_CALLS:
                if not contender.slow:
                    contender.measure()
            ladder.rungs.append((grid, {c.name: c.ms["forward_backward_ms"] for c in racing if c.ms is not None}))
            bar.update()
            slow |= {c.name for c in racing if c.slow}
            if case.name in slow or len(slow) == len(uses) - 1:
                ladder.ended = next((c.failure for c in racing if c.failure), f"{', '.join(sorted(slow))} took long")
                return
            left = _seconds_left(ladder, slow, time.perf_counter() - start)
            bar.set_postfix_str(f"{grid.tokens} tokens, about {left:.0f} s left")


def _seconds_left(ladder: Ladder, slow: set[str], spent: float) -> float:
    """Until the ladder ends, if each length takes `GROWTH` times as long as the one before, of which the last took `spent`."""
    ms = {name: value for name, value in ladder.rungs[-1][1].items() if name not in slow}
    own = ms.pop(ladder.name)
    deciding = max(own, *ms.values()) / 1e3
    more = max(1, math.ceil(math.log(LONG_SECONDS / deciding, GROWTH)))
    return sum(spent * GROWTH**i for i in range(1, more + 1))


def _grids(layout: str, own: Grid) -> Iterator[Grid]:
    """Grids around the run's own, from small ones on, each about twice as large as the one before."""
    axes, before = GROWN.get(layout, "t"), None
    for doublings in RUNGS:
        extents = {"t": own.t, "h": own.h, "w": own.w}
        each, rest = divmod(doublings, len(axes))
        for i, axis in enumerate(axes):
            extents[axis] = max(1, int(extents[axis] * 2.0 ** (each + (i < rest))))
        if (grid := Grid(**extents)) != before:
            yield (before := grid)


# ---------------------------------------------------------------------------------------------------------- reporting


def _announcement(cfg: schema.Config, shapes: Shapes, cases: list[Case], repeats: int, part: int) -> str:
    where = f"cpu, {torch.get_num_threads()} threads"
    if shapes.device.type == "cuda":
        where = torch.cuda.get_device_name(shapes.device)
    fewer = f" (not {part}: a call would take over {LONG_SECONDS:g} s)" if shapes.clips < part else ""
    names, dtype = ", ".join(case.name for case in cases), str(shapes.dtype).removeprefix("torch.")
    rows = {
        "attention": f"{cfg.model.heads} heads x {shapes.head_dim}, {dtype}, {shapes.clips} clips at once{fewer} of "
        f"{shapes.grid.tokens} tokens ({shapes.grid})",
        "device": f"{where}, torch {torch.__version__}",
        "will run": f"{names} beside dense attention, {repeats} rounds; each implementation; growing lengths. Ctrl-C stops "
        "and keeps what is measured",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def _report(result: dict[str, Any], ladders: Sequence[Ladder], out: Path) -> None:
    """Print it, and write bench.json and bench.png."""
    files = [out / "bench.json"]
    files[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any(ladder.rungs for ladder in ladders):
        files.append(_draw(ladders, result["about"]["tokens"], out / "bench.png"))
    words = ["every number:", "interrupted; what was measured is in"][result["interrupted"]]
    print(f"{_in_words(result)}\n\n{words} {', '.join(map(str, files))}")


def _as_json(
    cfg: schema.Config,
    shapes: Shapes,
    cases: list[Case],
    contenders: dict[str, list[Contender]],
    step: Contender,
    impls: dict[str, list[Contender]],
    ladders: list[Ladder],
) -> dict[str, Any]:
    grid = shapes.grid
    rows = [_row(case, contenders[case.name], shapes) for case in cases]
    about = {
        "plan": cfg.model.plan,
        "grid": [grid.t, grid.h, grid.w],
        "tokens": grid.tokens,
        "heads": cfg.model.heads,
        "head_dim": shapes.head_dim,
        "dtype": str(shapes.dtype).removeprefix("torch."),
        "clips": shapes.clips,
        "batch": cfg.train.train_batch_size,
        "device": torch.cuda.get_device_name(shapes.device) if shapes.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }
    measured = [
        {"of": name, "impl": c.name, **(c.ms or {}), **({"failure": c.failure} if c.failure else {})}
        for name, group in impls.items()
        for c in group
    ]
    return {
        "about": about,
        "step": _step(step, rows, cfg.train.train_batch_size / shapes.clips, cfg.train.gradient_checkpointing),
        "rows": rows,
        "implementations": measured,
        "ladders": [_ladder_json(ladder) for ladder in ladders],
    }


def _row(case: Case, contenders: list[Contender], shapes: Shapes) -> dict[str, Any]:
    """A mixer, its share of the FLOPs of dense attention in its layout, and the milliseconds of its layer and its rivals'."""
    own, *others = contenders
    rivals = {rival.name: rival.ms for rival in others if rival.ms is not None}
    if case.use.keys.layout == "joint" and DENSE in rivals:
        rivals[JOINT] = rivals[DENSE]  # the same thing
    mixer = Mixer(case.use, shapes.head_dim, shapes.grid, shapes.registers)
    work = mixer.work(shapes.grid)
    return {
        "mixer": case.name,
        "layers": case.layers,
        "what": mixer_words(mixer, shapes.grid).partition(": ")[2],
        "density": work.executed / work.dense if work.dense else 0.0,
        **(own.ms or {"failure": own.failure or "not measured"}),
        "rivals": rivals,
    }


def _step(step: Contender, rows: list[dict[str, Any]], times: float, recompute: float) -> dict[str, Any]:
    """Milliseconds of the passes of one optimiser step and of its attention; what share of it the mixers save.

    A share is of the step as it would be with the rival in the mixer's place; each row is given its own under `saved`.
    """
    if step.ms is None or any("forward_ms" not in row for row in rows):
        return {"failure": step.failure or "not measured"}

    def a_step(row: dict[str, Any], ms: dict[str, float]) -> float:
        once = ms["forward_backward_ms"] + ms["forward_ms"] * recompute
        return times * len(row["layers"]) * once

    whole = times * step.ms["forward_backward_ms"]
    total: dict[str, float] = {}
    for row in rows:
        saved = {name: a_step(row, ms) - a_step(row, row) for name, ms in row["rivals"].items()}
        row["saved"] = {name: ms / (whole + ms) for name, ms in saved.items()}
        for name, ms in saved.items():
            total[name] = total.get(name, 0.0) + ms
    return {
        "ms": whole,
        "attention_ms": sum(a_step(row, row) for row in rows),
        "saved": {name: ms / (whole + ms) for name, ms in total.items()},
    }


def _ladder_json(ladder: Ladder) -> dict[str, Any]:
    found = {rival: ladder.crossover(rival) for rival in (DENSE, JOINT)}
    return {
        "mixer": ladder.name,
        "rungs": [{"grid": [g.t, g.h, g.w], "tokens": g.tokens, "forward_backward_ms": ms} for g, ms in ladder.rungs],
        "ended": ladder.ended,
        "slower until, faster from (tokens)": {
            rival: [None if grid is None else grid.tokens for grid in pair]
            for rival, pair in found.items()
            if pair is not None
        },
    }


def _in_words(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"\none layer, {result['about']['clips']} clips; of its rivals how many times as long they take (forward, with "
            "backward), and the share of a step that the mixer saves over its layers",
            _rows_words(result["rows"]),
            _step_words(result["step"], result["about"]),
            *_impl_words(result["implementations"]),
            *_crossover_words(result["ladders"]),
        ]
    )


def _rows_words(rows: list[dict[str, Any]]) -> str:
    lines: list[Sequence[str]] = [
        ("mixer", "layers", "FLOPs", "forward", "+ backward", DENSE, "saved", JOINT, "saved", "")
    ]
    for row in rows:
        count = str(len(row["layers"]))
        if "failure" in row:
            lines.append((row["mixer"], count, *"-" * 7, row["failure"]))
            continue
        rivals = [words for name in (DENSE, JOINT) for words in _rival_words(row, name)]
        lines.append((row["mixer"], count, percent(row["density"]), *_ms_words(row), *rivals, f"over {row['what']}"))
    return table(lines)


def _ms_words(row: dict[str, Any]) -> list[str]:
    return [f"{row[what]:.3g} ms" if what in row else "-" for what in ("forward_ms", "forward_backward_ms")]


def _rival_words(row: dict[str, Any], rival: str) -> tuple[str, str]:
    if (ms := row["rivals"].get(rival)) is None:
        return "-", "-"
    ratios = (ms[what] / max(row[what], 1e-6) for what in ("forward_ms", "forward_backward_ms"))
    return ", ".join(f"{ratio:.2f}x" for ratio in ratios), _signed(row["saved"][rival]) if "saved" in row else "-"


def _signed(share: float) -> str:
    return f"{share:.0%}" if abs(share) >= 0.0995 else f"{share:.1%}"


def _step_words(step: dict[str, Any], about: dict[str, Any]) -> str:
    if "failure" in step:
        return f"step        {step['failure']}"
    scaled = "" if about["clips"] == about["batch"] else f" (counted up from {about['clips']})"
    line = f"step        {step['ms']:.4g} ms forward and backward for {about['batch']} clips{scaled}, attention "
    saved = "".join(f"; saved against {name}: {_signed(share)}" for name, share in step["saved"].items())
    return line + percent(step["attention_ms"] / step["ms"]) + saved


def _impl_words(rows: list[dict[str, Any]]) -> list[str]:
    """A table of implementations where at least two can do the job."""
    able = [row["of"] for row in rows if "forward_ms" in row and row["impl"] != "auto"]
    shown = [row for row in rows if able.count(row["of"]) > 1]
    lines: list[Sequence[str]] = [("operation", "impl", "forward", "+ backward", "")]
    lines += [(row["of"], row["impl"], *_ms_words(row), row.get("failure", "")) for row in shown]
    return ["\nthe operation alone, as the mixer calls it", table(lines)] if shown else []


def _crossover_words(ladders: list[dict[str, Any]]) -> list[str]:
    lines = []
    for ladder in ladders:
        lengths = [rung["tokens"] for rung in ladder["rungs"]]
        if not lengths:
            lines.append(f"  {ladder['mixer']}: {ladder['ended'] or 'not measured'}")
        for rival, (slower, faster) in ladder["slower until, faster from (tokens)"].items():
            if faster is None:
                words = f"not faster than {rival} up to {slower} tokens"
            elif slower is None:
                words = f"faster than {rival} from {faster} tokens on, the shortest measured"
            else:
                words = f"slower than {rival} up to {slower} tokens, faster from {faster} on"
            lines.append(f"  {ladder['mixer']}: {words}")
    return ["\none clip of growing length, forward and backward", *lines] if lines else []


def _draw(ladders: Sequence[Ladder], own_tokens: int, path: Path) -> Path:
    """Milliseconds over tokens of a clip, a panel for each mixer; the run's own length is marked."""
    from matplotlib.figure import Figure

    shown = [ladder for ladder in ladders if ladder.rungs]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(1 + 4.4 * across, 0.6 + 3.6 * down), layout="constrained", dpi=110)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for axes, ladder in zip(panels, shown, strict=False):
        for name, style in ((ladder.name, "o-"), (DENSE, "s--"), (JOINT, "^:")):
            points = [(grid.tokens, ms[name]) for grid, ms in ladder.rungs if name in ms]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
        axes.axvline(own_tokens, color="#999999", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=ladder.name, xlabel="tokens of a clip (line: this run)")
        axes.set_ylabel("ms, forward + backward, one clip")
        axes.legend(fontsize=8)
    figure.savefig(path, facecolor="white")
    return path

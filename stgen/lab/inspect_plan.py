"""The plan of a model: a table of what each layer attends and costs, and pictures of its masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from stgen import flops
from stgen.attention import plan as plan_grammar
from stgen.attention.attend import Heads, Mixer
from stgen.attention.pattern import Remade
from stgen.attention.spec import NoSink
from stgen.describe import pattern_words, section_words
from stgen.flops import readable
from stgen.lab import pictures
from stgen.lab.inspect_masks import Chosen, Drawing, draw, mixers_of, runs_of
from stgen.lab.tables import percent, table
from stgen.mixers.sequences import SequenceMixer
from stgen.model import VideoTransformer
from stgen.ops.cost import Work
from stgen.tokens import Grid


@dataclass
class Row:
    """Heads of a mixer, and all layers in which they do the same at the same cost."""

    term: str
    mixer: Mixer
    heads: Heads
    work: Work
    density: tuple[float, float]
    drawing: Drawing
    layers: list[int]


def describe_plan(
    transformer: VideoTransformer, grid: Grid, text_tokens: int, out: Path, examples: dict[int, Chosen] | None = None
) -> list[Path]:
    """Print the plan as a table and draw its masks; returns the pictures."""
    rows, notes = _rows(transformer, grid, examples or {})
    sizes = transformer.config
    print(
        f"transformer {readable(flops.trainable({'': transformer}))} parameters, width {sizes.width}, {sizes.depth} "
        f'layers, {sizes.heads} heads, plan "{sizes.plan}"'
    )
    registers = f", and {sizes.registers} registers in every sequence" if sizes.registers else ""
    print(f"tokens      {grid.tokens} a clip ({grid}: frames x rows x columns){registers}\n")
    print(_plan_words(rows, notes, transformer, grid, text_tokens))
    drawn = [
        pictures.PlanRow(f"{layers_words(row.layers)}: {row.term}", _row_words(row, grid), row.drawing) for row in rows
    ]
    title = f'plan "{sizes.plan}", {sizes.depth} layers, {grid.tokens} tokens ({grid}){registers}'
    return pictures.plan(out, title, drawn, notes)


def _rows(transformer: VideoTransformer, grid: Grid, examples: dict[int, Chosen]) -> tuple[list[Row], list[str]]:
    """Rows of the table and the picture, alike ones together, and notes on layers that have none."""
    rows: dict[tuple, Row] = {}
    notes: dict[str, list[int]] = {}
    terms = plan_grammar.parse(transformer.config.plan, transformer.config.depth)
    for number, mixer in enumerate(
        tqdm(mixers_of(transformer), desc="building masks", unit="mixer", delay=2, leave=False)
    ):
        layer, use = mixer.use.layer, mixer.use
        if use.takes == "output":
            notes.setdefault(
                f"{use.name} takes the output of layer {use.source_layer} and computes nothing", []
            ).append(layer)
        for heads in runs_of(mixer):
            own = slice(heads.group.first, heads.group.first + heads.group.count)
            chosen = examples.get(number)
            drawing = draw(heads, grid, None if chosen is None else (chosen[0][:, :, own], chosen[1][:, :, own]))
            key = (
                str(terms[layer]),
                use.name,
                use.takes,
                use.source,
                use.lends,
                use.shift,
                own.start,
                own.stop,
                _bytes(drawing),
            )
            if key not in rows:
                density = heads.density(grid)
                rows[key] = Row(str(terms[layer]), mixer, heads, heads.work(grid), density, drawing, [])
            rows[key].layers.append(layer)
    for layer, block in enumerate(transformer.blocks):
        for branch in (module for module in block.modules() if isinstance(module, SequenceMixer)):
            notes.setdefault(f"{branch.words(grid)}, without a map", []).append(layer)
    return list(rows.values()), [f"{layers_words(layers)}: {note}" for note, layers in notes.items()]


def _bytes(drawing: Drawing) -> tuple[bytes, ...]:
    """What tells two drawings apart."""
    return (drawing.plane.numpy().tobytes(), *(view.seen.numpy().tobytes() for view in drawing.views))


def layers_words(layers: Sequence[int]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))


def _row_words(row: Row, grid: Grid) -> str:
    """What stands below the title of a picture's row."""
    sequences, length = row.heads.layout.sequence(grid)
    pairs, blocks = row.density
    words = [
        f"mixer {row.mixer.use.name}{_heads_words(row.heads)}",
        f"{sequences} sequence{'s' * (sequences > 1)} of {length}",
    ]
    own = isinstance(row.heads.group.pattern, Remade)
    words += [
        *_kinds(row.heads),
        "keys of its own" if own else f"{percent(pairs)} of pairs, {percent(blocks)} of blocks",
    ]
    return "   ·   ".join(words)


def _heads_words(heads: Heads) -> str:
    group = heads.group
    last = group.first + group.count - 1
    if group.count == heads.use.heads:
        return f", all its heads ({group.count})"
    return f", head {last}" if group.count == 1 else f", heads {group.first}-{last}"


def _kinds(heads: Heads) -> list[str]:
    """Pattern, normaliser, sink and reuse of some heads, with the settings that make them."""
    group, use = heads.group, heads.use
    words = [pattern_words(group.pattern), section_words(group.normaliser)]
    words += [f"sink {section_words(group.sink)}"] if not isinstance(group.sink, NoSink) else []
    words += [f"window {list(use.keys.size)}, shift {list(use.shift)}"] if use.keys.size else []
    words += [f"takes its {use.takes} from layer {use.source_layer}"] if use.source is not None else []
    words += [f"lends {', '.join(sorted(use.lends))} to later layers"] if use.lends else []
    return words


def _plan_words(
    rows: Sequence[Row], notes: Sequence[str], transformer: VideoTransformer, grid: Grid, text_tokens: int
) -> str:
    """The plan as a table, with sums over the layers."""
    header = ("layers", "mixer", "heads", "sequences", "pattern and the rest", "pairs", "blocks", "FLOPs", "if dense")
    lines: list[Sequence[str]] = [header]
    for row in rows:
        sequences, length = row.heads.layout.sequence(grid)
        group = row.heads.group
        lines.append(
            (
                ", ".join(map(str, row.layers)),
                row.mixer.use.name,
                f"{group.first}-{group.first + group.count - 1}" if group.count > 1 else str(group.first),
                f"{sequences} x {length}",
                ", ".join(_kinds(row.heads)),
                *("-" if isinstance(group.pattern, Remade) else percent(share) for share in row.density),
                readable(row.work.executed),
                readable(row.work.dense),
            )
        )
    attention = sum((row.work * len(row.layers) for row in rows), Work())
    whole = transformer.work(grid, text_tokens)
    remarks = [
        f"{row.mixer.use.name}, {layers_words(row.layers)}: {row.drawing.note}" for row in rows if row.drawing.note
    ]
    return "\n".join(
        [
            table(lines),
            *notes,
            *dict.fromkeys(remarks),
            "FLOPs are those of the maps and what they weigh, a layer, forward, one clip; projections and MLPs come on top:",
            f"maps        {_work_words(attention)}",
            f"model       {_work_words(whole)}",
        ]
    )


def _work_words(work: Work) -> str:
    ratio = work.executed / work.dense if work.dense else 1.0
    return f"{readable(work.executed, 'FLOP')} executed, {readable(work.dense, 'FLOP')} if dense: {percent(ratio)}"

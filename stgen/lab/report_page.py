"""A page of words, tables and pictures, written twice: as Markdown beside its pictures, and as one HTML file of its own.

Text may mark **strong** words and `code`; everything else is taken as it is.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: #1a1a1a; font: 17px/1.55 Charter, "Bitstream Charter", "Sitka Text", Cambria,
  Georgia, serif; text-rendering: optimizeLegibility }
main { max-width: 74rem; margin: 0 auto; padding: 3rem 1.5rem 5rem }
h1, h2, p, ul, details { max-width: 46rem }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -.01em; margin: 0 0 .6rem }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 2.8rem 0 .5rem; padding-top: .9rem; border-top: 1px solid #ddd }
p { margin: .65rem 0 }
ul { margin: .5rem 0; padding-left: 1.2rem }
li { margin: .3rem 0 }
code { font: .86em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: #f3f3f1;
  padding: .08em .28em; border-radius: 3px; overflow-wrap: anywhere }
pre { font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: #f7f7f5;
  padding: .9rem 1.1rem; overflow-x: auto; border-radius: 4px }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font: .86rem/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums lining-nums }
th { text-align: left; font-weight: 600; vertical-align: bottom; border-bottom: 1.5px solid #1a1a1a; padding: .3rem .8rem }
td { vertical-align: top; border-bottom: 1px solid #e6e6e3; padding: .34rem .8rem }
th.n, td.n { text-align: right; white-space: nowrap }
td:first-child, th:first-child { padding-left: 0 }
figure { margin: 1.2rem 0 1.6rem }
figure img { max-width: 100%; height: auto; display: block }
figcaption { max-width: 46rem; font-size: .88rem; color: #4a4a4a; margin-top: .45rem }
summary { cursor: pointer; color: #4a4a4a }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Columns whose entries are numbers stand to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_number(self, column: int) -> bool:
        entries = [row[column] for row in self.rows if row[column] != "–"]
        return bool(entries) and all(re.match(r"[−+-]?[\d.]", entry) for entry in entries)


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


@dataclass(frozen=True)
class Verbatim:
    """A text to be unfolded."""

    title: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture | Verbatim


def markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The page for `folder`, in which its pictures lie."""
    return "\n\n".join([f"# {_md(title)}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page with its pictures inside; it needs nothing else, no script and no network."""
    body = "\n".join(_html(block) for block in blocks)
    name = html.escape(re.sub(r"[*`]", "", title))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{name}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_inline(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------ Markdown


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"## {_md(text)}"
        case Paragraph(text):
            return _md(text)
        case Bullets(lines):
            return "\n".join(f"- {_md(line)}" for line in lines)
        case Table(header, rows):
            rule = ["---:" if block.is_number(i) else "---" for i in range(len(header))]
            lines = [header, rule, *rows]
            return "\n".join("| " + " | ".join(_cell(entry) for entry in line) + " |" for line in lines)
        case Picture(path, caption):
            return f"![{_alt(caption)}]({path.relative_to(folder).as_posix()})\n\n{_md(caption)}"
        case Verbatim(title, text):
            fence = "```" if "```" not in text else "~~~~"
            return (
                f"<details><summary>{html.escape(title)}</summary>\n\n{fence}\n{text.rstrip()}\n{fence}\n\n</details>"
            )


def _md(text: str) -> str:
    """Signs of HTML outside of code would be taken for it."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _cell(text: str) -> str:
    return _md(text.replace("|", "\\|").replace("\n", " "))


def _alt(caption: str) -> str:
    return re.sub(r"[\[\]`*]", "", caption.split(". ")[0].rstrip("."))


# ---------------------------------------------------------------------------------------------------------------- HTML


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(lines):
            return "<ul>\n" + "\n".join(f"<li>{_inline(line)}</li>" for line in lines) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            kind = {".png": "image/png", ".gif": "image/gif"}[path.suffix]
            alt = html.escape(_alt(caption), quote=True)
            image = f'<img src="data:{kind};base64,{data}" alt="{alt}">'
            return f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Verbatim(title, text):
            return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text.rstrip())}</pre></details>"


def _html_table(table: Table) -> str:
    kinds = [' class="n"' if table.is_number(i) else "" for i in range(len(table.header))]
    head = "".join(f"<th{kind}>{_inline(text)}</th>" for kind, text in zip(kinds, table.header, strict=True))
    rows = [
        "<tr>" + "".join(f"<td{kind}>{_inline(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in table.rows
    ]
    body = "\n".join(rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    parts = re.split(r"`([^`]*)`", text)
    marked = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part) for part in parts[::2]]
    code = [f"<code>{part}</code>" for part in parts[1::2]]
    return "".join(piece for pair in zip(marked, [*code, ""], strict=True) for piece in pair)

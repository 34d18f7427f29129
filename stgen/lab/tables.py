"""Tables and shares in words."""

from collections.abc import Sequence


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2g}%"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned to their widest entry; numbers, which begin with a digit, to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def cell(text: str, i: int) -> str:
        return (
            text.rjust(widths[i]) if all(line[i][:1] in "0123456789-–" for line in lines[1:]) else text.ljust(widths[i])
        )

    return "\n".join("  " + "  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in lines)

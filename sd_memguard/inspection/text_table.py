"""Text for a terminal or a file: aligned tables, and foreign words that cannot break them."""

import unicodedata
from collections.abc import Sequence

DOTS = "..."
NUM_LETTERS_READ = 4000
"""A caption may be a megabyte; no line shows more than its beginning."""


def one_line(text: str, width: int, keep: str = "start") -> str:
    """Return a foreign text as one harmless line: no line breaks, control or invisible characters, and not too long.

    Args:
        text: anything; white space of any kind becomes one space, other characters that print nothing become escapes.
        width: columns of a terminal it may take.
        keep: ``start`` or ``end``, the part that is kept where it is too long.
    """
    part = text[:NUM_LETTERS_READ] if keep == "start" else text[-NUM_LETTERS_READ:]
    words = "".join(letter if letter.isprintable() or letter.isspace() else _escaped(letter) for letter in part).split()
    line = " ".join(words)
    if len(part) == len(text) and display_width(line) <= width:
        return line
    letters = line if keep == "start" else line[::-1]
    room, kept = width - len(DOTS), ""
    for letter in letters:
        room -= display_width(letter)
        if room < 0:
            break
        kept += letter
    return kept.rstrip() + DOTS if keep == "start" else DOTS + kept[::-1].lstrip()


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: East Asian letters two, combining marks none."""
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else int(unicodedata.combining(letter) == 0)
        for letter in text
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """Return the lines of a table whose columns are as wide as they need.

    Args:
        header: names of the columns.
        rows: cells, one for each column.
        left: the columns that are aligned to the left; the others, numbers, to the right.
    """
    widths = [max(map(display_width, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = []
        for name, cell, width in zip(header, row, widths, strict=True):
            space = " " * (width - display_width(cell))
            cells.append(cell + space if name in left else space + cell)
        lines.append("  ".join(cells).rstrip())
    return lines


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")

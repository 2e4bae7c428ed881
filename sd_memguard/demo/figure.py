"""One image that puts what two models generate beside the original images, replicas framed in red."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from sd_memguard.figures import INK, LINE, MUTED, Canvas, wrapped


class Column(NamedTuple):
    """A prompt with its images from top to bottom: the original, then one of each model; and which are framed."""

    prompt: str
    images: Sequence[Image.Image]
    framed: Sequence[bool]


class Block(NamedTuple):
    """Prompts of one kind: a heading, a remark on it, what the first row shows, and a column for each prompt."""

    heading: str
    remark: str
    original: str
    columns: Sequence[Column]


class Table(NamedTuple):
    """Figures of the models: a heading for each column, and a name with as many texts for each model."""

    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


COPY = "#d1242f"
WIDTH, MARGIN = 1280, 40
MAX_HEIGHT = 8000
LABELS = 184
"""Width of the names of the rows."""
IMAGE, GAP, FRAME = 112, 16, 4
PROMPT_LINES, PROMPT_SIZE, PROMPT_WIDTH = 4, 12, IMAGE + GAP - 6


def comparison_image(title: str, subtitle: str, table: Table, blocks: Sequence[Block], note: str) -> Image.Image:
    """Return the image: title, the figures, the blocks below each other, and a note on how to read it.

    Args:
        title: one line.
        subtitle: wrapped below it.
        table: its rows also name the rows of the blocks below the first one.
        blocks: each of at most eight prompts.
        note: wrapped at the bottom.

    Returns:
        An RGB image 1280 pixels wide; its height follows from the number of blocks and the length of the texts.
    """
    page = _Page()
    page.paragraph(title, 30, INK)
    page.paragraph(subtitle, 17, MUTED)
    page.move(14)
    page.table(table)
    for block in blocks:
        page.move(30)
        page.block(block, [name for name, _ in table.rows])
    page.move(14)
    page.paragraph(note, 14, MUTED)
    return page.finish()


class _Page(Canvas):
    """Writes from top to bottom on a page that is cut to its height at the end."""

    def __init__(self) -> None:
        super().__init__(WIDTH, MAX_HEIGHT)
        self.y = MARGIN

    def finish(self) -> Image.Image:
        return self.cut(self.y + MARGIN)

    def move(self, pixels: int) -> None:
        self.y += pixels

    def paragraph(self, text: str, size: int, color: str) -> None:
        self.y = self.write_lines(MARGIN, self.y, wrapped(text, size, WIDTH - 2 * MARGIN), size, color)

    def line(self) -> None:
        self.draw.line((MARGIN, self.y, WIDTH - MARGIN, self.y), fill=LINE)
        self.y += 10

    def table(self, table: Table) -> None:
        step = (WIDTH - 2 * MARGIN - LABELS) // len(table.headings)
        lefts = [MARGIN + LABELS + index * step for index in range(len(table.headings))]
        below = [
            self.write_lines(x, self.y, wrapped(heading, 14, step - GAP), 14, MUTED)
            for x, heading in zip(lefts, table.headings, strict=True)
        ]
        self.y = max(below) + 8
        for name, cells in table.rows:
            self.line()
            self.write(MARGIN, self.y + 4, name, 17)
            for x, cell in zip(lefts, cells, strict=True):
                self.write(x, self.y, cell, 22)
            self.y += 36
        self.line()

    def block(self, block: Block, models: Sequence[str]) -> None:
        self.paragraph(block.heading, 20, INK)
        self.paragraph(block.remark, 15, MUTED)
        self.y += 8
        top = self.y
        for name in (block.original, *models):
            lines = wrapped(name, 16, LABELS - GAP)
            self.write_lines(MARGIN, self.y + IMAGE // 2 - 12 * len(lines), lines, 16)
            self.y += IMAGE + GAP
        for index, column in enumerate(block.columns):
            x = MARGIN + LABELS + index * (IMAGE + GAP)
            for row, (image, framed) in enumerate(zip(column.images, column.framed, strict=True)):
                shown = image.convert("RGB").resize((IMAGE, IMAGE), Image.Resampling.LANCZOS)
                self.place(x, top + row * (IMAGE + GAP), shown, *((FRAME, COPY) if framed else ()))
            lines = wrapped(column.prompt, PROMPT_SIZE, PROMPT_WIDTH, PROMPT_LINES)
            self.write_lines(x, self.y - 6, lines, PROMPT_SIZE, MUTED)
        self.y += 17 * PROMPT_LINES

"""One image that puts what two models generate beside the original images, replicas framed in red."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


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


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAGE, LINE, INK, MUTED, COPY = "#ffffff", "#d9d9de", "#1f2328", "#656d76", "#d1242f"
WIDTH, MARGIN = 1280, 40
LABELS = 184
"""Width of the names of the rows."""
IMAGE, GAP, FRAME = 112, 16, 4
PROMPT_HEIGHT, PROMPT_WIDTH = 66, IMAGE + GAP - 6


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
    page.paragraph(title, 34, INK)
    page.paragraph(subtitle, 19, MUTED)
    page.move(14)
    page.table(table)
    for block in blocks:
        page.move(30)
        page.block(block, [name for name, _ in table.rows])
    page.move(14)
    page.paragraph(note, 16, MUTED)
    return page.finish()


class _Page:
    """Writes from top to bottom on a page that is cut to its height at the end, in the font that comes with Pillow."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 8000), PAGE)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def finish(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, self.y + MARGIN))

    def move(self, pixels: int) -> None:
        self.y += pixels

    def paragraph(self, text: str, size: int, color: str) -> None:
        for line in _wrapped(text, ImageFont.load_default(size), WIDTH - 2 * MARGIN):
            self.text(MARGIN, self.y, line, size, color)
            self.y += round(size * 1.45)

    def text(self, x: int, y: int, text: str, size: int, color: str) -> None:
        self.draw.text((x, y), _writable(text), fill=color, font=ImageFont.load_default(size))

    def line(self) -> None:
        self.draw.line((MARGIN, self.y, WIDTH - MARGIN, self.y), fill=LINE)
        self.y += 10

    def table(self, table: Table) -> None:
        step = (WIDTH - 2 * MARGIN - LABELS) // len(table.headings)
        lefts = [MARGIN + LABELS + index * step for index in range(len(table.headings))]
        lines = [_wrapped(heading, ImageFont.load_default(16), step - GAP) for heading in table.headings]
        for x, heading in zip(lefts, lines, strict=True):
            for number, text in enumerate(heading):
                self.text(x, self.y + 22 * number, text, 16, MUTED)
        self.y += 22 * max(map(len, lines)) + 8
        for name, cells in table.rows:
            self.line()
            self.text(MARGIN, self.y + 3, name, 18, INK)
            for x, cell in zip(lefts, cells, strict=True):
                self.text(x, self.y, cell, 24, INK)
            self.y += 36
        self.line()

    def block(self, block: Block, models: Sequence[str]) -> None:
        self.paragraph(block.heading, 22, INK)
        self.paragraph(block.remark, 16, MUTED)
        self.y += 8
        top = self.y
        for name in (block.original, *models):
            lines = _wrapped(name, ImageFont.load_default(18), LABELS - GAP)
            for number, line in enumerate(lines):
                self.text(MARGIN, self.y + IMAGE // 2 - 12 * len(lines) + 24 * number, line, 18, INK)
            self.y += IMAGE + GAP
        for index, column in enumerate(block.columns):
            x = MARGIN + LABELS + index * (IMAGE + GAP)
            for row, (image, framed) in enumerate(zip(column.images, column.framed, strict=True)):
                self._place(x, top + row * (IMAGE + GAP), image, framed=framed)
            self._prompt(x, self.y - 6, column.prompt)
        self.y += PROMPT_HEIGHT

    def _prompt(self, x: int, y: int, prompt: str) -> None:
        font = ImageFont.load_default(13)
        lines = _wrapped(prompt, font, PROMPT_WIDTH)
        room = PROMPT_HEIGHT // 17
        if len(lines) > room:
            lines = [*lines[: room - 1], lines[room - 1] + " ..."]
        for number, line in enumerate(lines):
            self.draw.text((x, y + 17 * number), _shortened(_writable(line), font, PROMPT_WIDTH), fill=MUTED, font=font)

    def _place(self, x: int, y: int, image: Image.Image, *, framed: bool) -> None:
        edge = FRAME if framed else 1
        frame = (x - edge, y - edge, x + IMAGE - 1 + edge, y + IMAGE - 1 + edge)
        self.draw.rectangle(frame, fill=COPY if framed else LINE)
        self.image.paste(image.convert("RGB").resize((IMAGE, IMAGE), Image.Resampling.LANCZOS), (x, y))


def _writable(text: str) -> str:
    """Return the text in the letters Pillow's own font has: accents dropped, what is left over as question marks."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letters).encode("ascii", "replace").decode()


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Return the text in lines that fit; a single word that does not is a line of its own."""
    lines = [""]
    for word in _writable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shortened(line: str, font: Font, width: int) -> str:
    """Return the line, cut and ended with dots where it does not fit."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."

"""One image that puts the generated images of two models beside the training images, copies framed in red."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


class GeneratedImage(NamedTuple):
    """A drawn image and what was measured on it.

    Attributes:
        image: The generated image.
        ratio: Distance to the nearest training image over the mean distance to the 50 nearest.
        is_copy: Whether that is a near copy.
        is_own: Whether the nearest training image is the one with the drawn caption.
    """

    image: Image.Image
    ratio: float
    is_copy: bool
    is_own: bool


class Row(NamedTuple):
    """A caption, its training image, and the generated image of each model."""

    caption: str
    training: Image.Image
    generated: Sequence[GeneratedImage]


class Block(NamedTuple):
    """Rows under one heading: what they have in common in a word or two, and a remark on it."""

    name: str
    remark: str
    rows: Sequence[Row]


class Arm(NamedTuple):
    """A model: its name, the share of near copies among its generated images in each block, and its held-out loss."""

    name: str
    copy_shares: Sequence[float]
    heldout_loss: float


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAGE = "#f8f7f4"
LINE = "#dfdcd5"
INK = "#23262b"
MUTED = "#6d7178"
COPY = "#c9372c"
BAR = "#e9e6df"

WIDTH = 1200
MARGIN = 44
GUTTER = 48
IMAGE = 128
GAP = 12
ROW_HEIGHT = IMAGE + 44
BAR_WIDTH = 210


def comparison_image(title: str, subtitle: str, blocks: Sequence[Block], arms: Sequence[Arm], note: str) -> Image.Image:
    """Return the image: title, a table of the arms, the blocks side by side, and a note on how to read it.

    Args:
        title: One line.
        subtitle: Wrapped below it.
        blocks: Two blocks; every row has one generated image per arm, in the order of the arms.
        arms: Two arms, the first being what the second is compared with.
        note: Wrapped at the bottom.

    Returns:
        An RGB image 1200 pixels wide; its height follows from the number of rows and the length of the texts.
    """
    canvas = _Canvas()
    y = canvas.paragraph(MARGIN, MARGIN - 8, title, 36, INK, WIDTH - 2 * MARGIN)
    y = canvas.paragraph(MARGIN, y + 6, subtitle, 19, MUTED, WIDTH - 2 * MARGIN)
    y = _draw_table(canvas, y + 24, blocks, arms)
    width = (WIDTH - 2 * MARGIN - GUTTER) // 2
    bottoms = [
        _draw_block(canvas, MARGIN + index * (width + GUTTER), y + 34, width, block, [arm.name for arm in arms])
        for index, block in enumerate(blocks)
    ]
    y = canvas.paragraph(MARGIN, max(bottoms) + 16, note, 17, MUTED, WIDTH - 2 * MARGIN)
    return canvas.finish(y + MARGIN - 12)


def _draw_table(canvas: "_Canvas", y: int, blocks: Sequence[Block], arms: Sequence[Arm]) -> int:
    """Draw the numbers of each arm, shares of copies with bars, and return where the table ends."""
    columns = [MARGIN + 196, MARGIN + 546, MARGIN + 896]
    for x, block in zip(columns, blocks, strict=False):
        canvas.text(x, y, f"Near copies, {block.name} captions", 17, MUTED)
    canvas.text(columns[-1], y, "Loss on held-out images", 17, MUTED)
    for arm in arms:
        canvas.line(y + 30, MARGIN, WIDTH - MARGIN)
        canvas.text(MARGIN, y + 43, arm.name, 22, INK)
        for x, share in zip(columns, arm.copy_shares, strict=False):
            canvas.text(x, y + 40, f"{share:.0%}", 28, COPY if share else INK)
            canvas.bar(x + 84, y + 52, share)
        canvas.text(columns[-1], y + 40, f"{arm.heldout_loss:.4f}", 28, INK)
        y += 50
    canvas.line(y + 30, MARGIN, WIDTH - MARGIN)
    return y + 30


def _draw_block(canvas: "_Canvas", x: int, y: int, width: int, block: Block, arm_names: Sequence[str]) -> int:
    """Draw the rows of a block below its headings, and return where they end."""
    lefts = [x + width - (len(arm_names) + 1 - column) * (IMAGE + GAP) + GAP for column in range(len(arm_names) + 1)]
    right = canvas.text(x, y, f"{block.name.capitalize()} captions", 24, INK)
    canvas.text(right + GAP, y + 6, block.remark, 17, MUTED)
    for left, heading in zip(lefts, ["Training image", *arm_names], strict=True):
        canvas.centered(left + IMAGE // 2, y + 42, heading, 17, MUTED, IMAGE + GAP)
    y += 74
    for row in block.rows:
        canvas.label(x, y, row.caption, 18, lefts[0] - x - GAP, IMAGE)
        canvas.place(lefts[0], y, row.training)
        for left, generated_image in zip(lefts[1:], row.generated, strict=True):
            canvas.place(left, y, generated_image.image, framed=generated_image.is_copy)
            colour = COPY if generated_image.is_copy else MUTED
            canvas.centered(left + IMAGE // 2, y + IMAGE + 7, _verdict(generated_image), 17, colour, IMAGE + GAP)
        y += ROW_HEIGHT
    return y


def _verdict(generated_image: GeneratedImage) -> str:
    if not generated_image.is_copy:
        return f"{generated_image.ratio:.2f}"
    return (
        f"{generated_image.ratio:.2f} copy" if generated_image.is_own else f"{generated_image.ratio:.2f} other's copy"
    )


class _Canvas:
    """Draws on a page that is cut to its height at the end, with the font that comes with Pillow."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 8000), PAGE)
        self.draw = ImageDraw.Draw(self.image)

    def finish(self, height: int) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, height))

    def text(self, x: int, y: int, text: str, size: int, colour: str) -> int:
        """Write one line and return where it ends."""
        font = ImageFont.load_default(size=size)
        self.draw.text((x, y), _writable(text), fill=colour, font=font)
        return x + round(font.getlength(_writable(text)))

    def centered(self, x: int, y: int, text: str, size: int, colour: str, width: int) -> None:
        font = ImageFont.load_default(size=size)
        self.draw.text((x, y), _shortened(_writable(text), font, width), fill=colour, font=font, anchor="ma")

    def paragraph(self, x: int, y: int, text: str, size: int, colour: str, width: int) -> int:
        lines = _wrapped(_writable(text), ImageFont.load_default(size=size), width)
        for number, line in enumerate(lines):
            self.text(x, y + number * round(size * 1.4), line, size, colour)
        return y + len(lines) * round(size * 1.4)

    def label(self, x: int, y: int, text: str, size: int, width: int, height: int) -> None:
        """Write at most as many lines as fit, in the middle of the height."""
        font, step = ImageFont.load_default(size=size), round(size * 1.3)
        lines = _wrapped(_writable(text), font, width)
        room = height // step
        if len(lines) > room:
            lines = [*lines[: room - 1], lines[room - 1] + "..."]
        top = y + (height - len(lines) * step) // 2
        for number, line in enumerate(lines):
            self.draw.text((x, top + number * step), _shortened(line, font, width), fill=INK, font=font)

    def line(self, y: int, left: int, right: int) -> None:
        self.draw.line((left, y, right, y), fill=LINE)

    def bar(self, x: int, y: int, share: float) -> None:
        """Draw a track, and on it the share, at least a sliver of it where there is any."""
        self.draw.rectangle((x, y, x + BAR_WIDTH, y + 9), fill=BAR)
        if share:
            self.draw.rectangle((x, y, x + max(2, round(BAR_WIDTH * share)), y + 9), fill=COPY)

    def place(self, x: int, y: int, image: Image.Image, framed: bool = False) -> None:
        edge = 4 if framed else 1
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
    for word in text.split():
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

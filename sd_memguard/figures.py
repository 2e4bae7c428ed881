"""Figures made of images and text, in matplotlib's font, which has Greek, Cyrillic and more; Pillow's own has not."""

from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

PAGE, INK, MUTED, LINE = "#ffffff", "#23262b", "#60656c", "#c9ccd1"
DOTS = "..."


class Canvas:
    """An image to write on and to place images on.

    Args:
        width: In pixels.
        height: In pixels; ``cut`` shortens it.
    """

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAGE)
        self.draw = ImageDraw.Draw(self.image)

    def write(
        self, x: int, y: int, text: str, size: int, color: str = INK, *, bold: bool = False, anchor: str = "la"
    ) -> None:
        """Write a line."""
        self.draw.text((x, y), text, fill=color, font=font(size, bold=bold), anchor=anchor)

    def write_lines(self, x: int, y: int, lines: list[str], size: int, color: str = INK, spacing: float = 1.45) -> int:
        """Write lines below each other, and return where the next one would begin."""
        for line in lines:
            self.write(x, y, line, size, color)
            y += round(size * spacing)
        return y

    def place(self, x: int, y: int, image: Image.Image, frame: int = 1, color: str = LINE) -> None:
        """Place an image with its upper left corner there, a frame around it."""
        box = (x - frame, y - frame, x + image.width - 1 + frame, y + image.height - 1 + frame)
        self.draw.rectangle(box, fill=color)
        self.image.paste(image, (x, y))

    def cut(self, height: int) -> Image.Image:
        """Return the upper part of the image."""
        return self.image.crop((0, 0, self.image.width, height))


def fitted(image: Image.Image, edge: int) -> Image.Image:
    """Return the image in RGB, as large as fits a square with its sides in proportion."""
    scale = edge / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font in a size in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def wrapped(text: str, size: int, width: int, max_lines: int | None = None) -> list[str]:
    """Return the text in lines that fit; the last one ends in dots where the text is longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if max_lines is not None and len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    return [shortened(line, size, width) for line in lines]


def shortened(line: str, size: int, width: int, keep: str = "start") -> str:
    """Return the line, cut where it does not fit; ``keep`` says whether its ``start`` or its ``end`` is kept."""
    measured = font(size)
    if measured.getlength(line) <= width:
        return line
    while line and measured.getlength(line + DOTS) > width:
        line = line[:-1] if keep == "start" else line[1:]
    return line.rstrip() + DOTS if keep == "start" else DOTS + line

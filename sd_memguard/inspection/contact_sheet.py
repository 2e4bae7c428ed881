"""One image of the most memory-prone images, with their captions and skip ratios."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from sd_memguard import assets
from sd_memguard.data.folder import FolderImages
from sd_memguard.data.image_check import ImageError, decode_image
from sd_memguard.errors import UserError
from sd_memguard.inspection.text_table import DOTS, one_line
from sd_memguard.runs.folder import RunFolder

PAGE, INK, MUTED, LINE, EMPTY = "#ffffff", "#23262b", "#60656c", "#c9ccd1", "#f1f1ef"
COLUMNS, IMAGE, GAP, MARGIN = 5, 216, 20, 36
TEXT_HEIGHT, LINE_HEIGHT, CAPTION_LINES = 82, 19, 2
HEADER, MAX_NOTE_LINES = 128, 3
WIDTH = 2 * MARGIN + COLUMNS * IMAGE + (COLUMNS - 1) * GAP

Load = Callable[[str], Image.Image]


def image_folder(run: RunFolder, given: str | None) -> Path | None:
    """Return where the training images are, None where the run does not say or they are gone.

    Args:
        run: says where it found them, in ``train_data_dir``.
        given: a folder that comes before.

    Raises:
        UserError: the given folder does not exist.
    """
    if given is not None:
        folder = assets.demo_data_path() if given == assets.BUNDLED else Path(given)
        if not folder.is_dir():
            raise UserError(f"`--train_data_dir` {given} is no folder; give the one that holds the images")
        return folder
    recorded = run.config.get("train_data_dir")
    if recorded is None or run.config.get("dataset_name") is not None:
        return None
    folder = assets.demo_data_path() if recorded == assets.BUNDLED else Path(recorded)
    return folder if folder.is_dir() else None


def image_loader(folder: Path) -> Load:
    """Return a function from a file below the folder to its image; it raises ImageError as the training does."""
    return lambda file: decode_image(FolderImages(folder, pa.array([file])).read(0))


def contact_sheet(rows: Sequence[dict[str, Any]], load: Load | None, note: Sequence[str]) -> Image.Image:
    """Return the images in rows of five, each with its rank, skip ratio, counts, file and caption.

    An image that cannot be read is an empty frame with its file's name and the reason.

    Args:
        rows: rows of ``samples.parquet``, the first image first.
        load: from a file to its image; None where the images are nowhere to be found.
        note: up to three lines under the title.
    """
    height = HEADER + -(-len(rows) // COLUMNS) * (IMAGE + TEXT_HEIGHT + GAP) + MARGIN - GAP
    sheet = Image.new("RGB", (WIDTH, height), PAGE)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 24), "Most memory-prone images", fill=INK, font=_font(24, bold=True))
    for number, line in enumerate(note[:MAX_NOTE_LINES]):
        draw.text(
            (MARGIN, 58 + number * 18),
            _shortened(one_line(line, 200), 13, WIDTH - 2 * MARGIN),
            fill=MUTED,
            font=_font(13),
        )
    for index, row in enumerate(rows):
        _paste_image(sheet, draw, image_box(index), row["file"], load)
        _write_caption(draw, image_box(index), index + 1, row)
    return sheet


def image_box(index: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the square in which an image stands."""
    left = MARGIN + index % COLUMNS * (IMAGE + GAP)
    top = HEADER + index // COLUMNS * (IMAGE + TEXT_HEIGHT + GAP)
    return left, top, left + IMAGE, top + IMAGE


def fitted(image: Image.Image) -> Image.Image:
    """Return the image, as large as fits the square with its sides in proportion."""
    scale = IMAGE / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _paste_image(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], file: str, load: Load | None
) -> None:
    left, top, right, bottom = box
    try:
        if load is None:
            raise ImageError("image not found")
        image = fitted(load(file))
    except ImageError as error:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=EMPTY, outline=LINE)
        room = IMAGE - 24
        name, reason = one_line(file, 100, keep="end"), one_line(str(error), 200)
        lines = [*_wrapped(name, 13, room, 3), "", *_wrapped(reason, 13, room, 5)]
        for number, line in enumerate(lines):
            draw.text((left + 12, top + 14 + number * LINE_HEIGHT), line, fill=MUTED, font=_font(13))
        return
    corner = (left + (IMAGE - image.width) // 2, top + (IMAGE - image.height) // 2)
    draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + image.width, corner[1] + image.height), outline=LINE)
    sheet.paste(image, corner)


def _write_caption(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], rank: int, row: dict[str, Any]) -> None:
    left, _, _, bottom = box
    unclean = round(row["skip_ratio"] * row["seen"])
    y = bottom + 7
    draw.text((left, y), f"{rank}.  {row['skip_ratio']:.0%}", fill=INK, font=_font(15, bold=True))
    counts = f"{unclean} of {row['seen']} times"
    draw.text((left + IMAGE, y + 2), counts, fill=MUTED, font=_font(12), anchor="ra")
    y += LINE_HEIGHT + 3
    for line in _wrapped(one_line(row["caption"], 200), 13, IMAGE, CAPTION_LINES):
        draw.text((left, y), line, fill=INK, font=_font(13))
        y += LINE_HEIGHT - 2
    shard = f", shard {row['shard']}"
    room = IMAGE - round(_font(11).getlength(shard))
    file = _shortened(one_line(row["file"], 60, keep="end"), 11, room, keep="end")
    draw.text((left, y + 1), file + shard, fill=MUTED, font=_font(11))


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, which has Greek, Cyrillic and more; Pillow's own has Latin letters alone."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _wrapped(text: str, size: int, width: int, max_lines: int) -> list[str]:
    """Return the text in lines that fit; the last one ends in dots where the text is longer."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    return [_shortened(line, size, width) for line in lines]


def _shortened(line: str, size: int, width: int, keep: str = "start") -> str:
    """Return the line, cut where it does not fit."""
    font = _font(size)
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + DOTS) > width:
        line = line[:-1] if keep == "start" else line[1:]
    return line.rstrip() + DOTS if keep == "start" else DOTS + line

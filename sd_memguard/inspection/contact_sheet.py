"""One image of the most memory-prone images, with their captions and skip ratios."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from sd_memguard import assets
from sd_memguard.data.folder import FolderImages
from sd_memguard.data.image_check import ImageError, decode_image
from sd_memguard.errors import UserError
from sd_memguard.figures import LINE, MUTED, Canvas, fitted, font, shortened, wrapped
from sd_memguard.inspection.text_table import one_line
from sd_memguard.runs.folder import RunFolder

EMPTY = "#f1f1ef"
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
    sheet = Canvas(WIDTH, height)
    sheet.write(MARGIN, 24, "Most memory-prone images", 24, bold=True)
    for number, line in enumerate(note[:MAX_NOTE_LINES]):
        text = shortened(one_line(line, 200), 13, WIDTH - 2 * MARGIN)
        sheet.write(MARGIN, 58 + number * 18, text, 13, MUTED)
    for index, row in enumerate(rows):
        _place_image(sheet, image_box(index), row["file"], load)
        _write_caption(sheet, image_box(index), index + 1, row)
    return sheet.image


def image_box(index: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the square in which an image stands."""
    left = MARGIN + index % COLUMNS * (IMAGE + GAP)
    top = HEADER + index // COLUMNS * (IMAGE + TEXT_HEIGHT + GAP)
    return left, top, left + IMAGE, top + IMAGE


def _place_image(sheet: Canvas, box: tuple[int, int, int, int], file: str, load: Load | None) -> None:
    left, top, right, bottom = box
    try:
        if load is None:
            raise ImageError("image not found")
        image = fitted(load(file), IMAGE)
    except ImageError as error:
        sheet.draw.rectangle((left, top, right - 1, bottom - 1), fill=EMPTY, outline=LINE)
        room = IMAGE - 24
        name, reason = one_line(file, 100, keep="end"), one_line(str(error), 200)
        sheet.write_lines(
            left + 12, top + 14, [*wrapped(name, 13, room, 3), "", *wrapped(reason, 13, room, 5)], 13, MUTED
        )
        return
    sheet.place(left + (IMAGE - image.width) // 2, top + (IMAGE - image.height) // 2, image)


def _write_caption(sheet: Canvas, box: tuple[int, int, int, int], rank: int, row: dict[str, Any]) -> None:
    left, _, _, bottom = box
    unclean = round(row["skip_ratio"] * row["seen"])
    y = bottom + 7
    sheet.write(left, y, f"{rank}.  {row['skip_ratio']:.0%}", 15, bold=True)
    sheet.write(left + IMAGE, y + 2, f"{unclean} of {row['seen']} times", 12, MUTED, anchor="ra")
    lines = wrapped(one_line(row["caption"], 200), 13, IMAGE, CAPTION_LINES)
    y = sheet.write_lines(left, y + LINE_HEIGHT + 3, lines, 13, spacing=1.3)
    shard = f", shard {row['shard']}"
    room = IMAGE - round(font(11).getlength(shard))
    file = shortened(one_line(row["file"], 60, keep="end"), 11, room, keep="end")
    sheet.write(left, y + 1, file + shard, 11, MUTED)

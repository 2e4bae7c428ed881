"""Reading a folder of captioned images, and turning images into rows to compare."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sd_memguard.audit import AuditError


class Images(NamedTuple):
    """Captioned images in the order of their metadata file: names, captions and pixels (N, size, size, 3) uint8."""

    files: list[str]
    captions: list[str]
    pixels: Tensor


def load_images(folder: Path, size: int, caption_column: str = "text") -> Images:
    """Return the images of an imagefolder with ``metadata.jsonl``, each cropped at its center to size x size.

    A row that names the image of an earlier row is an image of its own here, as it is in training.

    Args:
        folder: Holds ``metadata.jsonl`` with ``file_name`` and a caption in every row.
        size: Edge in pixels; images of that size are taken as they are, others are scaled first.
        caption_column: Key of the caption.

    Raises:
        AuditError: Where the metadata file is missing or empty, or a row lacks one of the two keys.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise AuditError(f"a folder of captioned images must hold a metadata.jsonl, {folder} has none; name another")
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise AuditError(f"{metadata} must name at least one image, it is empty; add images or name another folder")
    for number, row in enumerate(rows, start=1):
        for key in ("file_name", caption_column):
            if key not in row:
                raise AuditError(f"row {number} of {metadata} must have `{key}`, it has {sorted(row)}; add it")
    files = [row["file_name"] for row in rows]
    pixels = torch.stack([_load_pixels(folder / file, size) for file in files])
    return Images(files, [row[caption_column] for row in rows], pixels)


def _load_pixels(file: Path, size: int) -> Tensor:
    with Image.open(file) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return pil_to_tensor(fitted).permute(1, 2, 0)


def as_rows(pixels: Tensor) -> Tensor:
    """Return images (N, H, W, 3) uint8 as rows (N, H*W*3) float32 in 0..1, the space plain L2 is measured in."""
    return pixels.flatten(1).float() / 255


def as_image(pixels: Tensor) -> Image.Image:
    """Return one image (H, W, 3) uint8 as a PIL image."""
    return Image.fromarray(pixels.cpu().numpy())

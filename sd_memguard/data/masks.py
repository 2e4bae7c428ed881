"""Masks of images: which part of each is trained, and what makes a mask unusable.

A mask is a greyscale image beside its image, ``name-masklabel.png`` for ``name.jpg`` as OneTrainer writes them, or else
the alpha channel of the image, as with ``alpha_mask`` of kohya's sd-scripts and of ai-toolkit. White is trained, black
is not, grey is trained in part.
"""

import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import PIL.Image

from sd_memguard.data.image_check import ImageError, Images, decode_image, open_image, printable

SUFFIX = "-masklabel.png"


def mask_name(file: str) -> str:
    """Return what the mask of an image file is called."""
    return posixpath.splitext(file)[0] + SUFFIX


def without_masks(files: list[str]) -> tuple[list[str], list[str]]:
    """Return the images among files, and the masks of such images."""
    stems = {posixpath.splitext(file)[0] for file in files}
    masks = {file for file in files if file.endswith(SUFFIX) and file.removesuffix(SUFFIX) in stems}
    return [file for file in files if file not in masks], sorted(masks)


def read_mask(images: Images, row: int) -> PIL.Image.Image | None:
    """Return the mask of an image in 8 bits of grey, None where it has none or one that is white all over.

    Raises:
        ImageError: the mask cannot be read.
    """
    stored = images.read_mask(row)
    mask = _alpha(images.read(row)) if stored is None else _decoded(stored)
    return None if mask is None or mask.getextrema() == (255, 255) else mask


def _decoded(stored: Mapping[str, object]) -> PIL.Image.Image:
    try:
        return decode_image(stored).convert("L")
    except ImageError as error:
        raise ImageError(f"its mask {stored['path']}: {error}") from error


def _alpha(stored: Mapping[str, object]) -> PIL.Image.Image | None:
    image = open_image(stored)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    return image.convert("RGBA").getchannel("A")


def check_masks(
    images: Images, rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.bool_], dict[int, str]]:
    """Return which of the images have a mask, and what is wrong with some of these.

    Args:
        images: where the images are read from.
        rows: (N,) row numbers of good images.
        sizes: (N, 2) their widths and heights.

    Returns:
        (N,) whether a part of the image is masked, and the fault of each bad row.
    """

    def check(position: int) -> tuple[bool, str]:
        row, size = int(rows[position]), tuple(sizes[position].tolist())
        try:
            mask = read_mask(images, row)
        except (ImageError, OSError) as error:
            return False, printable(str(error))
        if mask is None:
            return False, ""
        if mask.size != size:
            found = f"{mask.width}x{mask.height}, the image {size[0]}x{size[1]}"
            return False, f"its mask has another size ({found}); make both the same"
        if not mask.getbbox():
            return False, "its mask is black, so nothing of it would be trained; paint white what counts, or remove it"
        return True, ""

    with ThreadPoolExecutor() as executor:
        found = list(executor.map(check, range(len(rows))))
    masked = np.array([is_masked for is_masked, _ in found], bool)
    return masked, {int(row): fault for row, (_, fault) in zip(rows, found, strict=True) if fault}

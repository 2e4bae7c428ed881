"""Whether one image copies a training image, in seconds once the training images are indexed.

>>> index = TrainingIndex("images", cache_dir="index")  # doctest: +SKIP
>>> index.nearest(image)[0].is_copy  # doctest: +SKIP
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from PIL import ImageOps

from sd_memguard.audit import AuditError
from sd_memguard.audit.collection import Collection, read_folder
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.features.extractors import Thumbnails, make_extractor
from sd_memguard.audit.metrics.background import Gallery, background_positions
from sd_memguard.audit.metrics.similarity import best_matches
from sd_memguard.audit.metrics.verified import CopyDistance, as_images, choose_distance
from sd_memguard.audit.models import default_device
from sd_memguard.core.verification import verify_pairs
from sd_memguard.flags import parse_settings
from sd_memguard.settings import POSITIVE_COUNT, check_settings, setting

NUM_BACKGROUND = 200
"""Training images that are registered with others, so that it is known how near different images of the set are."""


class Neighbor(NamedTuple):
    """A training image beside one image.

    Attributes:
        file: Relative to the folder.
        caption: Of the training image.
        similarity: By descriptor.
        distance: After registration; see ``core.verification``.
        is_copy: Whether the image is a copy of it.
    """

    file: str
    caption: str
    similarity: float
    distance: float
    is_copy: bool


class TrainingIndex:
    """The training images, ready to be compared with.

    Args:
        train_data_dir: Folder of the training images; captions are not needed.
        cache_dir: Keeps features, so that the next index of the same images is there at once.
        extractor: As ``--extractor``.
        extractor_weights: As ``--extractor_weights``.

    Raises:
        AuditError: The folder or the weights cannot be used.
    """

    def __init__(
        self,
        train_data_dir: str | Path,
        cache_dir: str | Path,
        *,
        extractor: str = "bundled",
        extractor_weights: str | None = None,
    ) -> None:
        train = read_folder(Path(train_data_dir), "--train_data_dir", needs_captions=False)
        self.device = default_device()
        self.extractor = make_extractor(extractor, extractor_weights, self.device)
        self.gallery = Gallery(train, self.extractor, Store(Path(cache_dir)), self.device, batch_size=16)

    @cached_property
    def copy_distance(self) -> CopyDistance:
        """The distance of a copy, from training images and the others of the set."""
        positions = background_positions(len(self.gallery.keys), seed=0)[:NUM_BACKGROUND]
        return choose_distance(self.gallery.verify_own(positions).distance, "training images, beside the others,")

    @torch.no_grad()
    def nearest(self, image: PIL.Image.Image, count: int = 5) -> list[Neighbor]:
        """Return the training images that are most like an image, the nearest after registration first.

        Args:
            image: In any mode and size.
            count: How many; fewer where the set is smaller.
        """
        train, gallery = self.gallery.train, self.gallery
        image = image.convert("RGB")
        prepared = torch.stack([self.extractor.prepare(one) for one in (image, ImageOps.mirror(image))])
        view, flipped = self.extractor.embed(prepared.to(self.device)).split(1)

        def best_view(query: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
            return torch.stack([one @ block.T for one in query.split(view.shape[1], dim=1)]).amax(0)

        found = best_matches(torch.cat([view, flipped], 1), gallery.features, min(count, len(gallery.keys)), best_view)
        positions = found.indices[0].cpu()
        sources = as_images(torch.stack([gallery.pixels_of(position) for position in positions.tolist()]))
        query = as_images(Thumbnails().prepare(image).flatten()[None]).expand_as(sources)
        distances = verify_pairs(query, sources).distance
        neighbors = [
            Neighbor(
                train.files[row], train.captions[row], similarity, distance, distance <= self.copy_distance.distance
            )
            for row, similarity, distance in zip(
                gallery.rows[positions].tolist(), found.scores[0].tolist(), distances.tolist(), strict=True
            )
        ]
        return sorted(neighbors, key=lambda one: (one.distance, -one.similarity))


@dataclass(frozen=True, kw_only=True)
class OneImageSettings:
    """The flags of ``sd-memguard audit --image``."""

    image: str = setting(None, "Images", "the image", fix="name an image file")
    train_data_dir: str = setting(None, "Images", "the training images", fix="name the folder of the training images")
    num_neighbors: int = setting(5, "Measuring", "training images that are named", POSITIVE_COUNT)
    extractor: str = setting("bundled", "Measuring", "bundled, sscd, sscd-paper, dinov2 or clip")
    extractor_weights: str | None = setting(None, "Measuring", "file, folder or hub name of its weights")
    output_dir: str = setting(
        None, "Output", "keeps the index, so that the next image takes seconds", fix="name a folder"
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)


def main(argv: Sequence[str]) -> int:
    """Print the nearest training images of one image, and return 1 where it is a copy of one, otherwise 0.

    Raises:
        UserError: A flag is out of range, or a file or folder cannot be used.
    """
    settings = parse_settings(
        OneImageSettings,
        argv,
        prog="sd-memguard audit",
        description="Find the training images that one image is most like, and say whether it is a copy. The exit "
        "status is 1 where it is.",
    )
    image = _open(Path(settings.image))
    index = TrainingIndex(
        settings.train_data_dir,
        Path(settings.output_dir) / "cache",
        extractor=settings.extractor,
        extractor_weights=settings.extractor_weights,
    )
    found = index.nearest(image, settings.num_neighbors)
    copies = [one for one in found if one.is_copy]
    print(
        f"{settings.image} is {f'a copy of {copies[0].file}' if copies else 'no verified copy'} (distance at most "
        f"{index.copy_distance.distance:.3f}, {index.copy_distance.rule})"
    )
    for one in found:
        mark = "copy" if one.is_copy else "    "
        print(f"  {mark}  distance {one.distance:.3f}  similarity {one.similarity:.3f}  {one.file}  {one.caption}")
    return int(bool(copies))


def _open(file: Path) -> PIL.Image.Image:
    try:
        content = file.read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError) as error:
        raise AuditError(f"`--image` {file} cannot be read: {error}; name an image") from error
    return Collection("", [file.name], [""], lambda _: content, False).image(0)

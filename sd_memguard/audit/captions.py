"""Which training captions to use as prompts, so that what comes out says something about copying."""

from collections import Counter
from typing import NamedTuple

from sd_memguard.audit.images import Images, as_rows
from sd_memguard.audit.metrics.similarity import COPY_THRESHOLD, NUM_NEIGHBORS, distance_ratio, distinct, nearest


class ChosenCaptions(NamedTuple):
    """Row numbers of training images, ascending: of duplicated images, and of images that are in the set once."""

    duplicated: list[int]
    unique: list[int]


def choose_captions(images: Images, count: int) -> ChosenCaptions:
    """Return the first rows whose image is in the set many times, and the first whose image is in it once.

    A duplicated image has one caption throughout. Images with a near-duplicate (a man and a woman, two clock faces) are
    not chosen: a generated image near one of those need not be a copy of it. The measure is that of near copies: the
    distance to the nearest *other* image is below ``COPY_THRESHOLD`` of the mean to the 50 nearest others.

    Args:
        images: The training set, at least three of them distinct.
        count: How many of each kind; fewer where the set has no more.
    """
    rows = as_rows(images.pixels)
    kinds = distinct(rows)
    neighbors = nearest(rows[kinds], rows[kinds], min(NUM_NEIGHBORS + 1, len(kinds)))
    alone = kinds[distance_ratio(neighbors.distances[:, 1:]) >= COPY_THRESHOLD].tolist()
    contents = [image.numpy().tobytes() for image in images.pixels]
    shown, captioned = Counter(contents), Counter(zip(contents, images.captions, strict=True))
    once = [row for row in alone if shown[contents[row]] == 1]
    often = [row for row in alone if captioned[contents[row], images.captions[row]] == shown[contents[row]] > 1]
    return ChosenCaptions(often[:count], once[:count])

"""Which training captions to draw, so that what comes out says something about copying."""

from collections import Counter
from typing import NamedTuple

from sd_memguard.audit.images import Pictures, as_rows
from sd_memguard.audit.metrics.similarity import COPY_THRESHOLD, NUM_NEIGHBORS, distance_ratio, distinct, nearest


class ChosenCaptions(NamedTuple):
    """Row numbers of training pictures, ascending: of repeated pictures, and of pictures that are in the set once."""

    repeated: list[int]
    single: list[int]


def choose_captions(pictures: Pictures, count: int) -> ChosenCaptions:
    """Return the first rows whose picture is in the set many times, and the first whose picture is in it once.

    A repeated picture has one caption throughout. Left out are pictures with a look-alike (a man and a woman, two
    clock faces): a drawing near one of those need not be a copy of it. Look-alike means what near copy means: the
    distance to the nearest *other* picture is below ``COPY_THRESHOLD`` of the mean to the 50 nearest others.

    Args:
        pictures: The training set, at least three of them distinct.
        count: How many of each kind; fewer where the set has no more.
    """
    rows = as_rows(pictures.pixels)
    kinds = distinct(rows)
    neighbors = nearest(rows[kinds], rows[kinds], min(NUM_NEIGHBORS + 1, len(kinds)))
    alone = kinds[distance_ratio(neighbors.distances[:, 1:]) >= COPY_THRESHOLD].tolist()
    contents = [picture.numpy().tobytes() for picture in pictures.pixels]
    shown, captioned = Counter(contents), Counter(zip(contents, pictures.captions, strict=True))
    once = [row for row in alone if shown[contents[row]] == 1]
    often = [row for row in alone if captioned[contents[row], pictures.captions[row]] == shown[contents[row]] > 1]
    return ChosenCaptions(often[:count], once[:count])

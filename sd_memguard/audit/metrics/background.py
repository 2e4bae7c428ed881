"""How alike images are that nobody copied, and the threshold above which likeness is called a copy."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor

from sd_memguard.audit import AuditError
from sd_memguard.audit.captions import ChosenCaptions
from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.cache import Store, digest
from sd_memguard.audit.features.extractors import SIZE, Extractor, Thumbnails, extract
from sd_memguard.audit.metrics.similarity import (
    NUM_NEIGHBORS,
    best_matches,
    cosine,
    distance_ratio,
    negative_distance,
    squared_distance_ratio,
)
from sd_memguard.audit.metrics.statistics import percentile
from sd_memguard.audit.metrics.verified import Verified, as_images, find_verified
from sd_memguard.core.duplicates import find_groups, make_thumbnail
from sd_memguard.core.seeding import permutation
from sd_memguard.core.verification import verify_pairs

BACKGROUND_SIZE = 10_000
"""Most images of a set whose nearest others make up its background; chosen by the seed where it has more."""


BACKGROUND_PERCENT = 99
"""The percentile of the background that the default threshold starts from."""

MARGIN = 1 / 3
"""How far from there to 1 the default threshold lies."""


class Matched(NamedTuple):
    """For each of Q images the similarity to the nearest training image, and that image's row in the set."""

    similarity: Tensor
    row: Tensor


class PixelRatios(NamedTuple):
    """For each of Q images Carlini's ratio, that of squared distances, and the distance itself to the nearest image."""

    l2: Tensor
    squared: Tensor
    nearest: Tensor


class Threshold(NamedTuple):
    """The similarity of a copy, the rule it comes from in words, and whether a flag gave it."""

    similarity: float
    rule: str
    source: str


class Gallery:
    """The distinct training images as rows to search, features and pixels.

    Args:
        train: The training images.
        extractor: Of the features.
        store: Where rows and results are kept.
        device: Where networks and searches run.
        batch_size: Images at a time.

    Raises:
        AuditError: Fewer than two distinct images.
    """

    def __init__(
        self, train: Collection, extractor: Extractor, store: Store, device: torch.device, batch_size: int
    ) -> None:
        self.train, self.extractor, self.store = train, extractor, store
        self.device, self.batch_size = device, batch_size
        if len(train.distinct) < 2:
            raise AuditError(
                f"at least 2 distinct training images are needed, {train.place} has {len(train.distinct)}; add some"
            )
        self.rows = torch.tensor(train.distinct)
        self.keys = [train.hashes[row] for row in train.distinct]
        self.key = digest(extractor.key, *self.keys)
        self.features = self.features_of(train, train.distinct)
        self.pixels = self.extract(Thumbnails(), train, train.distinct)

    def features_of(self, images: Collection, rows: Sequence[int]) -> list[Tensor]:
        """Return blocks of features of these rows."""
        return self.extract(self.extractor, images, rows)

    def extract(
        self, extractor: Extractor, images: Collection, rows: Sequence[int], *, flipped: bool = False
    ) -> list[Tensor]:
        """Return blocks of another extractor's rows, of the images or of their flipped copies."""
        keys = [f"{images.hashes[row]}{' flipped' if flipped else ''}" for row in rows]
        what = f"{extractor.name}: {images.place}"

        def load(number: int) -> PIL.Image.Image:
            image = images.image(rows[number])
            return ImageOps.mirror(image) if flipped else image

        return extract(extractor, keys, load, self.store, self.device, self.batch_size, what)

    def match(self, images: Collection) -> Matched:
        """Return the nearest training image of every image of another collection."""
        features = torch.cat(self.features_of(images, range(len(images))))
        return self._search(images.hashes, features, torch.full((len(images),), -1))

    def match_own(self, positions: Tensor) -> Matched:
        """Return the nearest *other* distinct training image of the distinct images at these positions."""
        features = take(self.features, positions)
        return self._search([self.keys[position] for position in positions], features, positions)

    def groups(self) -> list[int]:
        """Return of each distinct image the position of the first that it is a near-duplicate of: itself if of none."""
        pixels = torch.cat(self.pixels).view(-1, SIZE, SIZE, 3).numpy()
        groups: list[int] = find_groups(np.stack([make_thumbnail(PIL.Image.fromarray(one)) for one in pixels])).tolist()
        return groups

    def match_apart(self, positions: Tensor, groups: Sequence[int]) -> Tensor:
        """Return the similarity of the distinct images at these positions with the nearest of another group, (N,)."""
        labels = torch.tensor(groups)
        largest = max(Counter(groups).values())
        best = best_matches(
            take(self.features, positions).to(self.device),
            self.features,
            min(largest, len(labels) - 1),
            cosine,
            own=positions,
        )
        same = labels[best.indices.cpu()] == labels[positions][:, None]
        return best.scores.cpu().masked_fill(same, -torch.inf).amax(1)

    def _search(self, keys: Sequence[str], features: Tensor, own: Tensor) -> Matched:
        def compute(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            best = best_matches(features[part].to(self.device), self.features, 1, cosine, own=own[part])
            return torch.cat([best.scores.double(), best.indices.double()], 1).cpu()

        kind = "nearest" if bool((own < 0).all()) else "nearest other"
        found = self.store.rows(f"{kind} in {self.key}", keys, compute)
        return Matched(found[:, 0].float(), self.rows[found[:, 1].long()])

    def verify(self, images: Collection) -> Verified:
        """Return the training image that every image of another collection is nearest to after registration."""
        return self._verify(images, range(len(images)), torch.full((len(images),), -1))

    def verify_own(self, positions: Tensor) -> Verified:
        """Return the nearest *other* distinct training image of the distinct images at these positions."""
        return self._verify(self.train, self.rows[positions].tolist(), positions)

    def _verify(self, images: Collection, chosen: Sequence[int], own: Tensor) -> Verified:
        pixels = as_images(torch.cat(self.extract(Thumbnails(), images, chosen)))
        views = [torch.cat(self.extract(self.extractor, images, chosen, flipped=flipped)) for flipped in (False, True)]
        is_own = bool((own >= 0).any())

        def compute(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            found = find_verified(
                pixels[part],
                self.pixels,
                [view[part] for view in views],
                self.features,
                own=own[part] if is_own else None,
            )
            return torch.stack([one.double() for one in found], 1)

        kind = "verified other" if is_own else "verified"
        found = self.store.rows(f"{kind} in {self.key}", [images.hashes[row] for row in chosen], compute)
        distance, row, similarity, is_flipped = found.T
        return Verified(distance.float(), self.rows[row.long()], similarity.float(), is_flipped.bool())

    def distance_to(self, images: Collection, own: Collection, own_rows: Sequence[int]) -> Tensor:
        """Return the distance after registration of every image to one image of a collection each."""
        pixels, others = (as_images(one) for one in self._pixels_beside(images, own, own_rows))

        def compute(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            return verify_pairs(pixels[part], others[part]).distance[:, None]

        keys = [f"{key} {own.hashes[row]}" for key, row in zip(images.hashes, own_rows, strict=True)]
        return self.store.rows("verified with its own", keys, compute)[:, 0]

    def pixel_distance_to(self, images: Collection, own: Collection, own_rows: Sequence[int]) -> Tensor:
        """Return the distance in pixels, as in ``pixel_ratios``, of every image to one image of a collection each."""
        pixels, others = self._pixels_beside(images, own, own_rows)
        return (pixels.float() - others.float()).norm(dim=1)

    def _pixels_beside(self, images: Collection, own: Collection, own_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        pixels = torch.cat(self.extract(Thumbnails(), images, range(len(images))))
        return pixels, torch.cat(self.extract(Thumbnails(), own, own_rows))

    def pixels_of(self, position: int) -> Tensor:
        """Return the pixels of the distinct training image at a position, (64 * 64 * 3,) uint8."""
        size = len(self.pixels[0])
        return self.pixels[position // size][position % size]

    def first_rows(self, rows: Sequence[int]) -> list[int]:
        """Return the first row of the image of each row."""
        return self.rows[self._positions(rows)].tolist()

    def _positions(self, rows: Sequence[int]) -> Tensor:
        position = {self.train.hashes[row]: number for number, row in enumerate(self.train.distinct)}
        return torch.tensor([position[self.train.hashes[row]] for row in rows])

    def pixel_ratios(self, images: Collection) -> PixelRatios:
        """Return ratios and distance in pixels of every image of another collection."""
        pixels = torch.cat(self.extract(Thumbnails(), images, range(len(images))))
        count = min(NUM_NEIGHBORS, len(self.rows))

        def compute(rows: range) -> Tensor:
            query = pixels[rows.start : rows.stop].to(self.device).float()
            distances = -best_matches(query, self.pixels, count, negative_distance).scores.cpu().double()
            return torch.stack([distance_ratio(distances), squared_distance_ratio(distances), distances[:, 0]], 1)

        found = self.store.rows(f"pixel ratios and distance in {digest(*self.keys)}", images.hashes, compute)
        return PixelRatios(*found.float().T)

    def similarity_to(self, images: Collection, own: Collection, own_rows: Sequence[int]) -> Tensor:
        """Return the similarity of every image to one image of a collection each."""
        features = torch.cat(self.features_of(images, range(len(images))))
        return (features * torch.cat(self.features_of(own, own_rows))).sum(1)


def take(blocks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return rows of a matrix that lies in blocks, without bringing all of it to memory."""
    size = len(blocks[0])
    return torch.stack([blocks[row // size][row % size] for row in rows.tolist()])


def background_positions(count: int, seed: int) -> Tensor:
    """Return which of ``count`` images make up a background, ascending: all, or ``BACKGROUND_SIZE`` of them."""
    return permutation(seed, "background", length=count)[:BACKGROUND_SIZE].sort().values


def choose_threshold(train: Tensor, reference: Tensor | None) -> Threshold:
    """Return the similarity from which a generated image is a copy: a third of the way from a high background to 1.

    High means the 99th percentile of similarities without copying, which a few true duplicates in it do not move.
    At that value itself 1% of all held-out images would count as copies. A third of the way on leaves few of them, and
    is below copies that were compressed, scaled or slightly cropped; docs/audit.md has the figures behind the choice.

    Args:
        train: (N,) similarities of distinct training images to their nearest others.
        reference: (M,) similarities of images not trained on to their nearest training images, or None.
    """
    usual, of = (train, "training images") if reference is None else (reference, "images not trained on")
    high = percentile(usual, BACKGROUND_PERCENT).item()
    rule = f"a third of the way from {high:.3f}, below which {BACKGROUND_PERCENT}% of the {of} are, to 1"
    return Threshold(high + (1 - high) * MARGIN, rule, "background")


def choose_rows(candidates: ChosenCaptions, near_duplicates: set[int], count: int) -> ChosenCaptions:
    """Return rows whose captions are the prompts, ascending; as many of each kind, fewer where there are no more.

    Args:
        candidates: Rows of each kind in random order.
        near_duplicates: Rows to drop, because another image of the set is as similar as a copy.
        count: How many of each kind.
    """
    return ChosenCaptions(*(sorted([row for row in kind if row not in near_duplicates][:count]) for kind in candidates))


def candidates(train: Collection, groups: Sequence[int], seed: int) -> ChosenCaptions:
    """Return the first rows of all images whose captions could be prompts, each kind in random order.

    A caption must belong to one image alone, and the image to one caption, so that it is clear which image a
    generated image would be a copy of. Near-duplicates are one image.

    Args:
        train: The training images.
        groups: Of each distinct image, the position of the first one that it is a near-duplicate of.
        seed: Decides the order.
    """
    position = {train.hashes[row]: number for number, row in enumerate(train.distinct)}
    image_of = {content: groups[number] for content, number in position.items()}
    shown: Counter[int] = Counter()
    captions_of, images_of = defaultdict(set), defaultdict(set)
    for content, caption in zip(train.hashes, train.captions, strict=True):
        if not content:
            continue  # a row that is passed over
        image = image_of[content]
        shown[image] += 1
        captions_of[image].add(caption)
        images_of[caption].add(image)
    clear = {
        row: image
        for image, row in enumerate(train.distinct)
        if groups[image] == image
        and train.captions[row]
        and len(captions_of[image]) == len(images_of[train.captions[row]]) == 1
    }
    rows = list(clear)
    order = [rows[number] for number in permutation(seed, "captions", length=len(rows)).tolist()]
    return ChosenCaptions(
        [row for row in order if shown[clear[row]] > 1], [row for row in order if shown[clear[row]] == 1]
    )

"""Which pairs the report shows, and their images as small files inside the page."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from sd_memguard.audit.report import KINDS, Audit

PAIRS_PER_MODEL = 60
WORST_PER_MODEL = 3
"""Pairs on a model's card, on top of those in the list."""

EDGE = 192
"""Longest edge of an image in the page, in pixels."""

LOSSLESS_EDGE = 96
"""Up to this edge images are kept as they are: compression costs more than it saves there."""

IMAGE_BYTES = 5_500_000
"""What all images of a page may weigh as text, so that the page with everything else stays below 8 MB."""


class Thumbnail(NamedTuple):
    """An image in the page: its address is empty, and ``problem`` says why, where it cannot be shown."""

    file: str
    data_uri: str
    problem: str = ""


class Pair(NamedTuple):
    """A generated image beside its nearest training image; ``row`` is its row of pairs.parquet by column."""

    row: Mapping[str, Any]
    model_index: int
    generated_image: Thumbnail
    training: Thumbnail

    @property
    def is_replica(self) -> bool:
        """Whether the training image shown is the prompt's own, as the nearest by pixels."""
        return _is_replica(self.row)

    @property
    def is_own(self) -> bool | None:
        """Whether the nearest image is the prompt's own, or equals it; None where it has none."""
        own, nearest = self.row["own_similarity"], self.row["similarity"]
        if self.row["own_file"] is None:
            return None
        return (
            self.is_replica
            or self.row["own_file"] == self.row["nearest_file"]
            or (own is not None and own >= nearest - 1e-6)
        )


class Shown(NamedTuple):
    """The pairs in the page, worst first, and how many of each model's (by index) are shown of how many."""

    pairs: tuple[Pair, ...]
    counts: tuple[tuple[int, int], ...]


class Thumbnails:
    """Small images by path, each read once.

    Args:
        output_dir: What the files of generated images are relative to.
        train_data_dir: What the files of training images are relative to; None: they are not at hand.
    """

    def __init__(self, output_dir: Path, train_data_dir: Path | None) -> None:
        self.output_dir, self.train_data_dir = output_dir, train_data_dir
        self._made: dict[Path, Thumbnail] = {}

    def generated_image(self, file: str | None) -> Thumbnail:
        """Return a generated image."""
        return self._image(file, self.output_dir)

    def training(self, file: str | None) -> Thumbnail:
        """Return a training image."""
        return self._image(file, self.train_data_dir)

    def _image(self, file: str | None, folder: Path | None) -> Thumbnail:
        if not file:
            return Thumbnail("", "", "no file is named")
        if folder is None and not Path(file).is_absolute():
            return Thumbnail(file, "", "the folder of training images is not at hand")
        path = (folder or Path()) / file
        if path not in self._made:
            self._made[path] = _thumbnail(path, file)
        return self._made[path]


def _thumbnail(path: Path, file: str) -> Thumbnail:
    try:
        with Image.open(path) as image:
            small = _on_white(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        return Thumbnail(file, "", "the file is missing")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Thumbnail(file, "", "the file cannot be read as an image")
    lossless = max(small.size) <= LOSSLESS_EDGE
    small.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=lossless, quality=100 if lossless else 80, method=4)
    return Thumbnail(file, f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB; what is transparent turns white, as in print."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def choose_pairs(audit: Audit, thumbnails: Thumbnails) -> Shown:
    """Return the nearest pairs of every model, worst first.

    Of each model at most ``PAIRS_PER_MODEL``, split evenly over its kinds, so that duplicated prompts do not crowd the
    others out. Where the images would weigh more than ``IMAGE_BYTES``, the number is halved until they do not.
    """
    rows = audit.pairs.to_pylist()
    by_model = {model.name: [row for row in rows if row["model"] == model.name] for model in audit.report.models}
    limit = PAIRS_PER_MODEL
    while True:
        pairs = [
            Pair(row, index, thumbnails.generated_image(row["file"]), thumbnails.training(_shown_file(row)))
            for index, model in enumerate(audit.report.models)
            for row in _nearest_of_each_kind(by_model[model.name], limit)
        ]
        if limit == 1 or sum(map(_weight, pairs)) + sum(map(_weight, _on_cards(pairs, audit))) <= IMAGE_BYTES:
            break
        limit //= 2
    counts = tuple(
        (sum(pair.model_index == index for pair in pairs), len(by_model[model.name]))
        for index, model in enumerate(audit.report.models)
    )
    return Shown(tuple(sorted(pairs, key=lambda pair: _worst_first(pair.row))), counts)


def _nearest_of_each_kind(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Return at most ``limit`` rows, taken from the kinds in turn, each kind's worst first."""
    queues = [sorted((row for row in rows if row["kind"] == kind), key=_worst_first) for kind in KINDS]
    chosen: list[Mapping[str, Any]] = []
    for rank in range(limit):
        chosen += [queue[rank] for queue in queues if rank < len(queue)]
    return sorted(chosen[:limit], key=_worst_first)


def _worst_first(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort by similarity, then by what makes the order the same every time."""
    similarity = row["similarity"]
    return (2.0 if math.isnan(similarity) else -similarity, row["model"], row["kind"], row["file"])


def _is_replica(row: Mapping[str, Any]) -> bool:
    return bool(row["is_own_nearest"]) and row["kind"] != "heldout"


def _shown_file(row: Mapping[str, Any]) -> str | None:
    """Return the training image shown beside a generated one: a copy's source, its own, or the most similar."""
    file: str | None = row["own_file"] if _is_replica(row) and not row["is_copy"] else row["nearest_file"]
    return file


def _most_telling(pair: Pair) -> tuple[Any, ...]:
    row = pair.row
    return (not row["is_copy"], not pair.is_replica, row["l2_ratio"], *_worst_first(row))


def worst_of(pairs: Sequence[Pair], model_index: int) -> list[Pair]:
    """Return the most telling pairs of a model, no training image or caption twice where there are others."""
    own = sorted((pair for pair in pairs if pair.model_index == model_index), key=_most_telling)
    seen: set[str] = set()
    fresh: list[Pair] = []
    again: list[Pair] = []
    for pair in own:
        key = pair.row["caption"] or pair.row["nearest_file"] or pair.row["file"]
        (again if key in seen else fresh).append(pair)
        seen.add(key)
    return (fresh + again)[:WORST_PER_MODEL]


def _on_cards(pairs: Sequence[Pair], audit: Audit) -> Iterator[Pair]:
    for index in range(len(audit.report.models)):
        yield from worst_of(pairs, index)


def _weight(pair: Pair) -> int:
    return len(pair.generated_image.data_uri) + len(pair.training.data_uri)

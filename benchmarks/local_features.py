"""Measure local features beside registration: which changed photographs are found, at 1% of held-out photographs.

Changed copies of a folder's photographs are planted, one kind of change at a time, strong crops and parts that are
pasted into other photographs among them. Photographs that are kept out of the gallery are the background: what 1% of
them reach is what a copy must exceed.

- *registration* is what ``sd-memguard audit`` does: candidates by descriptor, compared at 64 x 64 pixels.
- *local features* is what ``sd-memguard audit --local_features`` adds, alone: SIFT's key points of each photograph,
  also flipped, and the number of matches that one homography explains.
- *ORB* is the same with another, cheaper kind of key points.

    pip install 'sd-memguard[local-features]'
    python -m benchmarks.local_features --train_data_dir PHOTOS
"""

import argparse
import io
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.verification import as_jpeg, recontrast, turn_hue
from sd_memguard.audit.features.extractors import Extractor, Thumbnails, make_extractor
from sd_memguard.audit.metrics.verified import as_images, choose_distance, find_verified
from sd_memguard.core.duplicates import find_groups, make_thumbnail
from sd_memguard.core.local_features import (
    MIN_MATCHES,
    NUM_CANDIDATES,
    NUM_POINTS,
    NUM_VOTERS,
    LocalFeatures,
    describe,
    find_shared,
    num_matches,
    opencv,
)

FALSE_POSITIVE_RATE = 0.01
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".rcc"}
MIN_EDGE = 256
"""Pixels of the longer edge; smaller images are not used."""

Photo = Image.Image


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder of photographs, all distinct")
    parser.add_argument("--num_background", type=int, default=150, help="photographs kept out of the gallery")
    parser.add_argument("--num_copies", type=int, default=30, help="planted copies of each kind")
    parser.add_argument("--side", type=int, default=384, help="longer edge of gallery and copies, in pixels")
    parser.add_argument("--methods", nargs="+", default=["registration", "local features"])
    parser.add_argument("--extractor", default="bundled", help="that proposes candidates to registration")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/local_features"), help="receives results.json")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def cut(image: Photo, area: float, rng: random.Random) -> Photo:
    """Return a part of this share of the area and the image's shape, anywhere in it."""
    width, height = (round(edge * area**0.5) for edge in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def enlarged(image: Photo, like: Photo) -> Photo:
    """Return the image at another one's longer edge, as an image of a generator would have it."""
    scale = max(like.size) / max(image.size)
    return image.resize([round(edge * scale) for edge in image.size], Image.Resampling.BICUBIC)


def pasted(part: Photo, onto: Photo, share: float, rng: random.Random) -> Photo:
    """Return another image with the part in it, at this share of its edges, anywhere."""
    size = round(onto.width * share), round(onto.height * share)
    part = ImageOps.contain(part, size, Image.Resampling.BICUBIC)
    onto = onto.copy()
    onto.paste(part, (rng.randint(0, onto.width - part.width), rng.randint(0, onto.height - part.height)))
    return onto


def rotated(image: Photo, low: float, high: float, rng: random.Random) -> Photo:
    """Return the image rotated by so many degrees to either side, white beyond its edges."""
    degrees = rng.choice((-1, 1)) * rng.uniform(low, high)
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))


def several(image: Photo, rng: random.Random) -> Photo:
    """Return a flipped half of the image with its hue turned, compressed."""
    part = ImageOps.mirror(enlarged(cut(image, 0.5, rng), image))
    return as_jpeg(turn_hue(part, rng.uniform(-15, 15)), 60)


Change = Callable[[Photo, Photo, random.Random], Photo]
CHANGES: dict[str, Change] = {
    "JPEG 40": lambda image, _, rng: as_jpeg(image, 40),
    "half the size": lambda image, _, rng: ImageOps.scale(image, 0.5, Image.Resampling.BICUBIC),
    "flip": lambda image, _, rng: ImageOps.mirror(image),
    "hue by 10 to 30 degrees": lambda image, _, rng: turn_hue(image, rng.choice((-1, 1)) * rng.uniform(10, 30)),
    "brightness and contrast": lambda image, _, rng: recontrast(image, rng),
    "rotation by 2 to 6 degrees": lambda image, _, rng: rotated(image, 2, 6, rng),
    "rotation by 10 to 30 degrees": lambda image, _, rng: rotated(image, 10, 30, rng),
    "80% of the area": lambda image, _, rng: enlarged(cut(image, 0.8, rng), image),
    "50% of the area": lambda image, _, rng: enlarged(cut(image, 0.5, rng), image),
    "25% of the area": lambda image, _, rng: enlarged(cut(image, 0.25, rng), image),
    "10% of the area": lambda image, _, rng: enlarged(cut(image, 0.1, rng), image),
    "50% of the area, flip, hue, JPEG 60": lambda image, _, rng: several(image, rng),
    "pasted at half the edge into another": lambda image, other, rng: pasted(image, other, 0.5, rng),
    "pasted at 3/10 of the edge": lambda image, other, rng: pasted(image, other, 0.3, rng),
    "25% of the area pasted at half the edge": lambda image, other, rng: pasted(cut(image, 0.25, rng), other, 0.5, rng),
}


def read_photos(folder: Path, side: int) -> list[Photo]:
    """Return the distinct photographs of a folder on white, shrunk to this longer edge."""
    photos = []
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES):
        for content in _contents(file):
            with Image.open(io.BytesIO(content)) as image:
                if max(image.size) < MIN_EDGE:
                    continue
                image.draft("RGB", (side, side))
                image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
                colored = image.convert("RGBA")
            photos.append(Image.alpha_composite(Image.new("RGBA", colored.size, "white"), colored).convert("RGB"))
    groups = find_groups(np.stack([make_thumbnail(photo) for photo in photos]), flip=True)
    return [photos[row] for row in np.unique(groups).tolist()]


def _contents(file: Path) -> list[bytes]:
    """Return the images of a file: itself, or the WebP files in a container of Qt's, which are in it as they are."""
    content = file.read_bytes()
    if file.suffix != ".rcc":
        return [content]
    found = (match.start() for match in re.finditer(rb"RIFF....WEBPVP8", content, re.DOTALL))
    return [content[start : start + 8 + int.from_bytes(content[start + 4 : start + 8], "little")] for start in found]


class Registration:
    """The audit's verification: 0 is the same image, so that the score is the negative distance."""

    def __init__(self, gallery: Sequence[Photo], extractor: Extractor) -> None:
        self.extractor = extractor
        self.gallery = self._pixels(gallery)
        self.features = self._features(gallery)

    def best(self, queries: Sequence[Photo]) -> list[tuple[float, int]]:
        """Return for each image the best score and the photograph that it belongs to."""
        views = [self._features(queries), self._features([ImageOps.mirror(image) for image in queries])]
        found = find_verified(self._pixels(queries), [self.gallery], views, [self.features])
        return list(zip((-found.distance).tolist(), found.row.tolist(), strict=True))

    def _pixels(self, images: Sequence[Photo]) -> torch.Tensor:
        return as_images(torch.stack([Thumbnails().prepare(image).flatten() for image in images]))

    @torch.no_grad()
    def _features(self, images: Sequence[Photo]) -> torch.Tensor:
        return torch.cat([self.extractor.embed(self.extractor.prepare(image)[None]) for image in images]).cpu()


class LocalMatching:
    """Local features as the audit finds them: the score is the number of matches that one homography explains."""

    def __init__(self, gallery: Sequence[Photo]) -> None:
        self.gallery = torch.stack([describe(np.asarray(image)) for image in gallery])

    def best(self, queries: Sequence[Photo]) -> list[tuple[float, int]]:
        """Return for each image the best score and the photograph that it belongs to."""
        views = [[describe(np.asarray(view)) for view in (image, ImageOps.mirror(image))] for image in queries]
        found = find_shared(torch.stack([torch.stack(view) for view in views]), [self.gallery])
        return list(zip(found.num_matches.tolist(), found.row.tolist(), strict=True))


class OrbMatching:
    """The same with ORB (Rublee et al. 2011) in the place of SIFT: 256 bits a point."""

    def __init__(self, gallery: Sequence[Photo]) -> None:
        self.detector = opencv().ORB_create(NUM_POINTS)
        self.gallery = [self._features(image) for image in gallery]
        self.owner = np.repeat(np.arange(len(gallery)), [len(one.places) for one in self.gallery])
        self.all = torch.cat([one.vectors for one in self.gallery])

    def best(self, queries: Sequence[Photo]) -> list[tuple[float, int]]:
        """Return for each image the best score and the photograph that it belongs to."""
        return [max(self._best(image), self._best(ImageOps.mirror(image))) for image in queries]

    def _features(self, image: Photo) -> LocalFeatures:
        points, descriptors = self.detector.detectAndCompute(np.asarray(image.convert("L")), None)
        if not points:
            return LocalFeatures(np.zeros((0, 2), np.float32), torch.zeros(0, 256))
        order = np.argsort([-point.response for point in points], kind="stable")
        bits = np.unpackbits(descriptors[order], axis=1).astype(np.float32) * 2 - 1
        places = np.array([points[number].pt for number in order], np.float32)
        return LocalFeatures(places, torch.from_numpy(bits / 16))

    def _best(self, image: Photo) -> tuple[float, int]:
        query = self._features(image)
        if not len(query.places):
            return 0.0, -1
        nearest = (query.vectors[:NUM_VOTERS] @ self.all.T).argmax(1).numpy()
        votes = np.bincount(self.owner[nearest], minlength=len(self.gallery))
        candidates = np.argsort(-votes, kind="stable")[:NUM_CANDIDATES].tolist()
        return max((float(num_matches(query, self.gallery[row])), row) for row in candidates)


METHODS: dict[str, type[LocalMatching | OrbMatching]] = {"local features": LocalMatching, "ORB": OrbMatching}


def threshold(scores: Sequence[float]) -> float:
    """Return what at most 1% of the background exceeds."""
    ordered = sorted(scores, reverse=True)
    return max(ordered[int(FALSE_POSITIVE_RATE * len(ordered))], MIN_MATCHES - 1)


def main() -> None:
    """Measure and print a table."""
    args = parse_args()
    torch.set_num_threads(1)
    if set(args.methods) & METHODS.keys():
        opencv().setNumThreads(1)
    rng = random.Random(args.seed)
    photos = read_photos(args.train_data_dir, args.side)
    rng.shuffle(photos)
    unseen, trained = photos[: args.num_background], photos[args.num_background :]
    planted = {}
    for name, change in CHANGES.items():
        rows = rng.sample(range(len(trained)), args.num_copies)
        planted[name] = [(change(trained[row], rng.choice(unseen), rng), row) for row in rows]
    print(f"{len(trained)} photographs, {len(unseen)} held out, longer edge {args.side}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for method in args.methods:
        results[method] = measure(method, trained, unseen, planted, args.extractor)
        print(method, json.dumps({k: v for k, v in results[method].items() if k != "found"}), flush=True)
    lines = [f"| change | {' | '.join(args.methods)} |", f"|---|{'---|' * len(args.methods)}"]
    for name in [*CHANGES, "all"]:
        lines.append(f"| {name} | " + " | ".join(f"{results[one]['found'][name]:.0%}" for one in args.methods) + " |")
    print("\n".join(lines))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def measure(
    method: str,
    trained: Sequence[Photo],
    unseen: Sequence[Photo],
    planted: dict[str, list[tuple[Photo, int]]],
    extractor: str,
) -> dict[str, Any]:
    """Return the share of each kind of copies that is found, and the processor's time."""
    start = time.process_time()
    matching: Registration | LocalMatching | OrbMatching
    if method == "registration":
        matching = Registration(trained, make_extractor(extractor, None, torch.device("cpu")))
    else:
        matching = METHODS[method](trained)
    indexed = time.process_time()
    background = [score for score, _ in matching.best(unseen)]
    if method == "registration":
        decision = choose_distance(-torch.tensor(background), "held-out photographs", FALSE_POSITIVE_RATE)
        limit = -decision.distance * (1 + 1e-6)
    else:
        limit = threshold(background)
    searched = time.process_time()
    found = {}
    for name, copies in planted.items():
        best = matching.best([image for image, _ in copies])
        right = [score > limit and row == own for (score, row), (_, own) in zip(best, copies, strict=True)]
        found[name] = sum(right) / len(right)
    found["all"] = sum(found.values()) / len(found)
    return {
        "limit": limit,
        "false_positives": sum(score > limit for score in background) / len(background),
        "seconds_per_indexed": (indexed - start) / len(trained),
        "seconds_per_query": (searched - indexed) / len(unseen),
        "found": found,
    }


if __name__ == "__main__":
    main()

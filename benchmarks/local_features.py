"""Measure local features beside registration: which changed photographs are found, at 1% of held-out photographs.

Changed copies of a folder's photographs are planted, one kind of change at a time, strong crops and parts that are
pasted into other photographs among them. Photographs that are kept out of the gallery are the background: what 1% of
them reach is what a copy must exceed.

- *registration* is what ``sd-memguard audit`` does: candidates by descriptor, compared at 64 x 64 pixels.
- *SIFT* and *ORB*: key points of each photograph, also flipped. Each descriptor votes for the photograph that holds
  its nearest neighbour in the whole gallery; those with most votes are matched (Lowe's ratio test), and the score is
  the number of matches that one homography explains (RANSAC).

    pip install opencv-python-headless
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
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.verification import as_jpeg, recontrast, turn_hue
from sd_memguard.audit.features.extractors import Extractor, Thumbnails, make_extractor
from sd_memguard.audit.metrics.verified import as_images, choose_distance, find_verified
from sd_memguard.core.duplicates import find_groups, make_thumbnail

FALSE_POSITIVE_RATE = 0.01
NUM_KEYPOINTS, NUM_CANDIDATES = 500, 5
RATIO = 0.8
"""A match is kept where the nearest descriptor is nearer than this share of the second nearest (Lowe 2004)."""
MAX_ERROR = 4.0
"""Pixels by which a match may miss the homography."""
MIN_SCALE, MAX_SCALE = 0.1, 10.0
"""Beyond these a homography is no copy's."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".rcc"}
MIN_EDGE = 256
"""Pixels of the longer edge; smaller images are not used."""

Photo = Image.Image


class LocalFeatures(NamedTuple):
    """Key points of an image: (K, 2) float32 places in pixels, and (K, D) descriptors."""

    places: np.ndarray
    descriptors: np.ndarray


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder of photographs, all distinct")
    parser.add_argument("--num_background", type=int, default=200, help="photographs kept out of the gallery")
    parser.add_argument("--num_copies", type=int, default=40, help="planted copies of each kind")
    parser.add_argument("--side", type=int, default=384, help="longer edge of gallery and copies, in pixels")
    parser.add_argument("--methods", nargs="+", default=["registration", "SIFT", "ORB"])
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
    part = ImageOps.contain(part, [round(edge * share) for edge in onto.size], Image.Resampling.BICUBIC)
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
    "25% of the area pasted at half the edge": lambda image, other, rng: pasted(
        cut(image, 0.25, rng), other, 0.5, rng
    ),
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
    """Local features: the score is the number of matches that one homography explains."""

    def __init__(self, gallery: Sequence[Photo], kind: str) -> None:
        self.detector = {"SIFT": cv2.SIFT_create, "ORB": cv2.ORB_create}[kind](NUM_KEYPOINTS)
        self.is_binary = kind == "ORB"
        self.matcher = cv2.BFMatcher(cv2.NORM_HAMMING if self.is_binary else cv2.NORM_L2)
        self.gallery = [self.features(image) for image in gallery]
        self.owner = np.repeat(np.arange(len(gallery)), [len(one.places) for one in self.gallery])
        everything = np.concatenate([one.descriptors for one in self.gallery])
        self.num_bytes = everything.nbytes
        self.all = torch.from_numpy(self._vectors(everything))

    def features(self, image: Photo) -> LocalFeatures:
        """Return the key points of an image; SIFT's as unit vectors of square roots (Arandjelovic 2012)."""
        points, descriptors = self.detector.detectAndCompute(np.asarray(image.convert("L")), None)
        if descriptors is None:
            return LocalFeatures(np.zeros((0, 2), np.float32), self._empty())
        if not self.is_binary:
            descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
        return LocalFeatures(np.array([point.pt for point in points], np.float32), descriptors)

    def best(self, queries: Sequence[Photo]) -> list[tuple[float, int]]:
        """Return for each image the best score and the photograph that it belongs to."""
        return [max(self._best(image), self._best(ImageOps.mirror(image))) for image in queries]

    def _best(self, image: Photo) -> tuple[float, int]:
        query = self.features(image)
        if len(query.places) < 4:
            return 0.0, -1
        nearest = (torch.from_numpy(self._vectors(query.descriptors)) @ self.all.T).argmax(1).numpy()
        votes = np.bincount(self.owner[nearest], minlength=len(self.gallery))
        candidates = np.argsort(-votes, kind="stable")[:NUM_CANDIDATES].tolist()
        return max((float(self._num_inliers(query, self.gallery[row])), row) for row in candidates)

    def _num_inliers(self, query: LocalFeatures, source: LocalFeatures) -> int:
        if len(source.places) < 4:
            return 0
        pairs = self.matcher.knnMatch(query.descriptors, source.descriptors, k=2)
        kept = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < RATIO * pair[1].distance]
        if len(kept) < 4:
            return 0
        one = query.places[[match.queryIdx for match in kept]]
        other = source.places[[match.trainIdx for match in kept]]
        cv2.setRNGSeed(0)
        transform, inside = cv2.findHomography(one, other, cv2.RANSAC, MAX_ERROR, maxIters=2000)
        places = one[inside.ravel() > 0] if transform is not None else one[:0]
        if len(places) < 4 or not _is_plausible(transform, places):
            return 0
        # Several key points at one place count once.
        return len({tuple(place) for place in np.round(places / 2).astype(int).tolist()})

    def _vectors(self, descriptors: np.ndarray) -> np.ndarray:
        """Return descriptors whose inner product is largest for the nearest."""
        if not self.is_binary:
            return descriptors
        return np.unpackbits(descriptors, axis=1).astype(np.float32) * 2 - 1

    def _empty(self) -> np.ndarray:
        return np.zeros((0, 32), np.uint8) if self.is_binary else np.zeros((0, 128), np.float32)


def _is_plausible(transform: np.ndarray, places: np.ndarray) -> bool:
    """Return whether a homography keeps the orientation, and changes the scale no more than a copy's does."""
    center = np.append(places.mean(0), 1.0)
    divisor = transform[2] @ center
    if abs(divisor) < 1e-9:
        return False
    image = transform[:2] @ center / divisor
    jacobian = (transform[:2, :2] - np.outer(image, transform[2, :2])) / divisor
    if np.linalg.det(jacobian) <= 0:
        return False
    large, small = np.linalg.svd(jacobian, compute_uv=False)
    return bool(small > MIN_SCALE and large < MAX_SCALE and large < 2 * small)


def threshold(scores: Sequence[float]) -> float:
    """Return what at most 1% of the background exceeds."""
    ordered = sorted(scores, reverse=True)
    return ordered[int(FALSE_POSITIVE_RATE * len(ordered))]


def main() -> None:
    """Measure and print a table."""
    args = parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
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
    matching: Registration | LocalMatching
    if method == "registration":
        matching = Registration(trained, make_extractor(extractor, None, torch.device("cpu")))
    else:
        matching = LocalMatching(trained, method)
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
        "bytes_per_indexed": matching.num_bytes / len(trained) if isinstance(matching, LocalMatching) else 12_800,
        "found": found,
    }


if __name__ == "__main__":
    main()

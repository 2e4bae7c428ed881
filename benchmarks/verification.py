"""Measure verified copies: which changed images are found among images that are alike, at 1% of held-out images.

Changed copies of a folder's images are planted, one kind of change at a time. Images of the folder that are kept out of
the gallery are the background: the distance of a copy is what 1% of them reach, and so are the similarity by a
descriptor alone and the L2 ratio, which verification is compared with. Found is a copy whose source is the nearest.
"""

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sd_memguard.assets import demo_data_path
from sd_memguard.audit.features.extractors import make_extractor
from sd_memguard.audit.metrics.similarity import NUM_NEIGHBORS, distance_ratio
from sd_memguard.audit.metrics.verified import FALSE_POSITIVE_RATE, SAME, choose_distance, find_verified

SIDE = 64


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, default=demo_data_path(), help="folder of .png images")
    parser.add_argument("--num_background", type=int, default=240, help="images kept out of the gallery")
    parser.add_argument("--num_copies", type=int, default=30, help="planted copies of each kind")
    parser.add_argument("--extractors", nargs="*", default=[], help="descriptors to compare with, e.g. sscd")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def crop(image: Image.Image, most: float, rng: random.Random) -> Image.Image:
    """Return the image with up to this share cut off each side, and just so much off one of them."""
    parts = [rng.uniform(0, most) for _ in range(4)]
    parts[rng.randrange(4)] = most
    left, top, right, bottom = (SIDE * part for part in parts)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, SIDE - right, SIDE - bottom))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the image as JPEG leaves it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def turn_hue(image: Image.Image, degrees: float) -> Image.Image:
    """Return the image with its hue turned."""
    values = np.array(image.convert("HSV"))
    values[..., 0] = (values[..., 0].astype(int) + round(degrees * 256 / 360)) % 256
    return Image.fromarray(values, "HSV").convert("RGB")


def recontrast(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the image in another contrast and brightness."""
    changed = ImageEnhance.Contrast(image).enhance(rng.uniform(0.75, 1.2))
    return ImageEnhance.Brightness(changed).enhance(rng.uniform(0.8, 1.15))


def several(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the image cropped or flipped, its hue turned, and compressed."""
    image = crop(image, 0.08, rng) if rng.random() < 0.5 else ImageOps.mirror(image)
    return as_jpeg(turn_hue(image, rng.uniform(-15, 15)), 60)


CHANGES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "each side cropped by up to 4%": lambda image, rng: crop(image, 0.04, rng),
    "up to 7%": lambda image, rng: crop(image, 0.07, rng),
    "up to 10%": lambda image, rng: crop(image, 0.1, rng),
    "JPEG 40": lambda image, _: as_jpeg(image, 40),
    "half the size and back": lambda image, _: image.resize((32, 32), Image.Resampling.BICUBIC).resize((64, 64)),
    "flip": lambda image, _: ImageOps.mirror(image),
    "rotation by 2 to 6 degrees": lambda image, rng: image.rotate(
        rng.choice((-1, 1)) * rng.uniform(2, 6), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
    ),
    "hue by 10 to 30 degrees": lambda image, rng: turn_hue(image, rng.choice((-1, 1)) * rng.uniform(10, 30)),
    "brightness and contrast": recontrast,
    "crop and JPEG 60": lambda image, rng: as_jpeg(crop(image, 0.06, rng), 60),
    "crop or flip, hue and JPEG 60": several,
}


def read_distinct(folder: Path) -> list[Image.Image]:
    """Return the images of a folder on white at 64 x 64, each that is there several times once."""
    images = {}
    for file in sorted(folder.rglob("*.png")):
        image = Image.open(file).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) if image.size != (SIDE, SIDE) else image
        images[image.tobytes()] = image
    return list(images.values())


def as_tensor(images: list[Image.Image]) -> Tensor:
    """Return (N, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


class Best(NamedTuple):
    """For each of Q images the image of the gallery that is most like it, and how like: (Q,) each, more is more."""

    score: Tensor
    row: Tensor


class Descriptor:
    """An extractor, with the gallery's features."""

    def __init__(self, name: str, gallery: Tensor) -> None:
        self.extractor = make_extractor(name, None, torch.device("cpu"))
        self.known = self.features(gallery)

    def features(self, images: Tensor) -> Tensor:
        """Return (Q, D) unit vectors."""
        prepared = (self.extractor.prepare(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in images)
        return torch.cat([self.extractor.embed(one[None]) for one in prepared])

    def views(self, images: Tensor) -> list[Tensor]:
        """Return the features of the images and of the flipped images."""
        return [self.features(images), self.features(images.flip(-1))]

    def best(self, images: Tensor) -> Best:
        """Return the nearest by cosine, flipped or not."""
        return Best(*torch.stack([view @ self.known.T for view in self.views(images)]).amax(0).max(1))


def best_by_ratio(images: Tensor, gallery: Tensor) -> Best:
    """Return the nearest by pixels, flipped or not; the score is minus the ratio of Carlini et al. 2023."""
    found = []
    for view in (images, images.flip(-1)):
        distances = torch.cdist(view.flatten(1).float(), gallery.flatten(1).float())
        nearest = distances.topk(min(NUM_NEIGHBORS, len(gallery)), dim=1, largest=False)
        found.append((-distance_ratio(nearest.values), nearest.indices[:, 0]))
    (score, row), (flipped_score, flipped_row) = found
    return Best(torch.maximum(score, flipped_score), torch.where(score >= flipped_score, row, flipped_row))


@torch.no_grad()
def main() -> None:
    """Measure and print a table."""
    args = parse_args()
    rng = random.Random(args.seed)
    images = read_distinct(args.train_data_dir)
    rng.shuffle(images)
    unseen, trained = as_tensor(images[: args.num_background]), images[args.num_background :]
    gallery = as_tensor(trained)
    descriptors = {name: Descriptor(name, gallery) for name in dict.fromkeys(("bundled", *args.extractors))}

    def verified(queries: Tensor) -> Best:
        bundled = descriptors["bundled"]
        found = find_verified(queries, [gallery], bundled.views(queries), [bundled.known])
        return Best(-found.distance, found.row)

    methods: dict[str, Callable[[Tensor], Best]] = {
        "verified": verified,
        **{f"{name} alone": descriptor.best for name, descriptor in descriptors.items()},
        "L2 ratio": lambda queries: best_by_ratio(queries, gallery),
    }
    distance = -verified(unseen).score
    decision = choose_distance(distance, "held-out images")
    limits = {
        name: -decision.distance if name == "verified" else limit(method(unseen[distance >= SAME]).score)
        for name, method in methods.items()
    }
    print(f"{len(trained)} images; a copy is at {decision.distance:.3f} or nearer, {decision.rule}\n")
    print(f"| change | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    total = torch.zeros(len(methods))
    for name, change in CHANGES.items():
        rows = torch.tensor(rng.sample(range(len(trained)), args.num_copies))
        queries = as_tensor([change(trained[number], rng) for number in rows.tolist()])
        shares = []
        for key, method in methods.items():
            score, row = method(queries)
            shares.append(((score >= limits[key]) & (row == rows)).float().mean())
        total += torch.stack(shares) / len(CHANGES)
        print(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |", flush=True)
    print(f"| all | {' | '.join(f'{share:.1%}' for share in total)} |")


def limit(background: Tensor) -> float:
    """Return the score that at most 1% of the background reach."""
    ordered = background.sort(descending=True).values
    return float(np.nextafter(np.float32(ordered[int(FALSE_POSITIVE_RATE * len(ordered))]), np.float32(np.inf)))


if __name__ == "__main__":
    main()

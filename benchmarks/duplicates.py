"""Measure the finding of duplicates: which changed copies are found, what is mixed up, and what it costs.

Changed copies of real images are planted beside their originals, one kind of change at a time; then groups are sought
among many random thumbnails, for the time and memory.
"""

import argparse
import io
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sd_memguard.assets import demo_data_path
from sd_memguard.core.duplicates import THUMBNAIL_SIDE, find_groups, make_thumbnail

NUM_COPIED, NUM_COPIES = 32, 16
"""Images that have many changed copies, and how many."""


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, default=demo_data_path(), help="folder of .png or .jpg images")
    parser.add_argument("--num_random", type=int, default=1_000_000, help="random thumbnails of the second part")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/duplicates"), help="receives results.json")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def changes(random: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """Return the changes by name."""
    return {
        "JPEG, quality 50": lambda image: as_jpeg(image, 50),
        "JPEG, quality 90": lambda image: as_jpeg(image, 90),
        "half the size": lambda image: ImageOps.scale(image, 0.5, Image.Resampling.LANCZOS),
        "twice the size": lambda image: ImageOps.scale(image, 2, Image.Resampling.BICUBIC),
        "10 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
        "10 % brighter, white cut off": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        "15 % more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
        "each side cropped by 0 to 2 %": lambda image: crop(image, 0.02, random),
        "each side cropped by 0 to 4 %": lambda image: crop(image, 0.04, random),
        "each side cropped by 0 to 5 %": lambda image: crop(image, 0.05, random),
        "each side cropped by 0 to 7 %": lambda image: crop(image, 0.07, random),
        "0 to 3 % cropped, JPEG 70": lambda image: as_jpeg(crop(image, 0.03, random), 70),
        "flipped, with --duplicates_flip": ImageOps.mirror,
    }


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the image as JPEG leaves it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def crop(image: Image.Image, most: float, random: np.random.Generator) -> Image.Image:
    """Return the image with a random part of at most `most` cut off each side, in whole pixels."""
    left, top, right, bottom = np.round(random.uniform(0, most, 4) * np.tile(image.size, 2)).astype(int).tolist()
    return image.crop((left, top, image.width - right, image.height - bottom))


def read_distinct(folder: Path) -> list[Image.Image]:
    """Return the images of a folder, each that is there several times once."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".png", ".jpg", ".jpeg"})
    contents = dict.fromkeys(path.read_bytes() for path in files)
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]


def measure_recall(images: list[Image.Image], random: np.random.Generator) -> dict[str, float]:
    """Return for each change the share of the images whose changed copy comes into their group."""
    originals, found = np.stack([make_thumbnail(image) for image in images]), {}
    for name, change in changes(random).items():
        copies = np.stack([make_thumbnail(change(image)) for image in images])
        groups = find_groups(np.concatenate([originals, copies]), flip=name.startswith("flipped"))
        found[name] = float((groups[: len(images)] == groups[len(images) :]).mean())
    return found


def measure_scatter(images: list[Image.Image], random: np.random.Generator) -> dict[str, float]:
    """Return for some crops into how many groups 16 crops of one image fall, on average; 1 is the best."""
    found = {}
    for most in (0.02, 0.05, 0.08):
        crops = [make_thumbnail(crop(one, most, random)) for one in images[:NUM_COPIED] for _ in range(NUM_COPIES)]
        others = [make_thumbnail(image) for image in images[NUM_COPIED:]]
        groups = find_groups(np.stack(crops + others))[: len(crops)].reshape(NUM_COPIED, NUM_COPIES)
        found[f"each side cropped by 0 to {most:.0%}"] = float(np.mean([len(np.unique(group)) for group in groups]))
    return found


def count_mixed_up(images: list[Image.Image]) -> dict[str, int]:
    """Return how many groups there are among distinct files, and the images in them."""
    _, sizes = np.unique(find_groups(np.stack([make_thumbnail(image) for image in images])), return_counts=True)
    return {"images": len(images), "groups": int((sizes > 1).sum()), "grouped": int(sizes[sizes > 1].sum())}


def measure_cost(count: int, random: np.random.Generator) -> dict[str, float]:
    """Return processor seconds for that many random thumbnails, and megabytes beyond the thumbnails."""
    thumbnails = random.integers(0, 256, (count, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), dtype=np.uint8)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    find_groups(thumbnails)
    seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "thumbnails": count,
        "seconds": seconds,
        "megabytes": thumbnails.nbytes / 1e6,
        "more": (after - before) / 1e3,
    }


def main() -> None:
    """Measure, print, and write results.json."""
    args = parse_args()
    random = np.random.default_rng(args.seed)
    images = read_distinct(args.train_data_dir)
    results: dict[str, Any] = {"mixed_up": count_mixed_up(images), "recall": measure_recall(images, random)}
    print("{images} distinct files: {groups} groups hold {grouped} of them\n".format(**results["mixed_up"]))
    print("| change | found |\n|---|---|")
    for name, share in results["recall"].items():
        print(f"| {name} | {share:.1%} |")
    results["scatter"] = measure_scatter(images, random)
    print(f"\n| {NUM_COPIES} copies | groups they fall into |\n|---|---|")
    for name, number in results["scatter"].items():
        print(f"| {name} | {number:.2f} |")
    results["cost"] = measure_cost(args.num_random, random)
    text = (
        "\n{thumbnails:,} random thumbnails ({megabytes:.0f} MB): {seconds:.1f} processor seconds, {more:.0f} MB more"
    )
    print(text.format(**results["cost"]))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

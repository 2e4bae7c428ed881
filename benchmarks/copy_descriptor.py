"""How well an extractor tells copies from near-duplicates: changed training images of the demo against held-out ones.

    python benchmarks/copy_descriptor.py --output_dir runs/copy_descriptor

Prints, for each kind of change, the share found at the audit's default threshold and how often a copy is nearer to its
original than a held-out image is to any training image (AUC).
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from sd_memguard.assets import demo_data_path, demo_heldout_path
from sd_memguard.audit.collection import read_folder
from sd_memguard.audit.features.extractors import Extractor, make_extractor
from sd_memguard.audit.metrics.background import BACKGROUND_PERCENT, MARGIN, choose_threshold
from sd_memguard.audit.metrics.similarity import best_matches, cosine
from sd_memguard.audit.metrics.statistics import area_under_curve, percentile

NUM_COPIES = 256
MARGINS = {"0": 0.0, "1/3": MARGIN, "1/2": 0.5}


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the image after JPEG compression."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    """Return the image in another size."""
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Return the image without this share of each edge, in its old size."""
    cut = share * image.width
    box = (cut, cut, image.width - cut, image.height - cut)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 90": lambda image: jpeg(image, 90),
    "JPEG, quality 50": lambda image: jpeg(image, 50),
    "half the size": lambda image: resized(image, 0.5),
    "double the size": lambda image: resized(image, 2),
    "2% off each edge": lambda image: cropped(image, 0.02),
    "4% off each edge": lambda image: cropped(image, 0.04),
    "2% off each edge, double the size, JPEG 70": lambda image: jpeg(resized(cropped(image, 0.02), 2), 70),
}


@torch.no_grad()
def embed(extractor: Extractor, images: list[Image.Image]) -> torch.Tensor:
    """Return a row for each image."""
    parts = [images[start : start + 64] for start in range(0, len(images), 64)]
    return torch.cat([extractor.embed(torch.stack([extractor.prepare(image) for image in part])) for part in parts])


def above(similarity: torch.Tensor, high: float) -> dict[str, float]:
    """Return the shares that are copies if the threshold lies at the high background, or that far on the way to 1."""
    thresholds = {name: high + (1 - high) * margin for name, margin in MARGINS.items()}
    return {name: round((similarity >= value).float().mean().item(), 4) for name, value in thresholds.items()}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extractor", default="bundled")
    parser.add_argument("--extractor_weights")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    extractor = make_extractor(args.extractor, args.extractor_weights, torch.device("cpu"))
    train = read_folder(demo_data_path(), "--train_data_dir")
    heldout = read_folder(demo_heldout_path(), "--reference_data_dir")
    gallery = embed(extractor, [train.image(row) for row in train.distinct])
    others = best_matches(gallery, [gallery], 1, cosine, own=torch.arange(len(gallery))).scores[:, 0]
    near_duplicates = best_matches(
        embed(extractor, [heldout.image(row) for row in heldout.distinct]), [gallery], 1, cosine
    )
    background = near_duplicates.scores[:, 0]
    threshold = choose_threshold(others, background)
    high = percentile(background, BACKGROUND_PERCENT).item()
    figures: dict[str, object] = {
        "threshold": round(threshold.similarity, 4),
        "rule": threshold.rule,
        "background": {str(q): round(percentile(background, q).item(), 3) for q in (50, 95, 99, 100)},
        "background_train": {str(q): round(percentile(others, q).item(), 3) for q in (50, 95, 99, 100)},
        "heldout_above": above(background, high),
    }
    for name, change in CHANGES.items():
        copies = embed(extractor, [change(train.image(row)) for row in train.distinct[:NUM_COPIES]])
        found = best_matches(copies, [gallery], 1, cosine)
        similarity = found.scores[:, 0]
        figures[name] = {
            "found": above(similarity, high),
            "right_image": round((found.indices[:, 0] == torch.arange(NUM_COPIES)).float().mean().item(), 4),
            "auc": round(area_under_curve(similarity, background).item(), 4),
            "similarity_p5": round(percentile(similarity, 5).item(), 3),
            "similarity_min": round(similarity.min().item(), 3),
        }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

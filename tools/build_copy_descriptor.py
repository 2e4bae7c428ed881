"""Train the bundled copy descriptor: the features by which the audit tells copies without a download.

Two changed views of a image are to be alike, and unlike those of every other image (InfoNCE); a second term spreads
the vectors over the sphere (KoLeo), both as in SSCD (Pizzi et al. 2022, arXiv 2202.10261). The views are what happens
to copies: shifted, zoomed, scaled down and up, compressed like JPEG, tinted, noisy. Both views of a pair
share a random recolouring, flip and blend, which makes many more styles of the few images at hand.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from sd_memguard.audit.features.copy_descriptor import SIZE, CopyDescriptor
from sd_memguard.audit.images import load_images

TEMPERATURE = 0.07
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02

BLOCK = 8
COSINES = torch.tensor(
    [
        [
            math.cos((2 * column + 1) * row * math.pi / 16) * math.sqrt((1 if row == 0 else 2) / BLOCK)
            for column in range(8)
        ]
        for row in range(8)
    ]
)
COARSENESS = (1 + torch.arange(8)[:, None] + torch.arange(8)) / 4
"""JPEG's habit in one line: the higher the frequency, the coarser its steps."""


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dirs", type=Path, nargs="+", required=True, help="Imagefolders to train on.")
    parser.add_argument("--output_file", type=Path, required=True, help="Safetensors file, in float16.")
    parser.add_argument("--max_train_steps", type=int, default=1200, help="Steps of 128 pairs.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, batches and views.")
    parser.add_argument("--num_threads", type=int, default=1, help="Of torch.")
    return parser.parse_args()


def main() -> None:
    """Train and save."""
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    pixels = torch.cat([load_images(folder, SIZE).pixels for folder in args.data_dirs])
    images = pixels.permute(0, 3, 1, 2).float() / 255
    model = CopyDescriptor()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.max_train_steps)
    start = time.monotonic()
    for step in range(args.max_train_steps):
        batch = restyle(images[torch.randint(len(images), (BATCH_SIZE,))])
        vectors = torch.cat([model(disguise(batch)), model(disguise(batch))])
        contrast, spread = losses(vectors, same_image(batch))
        optimizer.zero_grad()
        (contrast + spread).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == args.max_train_steps - 1:
            minutes = (time.monotonic() - start) / 60
            print(f"step {step}: contrast {contrast:.4f}, spread {spread:.4f}, {minutes:.1f} minutes", flush=True)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half().contiguous() for name, weight in model.state_dict().items()}, args.output_file)


def chance(probability: float) -> bool:
    """Return True with this probability."""
    return torch.rand(()).item() < probability


def restyle(batch: Tensor) -> Tensor:
    """Return the images with channels exchanged, inverted, flipped or blended with others, all in the same way."""
    if chance(0.7):
        batch = batch[:, torch.randperm(3)]
    if chance(0.3):
        batch = 1 - batch
    if chance(0.5):
        batch = batch.flip(3)
    if chance(0.3):
        batch = batch.flip(2)
    if chance(0.3):
        weight = 0.5 + 0.25 * torch.rand(()).item()
        batch = weight * batch + (1 - weight) * batch.roll(1, 0)
    return batch


def disguise(batch: Tensor) -> Tensor:
    """Return each image as a copy of it might look."""
    count = len(batch)
    zoom = 1 - 0.12 * torch.rand(count)
    shift = (2 * torch.rand(count, 2) - 1) * (1 - zoom + 0.02)[:, None]
    transform = torch.zeros(count, 2, 3)
    for axis in range(2):
        transform[:, axis, axis] = zoom * (1 + 0.04 * (torch.rand(count) - 0.5))
    transform[:, :, 2] = shift
    grid = functional.affine_grid(transform, list(batch.shape), align_corners=False)
    changed = functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    if chance(0.5):
        edge = [28, 36, 44, 52][int(torch.randint(4, ()))]
        small = functional.interpolate(changed, (edge, edge), mode="bilinear", antialias=True)
        changed = functional.interpolate(small, (SIZE, SIZE), mode="bicubic")
    changed = compress(changed, [0, 0.03, 0.06, 0.1, 0.15][int(torch.randint(5, ()))])
    contrast = 1 + 0.2 * (torch.rand(count, 1, 1, 1) - 0.5)
    changed = (changed - 0.5) * contrast + 0.5 + 0.08 * (torch.rand(count, 3, 1, 1) - 0.5)
    changed = changed + torch.randn(changed.shape) * 0.05 * torch.rand(count, 1, 1, 1)
    return changed.clamp(0, 1)


def compress(batch: Tensor, step: float) -> Tensor:
    """Return the images with the cosine coefficients of their 8 x 8 blocks rounded; step 0 leaves them alone."""
    if not step:
        return batch
    count, channels, height, width = batch.shape
    blocks = batch.reshape(count, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(3, 4)
    steps = step * COARSENESS
    blocks = COSINES.T @ ((COSINES @ blocks @ COSINES.T / steps).round() * steps) @ COSINES
    return blocks.transpose(3, 4).reshape(count, channels, height, width)


def same_image(batch: Tensor) -> Tensor:
    """Return which images of the batch are one and the same, (B, B) bool, so that they are not held apart."""
    rows = batch.flatten(1)[:, ::97]
    return torch.cdist(rows, rows, p=1) < 1e-3


def losses(vectors: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Return InfoNCE and KoLeo of the vectors of two views, (2B, D), one view after the other."""
    count = len(vectors)
    target = torch.arange(count).roll(count // 2)
    itself = torch.eye(count, dtype=torch.bool)
    repeated = same.repeat(2, 2)
    repeated[torch.arange(count), target] = False
    scores = (vectors @ vectors.T / TEMPERATURE).masked_fill(repeated | itself, -1e9)
    contrast = functional.cross_entropy(scores, target)
    others = torch.cdist(vectors, vectors).masked_fill(same.repeat(2, 2) | itself, 9.0)
    return contrast, -(others.min(1).values + 1e-6).log().mean()


if __name__ == "__main__":
    main()

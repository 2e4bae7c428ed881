"""What a UNet replicates and how good it is: the same prompts, noises and timesteps for every variant.

Prompts are of three kinds: ``duplicated`` and ``unique``, the captions of training images, and ``heldout``, captions of
images that nobody trains on. What is found for held-out prompts is what replication is compared with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.denoising import BATCH_SIZE, Encoded, denoising_losses, encode
from benchmarks.memorization.datasets import NUM_DUPLICATED, CaptionedImage, Dataset, as_pixels
from sd_memguard.assets import tiny_sd_path
from sd_memguard.audit.features.extractors import Extractor, make_extractor
from sd_memguard.audit.generate import generate_images, load_pipeline
from sd_memguard.audit.images import as_rows
from sd_memguard.audit.metrics.attributes import AttributeClassifier, attribute_figures, train_classifier
from sd_memguard.audit.metrics.similarity import find_copies
from sd_memguard.audit.metrics.statistics import kernel_distance
from sd_memguard.core.seeding import derive_seed, generator_for

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 2.5
NUM_PROMPTS = {"duplicated": NUM_DUPLICATED, "unique": 128, "heldout": 128}
NUM_IMAGES = {"duplicated": 4, "unique": 1, "heldout": 1}
"""Generated images for each prompt."""
NEAREST = 3
"""Neighbour whose distance is the radius of precision and recall (https://arxiv.org/abs/1904.06991, section 3)."""


class Exam(NamedTuple):
    """What every model is asked.

    Attributes:
        pipeline: the base model.
        train: pixels of the distinct training images, (N, H, W, 3) uint8.
        heldout: those of the held-out images.
        images: the images of the prompts by kind, and their pixels' rows among ``train`` or ``heldout``.
        encoded: the images whose loss is measured.
        extractor: of the features of quality.
        real: features of the held-out images, (M, D).
        classifier: of attributes, where they are known.
        known: everything that each held-out image shows.
    """

    pipeline: StableDiffusionPipeline
    train: Tensor
    heldout: Tensor
    images: dict[str, tuple[list[CaptionedImage], Tensor]]
    encoded: dict[str, Encoded]
    extractor: Extractor
    real: Tensor
    classifier: AttributeClassifier | None
    known: list[dict[str, str]]


def prepare_exam(dataset: Dataset) -> Exam:
    """Choose the prompts, encode the images and train the attribute classifier (on real images only)."""
    train, heldout = (_stack(images) for images in dataset)
    starts = {"duplicated": 0, "unique": NUM_DUPLICATED, "heldout": 0}
    images = {}
    for kind, start in starts.items():
        rows = range(start, start + NUM_PROMPTS[kind])
        source = dataset.heldout if kind == "heldout" else dataset.train
        images[kind] = ([source[row] for row in rows], torch.tensor(rows))
    pipeline = load_pipeline(tiny_sd_path())
    extractor = make_extractor("bundled", None, torch.device("cpu"))
    known = [image.named | image.open for image in (*dataset.train, *dataset.heldout)]
    classifier = None
    if any(known):
        classifier = train_classifier(torch.cat([train, heldout]).permute(0, 3, 1, 2), known)
    return Exam(
        pipeline,
        train,
        heldout,
        images,
        {
            "heldout": encode(heldout, [image.text for image in dataset.heldout], pipeline),
            "unique": encode(train[images["unique"][1]], [image.text for image in images["unique"][0]], pipeline),
        },
        extractor,
        _features(heldout, extractor),
        classifier,
        known[len(train) :],
    )


def _stack(images: Sequence[CaptionedImage]) -> Tensor:
    return torch.from_numpy(np.stack([as_pixels(image) for image in images]))


def judge(exam: Exam, unet_folder: Path, generated: Path, description: str) -> dict[str, Any]:
    """Return replication by kind of prompts, losses, and the quality of what held-out prompts give.

    Args:
        exam: what it is asked.
        unet_folder: the UNet.
        generated: a safetensors file where its generated images are kept.
        description: text of the progress bars.
    """
    unet = UNet2DConditionModel.from_pretrained(unet_folder, torch_dtype=torch.float32, use_safetensors=True)
    exam.pipeline.unet = unet.eval()
    if generated.exists():
        pixels = load_file(generated)
    else:
        pixels = {kind: _generate(exam, kind, f"{description}, {kind}") for kind in exam.images}
        save_file(pixels, generated)
    return {
        "replication": {kind: _replication(exam, kind, pixels[kind]) for kind in exam.images},
        "losses": {name: _mean(denoising_losses(unet, encoded)) for name, encoded in exam.encoded.items()},
        "quality": _quality(exam, pixels["heldout"]),
    }


def _generate(exam: Exam, kind: str, description: str) -> Tensor:
    """Return the generated images of the prompts of a kind, (prompts * images, H, W, 3) uint8."""
    count, prompts = NUM_IMAGES[kind], [image.text for image in exam.images[kind][0]]
    return generate_images(
        exam.pipeline,
        [prompt for prompt in prompts for _ in range(count)],
        [derive_seed(0, f"benchmark {kind}", row, number) for row in range(len(prompts)) for number in range(count)],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        description=description,
    )


def _replication(exam: Exam, kind: str, pixels: Tensor) -> dict[str, Any]:
    """Return for each generated image whether it is a copy and whether its own image is the nearest, and attributes.

    ``copies`` compares with the training images, whatever the prompt; ``own`` asks whether among the training images
    (for held-out prompts: among the held-out ones) that of the prompt is the nearest by pixels.
    """
    images, rows = exam.images[kind]
    own_rows = rows.repeat_interleave(NUM_IMAGES[kind])
    copies = find_copies(as_rows(pixels), as_rows(exam.train))
    nearest = copies.nearest
    if kind == "heldout":
        nearest = find_copies(as_rows(pixels), as_rows(exam.heldout)).nearest
    found: dict[str, Any] = {
        "prompts": len(images),
        "copies": _digits(copies.is_copy),
        "own": _digits(nearest == own_rows),
    }
    if exam.classifier is not None:
        repeated = [image for image in images for _ in range(NUM_IMAGES[kind])]
        named, opened = [image.named for image in repeated], [image.open for image in repeated]
        figures = attribute_figures(exam.classifier, pixels.permute(0, 3, 1, 2), named, opened, exam.known)
        found |= {name: _means(values) for name, values in figures._asdict().items()}
    return found


def _digits(flags: Tensor) -> str:
    return "".join(str(int(flag)) for flag in flags)


def _means(values: Tensor) -> list[float | None]:
    """Return values rounded, None where they are not known."""
    return [None if value != value else round(value, 4) for value in values.tolist()]


def _quality(exam: Exam, pixels: Tensor) -> dict[str, float]:
    """Return KID, precision and recall of the images that held-out prompts give, against the held-out images."""
    features = _features(pixels, exam.extractor)
    kid = kernel_distance(features, exam.real, generator_for(0, "kid"))
    return {"kid": round(kid.value, 5), **precision_and_recall(features, exam.real)}


@torch.no_grad()
def _features(pixels: Tensor, extractor: Extractor) -> Tensor:
    return torch.cat([extractor.embed(part) for part in pixels.split(BATCH_SIZE)])


def precision_and_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return the share of generated images within the real ones' neighbourhoods, and the other way round.

    Args:
        generated: (N, D) features.
        real: (M, D) features.
    """
    radius_of_real = torch.cdist(real, real).sort(1).values[:, NEAREST]
    radius_of_generated = torch.cdist(generated, generated).sort(1).values[:, NEAREST]
    distance = torch.cdist(generated, real)
    precision = (distance <= radius_of_real).any(1).float().mean()
    recall = (distance <= radius_of_generated[:, None]).any(0).float().mean()
    return {"precision": round(float(precision), 4), "recall": round(float(recall), 4)}


def _mean(losses: Tensor) -> dict[str, Any]:
    return {
        "mean": round(float(losses.mean()), 6),
        "standard_error": round(float(losses.std() / len(losses) ** 0.5), 6),
        "by_image": [round(loss, 5) for loss in losses.tolist()],
    }

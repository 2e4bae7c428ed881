"""How good the generated images are: their distribution against that of real images, and against their captions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.extractors import Extractor
from sd_memguard.audit.metrics.clip_score import ClipScorer
from sd_memguard.audit.metrics.measures import GeneratedSet
from sd_memguard.audit.metrics.statistics import bootstrap, frechet_distance, kernel_distance, mean
from sd_memguard.audit.report import QualityFigures
from sd_memguard.core.seeding import generator_for

MIN_QUALITY_IMAGES = 20
"""Fewer generated images or images say nothing about their distribution."""

MAX_QUALITY_IMAGES = 10_000
"""Most images of a side that KID and FID look at."""


class Quality(NamedTuple):
    """What quality is measured with: an extractor, the features of both sets of images, and a CLIP model."""

    extractor: Extractor
    features_of: Callable[[Collection, Sequence[int]], Tensor]
    train: Tensor
    reference: Tensor | None
    clip: ClipScorer | None


def quality_figures(generated: GeneratedSet, quality: Quality, seed: int) -> QualityFigures:
    """Return KID and FID of the generated images of unique prompts against both sets, and their CLIP score.

    Copies are real images and flatter every distance to the training set, so duplicated prompts are not used.
    """
    figures: dict[str, Any] = {}
    missing: dict[str, str] = {}
    kinds = {"unique", "given"}
    rows = [row for row, kind in enumerate(generated.kinds) if kind in kinds]
    features = quality.features_of(generated.images, rows[:MAX_QUALITY_IMAGES]) if rows else None
    for name, real in (("train", quality.train), ("reference", quality.reference)):
        reason = _why_no_distance(features, real)
        figures[f"kid_{name}"] = figures[f"fid_{name}"] = None
        if features is None or real is None or reason:
            missing[f"kid_{name}"] = missing[f"fid_{name}"] = reason
            continue
        figures[f"kid_{name}"] = kernel_distance(features, real, generator_for(seed, f"kid {name}"))
        if min(len(features), len(real)) > features.shape[1]:
            figures[f"fid_{name}"] = frechet_distance(features, real)
        else:
            missing[f"fid_{name}"] = (
                f"needs more images than {quality.extractor.name} has dimensions ({features.shape[1]}) on both sides, "
                f"got {len(features)} generated images and {len(real)} images"
            )
    figures["clip_score"] = None
    if quality.clip is None:
        missing["clip_score"] = "no --clip_model"
    elif not any(generated.images.captions[row] for row in rows):
        missing["clip_score"] = "the generated images have no captions"
    else:
        scores = quality.clip.scores(generated.images, rows).unflatten(0, (-1, generated.per_caption))
        figures["clip_score"] = bootstrap(scores, mean, generator_for(seed, "bootstrap clip"))
    return QualityFigures(**figures, why_missing=missing)


def _why_no_distance(generated: Tensor | None, real: Tensor | None) -> str:
    if real is None:
        return "no --reference_data_dir"
    if generated is None:
        return "no generated images of unique prompts"
    if min(len(generated), len(real)) < MIN_QUALITY_IMAGES:
        given = f"{len(generated)} generated images and {len(real)} images"
        return f"needs {MIN_QUALITY_IMAGES} images on both sides, got {given}"
    return ""


def quality_features(blocks: Sequence[Tensor], extractor: Extractor) -> Tensor:
    """Return features on the scale the distances want: unit vectors at length sqrt(D), others as they are.

    The kernel of KID divides by D; unit vectors would all come out alike.
    """
    rows = torch.cat(list(blocks))
    return rows * extractor.dimensions**0.5 if extractor.is_normalized else rows

"""What a UNet copies and how well it denoises: the same captions, noises and timesteps for every arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.denoising import BATCH_SIZE, Encoded, denoising_losses, encode
from sd_memguard.assets import demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.audit.captions import choose_captions
from sd_memguard.audit.features.extractors import Extractor, make_extractor
from sd_memguard.audit.generate import draw, load_pipeline
from sd_memguard.audit.images import Images, as_rows, load_images
from sd_memguard.audit.metrics.quality import quality_features
from sd_memguard.audit.metrics.similarity import find_copies
from sd_memguard.audit.metrics.statistics import kernel_distance
from sd_memguard.core.seeding import derive_seed, generator_for

SIZE = 64
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 2.5
NUM_CAPTIONS = {"repeated": 32, "single": 96}
RECOGNIZED = 0.7
"""Cosine of descriptors; 2% of the untouched model's generated images are as like the image of their caption."""
GENERATED = {"repeated": 4, "single": 1}
"""Generated images of each caption, by kind."""


class Exam(NamedTuple):
    """What every model is asked: training images, chosen rows by kind, and the images whose loss is measured.

    Quality is the distance (KID) of the generated images of single captions to the held-out images, of which ``unseen``
    holds the features by measure: ``kid`` of the bundled copy descriptor, which looks at what is drawn, and
    ``kid_latents`` of the VAE's latents, which look at where the colors are.
    """

    pipeline: StableDiffusionPipeline
    images: Images
    rows: dict[str, list[int]]
    encoded: dict[str, Encoded]
    extractor: Extractor
    unseen: dict[str, Tensor]


def prepare_exam() -> Exam:
    """Choose the captions and encode the images: repeated, single, and held out."""
    images, heldout = load_images(demo_data_path(), SIZE), load_images(demo_heldout_path(), SIZE)
    chosen = choose_captions(images, max(NUM_CAPTIONS.values()))._asdict()
    rows = {kind: chosen[kind][:count] for kind, count in NUM_CAPTIONS.items()}
    pipeline = load_pipeline(tiny_sd_path())
    extractor = make_extractor("bundled", None, torch.device("cpu"))

    def encoded(source: Images, ids: Sequence[int]) -> Encoded:
        return encode(source.pixels[list(ids)], [source.captions[row] for row in ids], pipeline)

    return Exam(
        pipeline,
        images,
        rows,
        {
            "heldout": encoded(heldout, range(len(heldout.files))),
            **{kind: encoded(images, ids) for kind, ids in rows.items()},
        },
        extractor,
        _features(heldout.pixels, extractor, pipeline),
    )


def judge(exam: Exam, unet_folder: Path, generated: Path, description: str) -> dict[str, Any]:
    """Return copies by kind and measure, mean losses by set, and the KID of the generated images, of the UNet in a folder.

    Args:
        exam: what it is asked.
        unet_folder: the UNet.
        generated: a safetensors file where its generated images are kept.
        description: text of the progress bars.
    """
    unet = UNet2DConditionModel.from_pretrained(unet_folder, torch_dtype=torch.float32, use_safetensors=True)
    exam.pipeline.unet = unet.eval()
    drawn = _generated(exam, generated, description)
    features = _features(drawn["single"], exam.extractor, exam.pipeline)
    distances = {name: kernel_distance(features[name], exam.unseen[name], generator_for(0, "kid")) for name in features}
    return {
        "copies": {kind: _copies(exam, kind, pixels) for kind, pixels in drawn.items()},
        "recognized": {kind: _recognized(exam, kind, pixels) for kind, pixels in drawn.items()},
        "losses": {name: _mean(denoising_losses(unet, encoded)) for name, encoded in exam.encoded.items()},
        **{
            name: {"mean": round(kid.value, 5), "low": round(kid.low, 5), "high": round(kid.high, 5)}
            for name, kid in distances.items()
        },
    }


@torch.no_grad()
def _features(pixels: Tensor, extractor: Extractor, pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Return the features of images by measure, (N, D) each."""
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = [pipeline.vae.encode(part).latent_dist.mean.flatten(1) for part in images.split(BATCH_SIZE)]
    return {
        "kid": quality_features([extractor.embed(part) for part in pixels.split(BATCH_SIZE)], extractor),
        "kid_latents": torch.cat(latents) * pipeline.vae.config.scaling_factor,
    }


def _generated(exam: Exam, file: Path, description: str) -> dict[str, Tensor]:
    """Return the generated images by kind: those of an earlier judging where they are kept, so that a new measure is cheap."""
    if file.exists():
        return load_file(file)
    drawn = {kind: _draw(exam, kind, f"{description}, {kind}") for kind in exam.rows}
    save_file(drawn, file)
    return drawn


def _draw(exam: Exam, kind: str, description: str) -> Tensor:
    """Return the generated images of the captions of a kind, (captions * generated images, H, W, 3) uint8."""
    rows, generated = exam.rows[kind], GENERATED[kind]
    return draw(
        exam.pipeline,
        [exam.images.captions[row] for row in rows for _ in range(generated)],
        [derive_seed(0, "memorization benchmark", row, number) for row in rows for number in range(generated)],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        description=description,
    )


def _copies(exam: Exam, kind: str, pixels: Tensor) -> dict[str, Any]:
    found = find_copies(as_rows(pixels), as_rows(exam.images.pixels))
    return _counted(exam, kind, found.is_copy) | {"mean_ratio": round(float(found.ratio.mean()), 4)}


def _recognized(exam: Exam, kind: str, pixels: Tensor) -> dict[str, Any]:
    """Return generated images that the descriptor takes for the image of their caption, be it moved, turned or recolored."""
    own = exam.images.pixels[[row for row in exam.rows[kind] for _ in range(GENERATED[kind])]]
    likeness = (_descriptors(pixels, exam.extractor) * _descriptors(own, exam.extractor)).sum(1)
    return _counted(exam, kind, likeness >= RECOGNIZED) | {"mean_likeness": round(float(likeness.mean()), 4)}


def _counted(exam: Exam, kind: str, is_copy: Tensor) -> dict[str, Any]:
    by_caption = is_copy.view(len(exam.rows[kind]), GENERATED[kind])
    return {
        "captions": len(by_caption),
        "generated": by_caption.numel(),
        "copies": int(by_caption.sum()),
        "captions_copied": int(by_caption.any(1).sum()),
        "copies_by_caption": "".join(map(str, by_caption.sum(1).tolist())),  # a digit for each
    }


@torch.no_grad()
def _descriptors(pixels: Tensor, extractor: Extractor) -> Tensor:
    """Return the copy descriptors of images, (N, D) of length 1."""
    return torch.cat([extractor.embed(part) for part in pixels.split(BATCH_SIZE)])


def _mean(losses: Tensor) -> dict[str, float]:
    return {
        "mean": round(float(losses.mean()), 6),
        "standard_error": round(float(losses.std() / len(losses) ** 0.5), 6),
    }

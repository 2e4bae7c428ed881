"""Generated image captions with a diffusers folder, so that the same caption and seed always give the same image."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sd_memguard.audit.features.cache import Store, digest
from sd_memguard.audit.models import load_pipeline

__all__ = ["GenerationSettings", "generate_images", "generate_into", "image_key", "load_pipeline"]


class GenerationSettings(NamedTuple):
    """How images are generated; ``size`` is the edge in pixels, None the model's own."""

    num_inference_steps: int
    guidance_scale: float
    size: int | None
    batch_size: int


def generate_images(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.5,
    size: int | None = None,
    batch_size: int = 32,
    description: str = "generated_image",
) -> Tensor:
    """Return one image per caption, in order, with a progress bar.

    Each image has a generator of its own, so batch size and company change it by no more than float rounding.

    Args:
        pipeline: From ``load_pipeline``.
        captions: N prompts.
        seeds: N seeds of the initial noise.
        num_inference_steps: DDIM steps (eta 0).
        guidance_scale: Weight of classifier-free guidance; 1 or less is none.
        size: Edge in pixels; default: the model's own.
        batch_size: Images generated at a time.
        description: Text of the progress bar.

    Returns:
        (N, H, W, 3) uint8.
    """
    generated = []
    with tqdm(total=len(captions), desc=description, unit="image") as progress:
        for start in range(0, len(captions), batch_size):
            part = slice(start, start + batch_size)
            settings = GenerationSettings(num_inference_steps, guidance_scale, size, batch_size)
            generated.append(_generate_batch(pipeline, captions[part], seeds[part], settings))
            progress.update(len(generated[-1]))
    return torch.cat(generated)


@torch.no_grad()
def _generate_batch(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], seeds: Sequence[int], settings: GenerationSettings
) -> Tensor:
    """Return (B, H, W, 3) uint8."""
    images = pipeline(
        list(captions),
        height=settings.size,
        width=settings.size,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return (images.permute(0, 2, 3, 1).float().cpu() * 255).round().to(torch.uint8)


def image_key(model_sha256: str, caption: str, seed: int, settings: GenerationSettings) -> str:
    """Return the name of a generated image in the store: a hash of all that decides it."""
    return digest(
        "generated_image",
        model_sha256,
        caption,
        seed,
        settings.num_inference_steps,
        settings.guidance_scale,
        settings.size,
    )


def generate_into(
    store: Store,
    load: Callable[[], StableDiffusionPipeline],
    model_sha256: str,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: GenerationSettings,
    description: str,
) -> list[str]:
    """Generate what the cache does not hold yet, with a progress bar, and return the keys of all images as PNG files.

    Batches are cut at fixed places and kept whole or not at all, so an interrupted audit goes on with the same ones.

    Args:
        store: Where generated images are kept.
        load: Gives the pipeline; called only where something is missing.
        model_sha256: Of the model.
        captions: N prompts.
        seeds: N seeds of the initial noise.
        settings: How to generate.
        description: Text of the progress bar.
    """
    keys = [image_key(model_sha256, *pair, settings) for pair in zip(captions, seeds, strict=True)]
    size = settings.batch_size
    missing = [
        slice(start, start + size)
        for start in range(0, len(keys), size)
        if not all(store.has_file(key) for key in keys[start : start + size])
    ]
    if missing:
        pipeline = load()
        for part in tqdm(missing, desc=description, unit="batch"):
            images = _generate_batch(pipeline, captions[part], seeds[part], settings)
            for key, image in zip(keys[part], images, strict=True):
                store.keep_file(key, partial(Image.fromarray(image.numpy()).save, format="PNG"))
    return keys

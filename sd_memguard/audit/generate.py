"""Drawing captions with a diffusers folder, so that the same caption and seed always give the same picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm


def load_pipeline(folder: Path, device: torch.device | None = None) -> StableDiffusionPipeline:
    """Return the pipeline of a diffusers folder in float32 with a DDIM scheduler, ready to draw; asks no hub.

    The safety checker is left out: it blackens pictures, and a blackened copy would not be found.

    Args:
        folder: As ``save_pretrained`` writes it, in safetensors.
        device: Default: the first CUDA device, else the CPU.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(
        str(folder),
        use_safetensors=True,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    # PNDM's config need not mention clip_sample; DDIM would then clip the latents to [-1, 1] and draw garbage.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def draw(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.5,
    batch_size: int = 32,
    description: str = "drawing",
) -> Tensor:
    """Return one picture per caption, in order, with a progress bar.

    Each picture has a generator of its own, so batch size and company change it by no more than float rounding.

    Args:
        pipeline: From ``load_pipeline``.
        captions: N prompts.
        seeds: N seeds of the initial noise.
        num_inference_steps: DDIM steps (eta 0).
        guidance_scale: Weight of classifier-free guidance; 1 or less is none.
        batch_size: Pictures drawn at a time.
        description: Text of the progress bar.

    Returns:
        (N, H, W, 3) uint8.
    """
    drawn = []
    with tqdm(total=len(captions), desc=description, unit="picture") as progress:
        for start in range(0, len(captions), batch_size):
            prompts = list(captions[start : start + batch_size])
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
            pictures = pipeline(
                prompts,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="pt",
            ).images
            drawn.append((pictures.permute(0, 2, 3, 1).cpu() * 255).round().to(torch.uint8))
            progress.update(len(prompts))
    return torch.cat(drawn)

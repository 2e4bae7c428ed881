"""What a model betrays without generated images: its answer to a caption, and its loss on an image."""

from collections.abc import Sequence

import PIL.Image
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sd_memguard.core.seeding import draw_normal

DETECTION_STEPS = 2
DETECTION_SEEDS = 2
"""The first steps, and the noises, over which a caption's signal is averaged."""

LOSS_TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where an image's loss is measured, as shares of the timesteps the model was trained on."""


@torch.no_grad()
def embed_captions(pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Return the text encoder's hidden states (B, T, D)."""
    tokens = pipeline.tokenizer(
        list(captions),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return pipeline.text_encoder(tokens.input_ids.to(pipeline.device))[0]


@torch.no_grad()
def text_signal(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    seed: int,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Return how strongly each caption steers the first steps: ``|eps(x, t, caption) - eps(x, t, "")|``, averaged.

    Wen et al. 2024, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR): the Euclidean norm
    of the text-conditional minus the unconditional noise prediction, which is large where a caption leads to a
    memorized image. Averaged over the first ``DETECTION_STEPS`` DDIM steps from ``DETECTION_SEEDS`` noises, the same
    for every caption; no image is decoded. Velocity predictions are converted to noise predictions first.

    Args:
        pipeline: From ``load_pipeline``.
        captions: B prompts.
        seed: Of the noises.
        num_inference_steps: Of the schedule whose first steps are taken.
        guidance_scale: With which the steps are taken.

    Returns:
        (B,) float32.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(num_inference_steps, device=pipeline.device)
    embeddings = torch.cat(
        [embed_captions(pipeline, [""]).expand(len(captions), -1, -1), embed_captions(pipeline, captions)]
    )
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noises = draw_normal(seed, "detection", [(number,) for number in range(DETECTION_SEEDS)], shape)
    timesteps = scheduler.timesteps[:DETECTION_STEPS]
    total = torch.zeros(len(captions))
    for noise in noises.to(pipeline.device):
        latents = noise.expand(len(captions), *shape) * scheduler.init_noise_sigma
        for timestep in timesteps:
            both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            without, conditioned = unet(both, timestep, encoder_hidden_states=embeddings).sample.chunk(2)
            difference = conditioned - without
            total += (_noise_scale(scheduler, timestep) * difference.flatten(1).norm(dim=1)).cpu()
            latents = scheduler.step(without + guidance_scale * difference, timestep, latents).prev_sample
    return total / (DETECTION_SEEDS * len(timesteps))


def _noise_scale(scheduler: DDIMScheduler, timestep: Tensor) -> float:
    """Return what turns a difference of predictions into a difference of noises: with v = a eps - s x it is a."""
    if scheduler.config.prediction_type == "v_prediction":
        return float(scheduler.alphas_cumprod[int(timestep)] ** 0.5)
    return 1.0


@torch.no_grad()
def denoising_losses(
    pipeline: StableDiffusionPipeline, images: Sequence[PIL.Image.Image], captions: Sequence[str], seed: int
) -> Tensor:
    """Return the training loss of each captioned image, averaged over fixed timesteps with fixed noise.

    The loss-threshold attack (Yeom et al. 2018, arXiv 1709.01604; for diffusion models Carlini et al. 2023, arXiv
    2301.13188, section 5.2): what was trained on has the lower loss. Every image meets the same noise at the same
    timesteps, so that only the image makes the difference. The latents are the mode of the encoder's distribution.

    Args:
        pipeline: From ``load_pipeline``.
        images: B images in RGB, cropped at the center to the model's size.
        captions: One for each.
        seed: Of the noises.

    Returns:
        (B,) float32.
    """
    unet, scheduler, vae = pipeline.unet, pipeline.scheduler, pipeline.vae
    edge = unet.config.sample_size * pipeline.vae_scale_factor
    fitted = [ImageOps.fit(image, (edge, edge), Image.Resampling.LANCZOS) for image in images]
    pixels = torch.stack([pil_to_tensor(image) for image in fitted]).to(pipeline.device).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    embeddings = embed_captions(pipeline, captions)
    noises = draw_normal(seed, "membership", [(number,) for number in range(len(LOSS_TIMESTEPS))], latents.shape[1:])
    total = torch.zeros(len(latents))
    timesteps = [int(share * scheduler.config.num_train_timesteps) for share in LOSS_TIMESTEPS]
    for timestep, noise in zip(timesteps, noises.to(pipeline.device), strict=True):
        noise = noise.expand_as(latents)
        steps = torch.full((len(latents),), timestep, device=pipeline.device)
        noisy = scheduler.add_noise(latents, noise, steps)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, steps)
        predicted = unet(noisy, steps, encoder_hidden_states=embeddings).sample
        total += (predicted - target).square().flatten(1).mean(1).cpu()
    return total / len(noises)

"""What a model betrays without generated images: its answer to a caption, and its loss on an image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sd_memguard.core.seeding import draw_normal

DETECTION_STEPS = 2
DETECTION_SEEDS = 2
"""The first steps, and the noises, over which a caption's signal is averaged."""

LOSS_TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where an image's loss is measured, as shares of the timesteps the model was trained on."""


class NotMeasurableError(Exception):
    """The model is of a kind that a measure is not defined for, or not written for; the text says which, and why."""


class Conditioning(NamedTuple):
    """What a UNet is given beside latents and timestep, for B prompts with or without their unconditional rows."""

    states: Tensor
    added: dict[str, Tensor] | None

    def arguments(self) -> dict[str, Any]:
        """As keywords of the UNet."""
        return {"encoder_hidden_states": self.states, "added_cond_kwargs": self.added}


@torch.no_grad()
def encode_captions(pipeline: Any, captions: Sequence[str], *, guided: bool) -> Conditioning:
    """Return what the pipeline itself gives its UNet for these prompts.

    Args:
        pipeline: A Stable Diffusion or Stable Diffusion XL pipeline.
        captions: B prompts.
        guided: Put the B unconditional rows in front.

    Raises:
        NotMeasurableError: It has another denoiser, or one that was distilled to few steps.
    """
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
        raise NotMeasurableError(f"{type(pipeline).__name__} has neither a UNet with text nor a known transformer")
    if not isinstance(pipeline.scheduler, DDIMScheduler):
        raise NotMeasurableError(f"its scheduler, {type(pipeline.scheduler).__name__}, has no DDIM steps")
    options = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    encoded = pipeline.encode_prompt(list(captions), **options)
    states = torch.cat([encoded[1], encoded[0]]) if guided else encoded[0]
    kind = pipeline.unet.config.addition_embed_type
    if kind is None and len(encoded) == 2:
        return Conditioning(states, None)
    if kind != "text_time" or len(encoded) != 4:
        raise NotMeasurableError(f"the UNet of {type(pipeline).__name__} asks for more than a prompt")
    pooled = torch.cat([encoded[3], encoded[2]]) if guided else encoded[2]
    edge = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    # Sizes before and after cropping, as the pipeline gives them by default: nothing is cropped.
    sizes = torch.tensor([edge, edge, 0, 0, edge, edge], dtype=states.dtype, device=states.device)
    return Conditioning(states, {"text_embeds": pooled, "time_ids": sizes.expand(len(states), -1)})


@torch.no_grad()
def text_signal(
    pipeline: Any,
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
    conditioning = encode_captions(pipeline, captions, guided=True)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noises = draw_normal(seed, "detection", [(number,) for number in range(DETECTION_SEEDS)], shape)
    timesteps = scheduler.timesteps[:DETECTION_STEPS]
    total = torch.zeros(len(captions))
    for noise in noises.to(pipeline.device, unet.dtype):
        latents = noise.expand(len(captions), *shape) * scheduler.init_noise_sigma
        for timestep in timesteps:
            both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            without, conditioned = unet(both, timestep, **conditioning.arguments()).sample.chunk(2)
            difference = conditioned - without
            total += (noise_scale(scheduler, timestep) * difference.float().flatten(1).norm(dim=1)).cpu()
            latents = scheduler.step(without + guidance_scale * difference, timestep, latents).prev_sample
    return total / (DETECTION_SEEDS * len(timesteps))


def noise_scale(scheduler: DDIMScheduler, timestep: Tensor) -> float:
    """Return what turns a difference of predictions into a difference of noises: with v = a eps - s x it is a."""
    if scheduler.config.prediction_type == "v_prediction":
        return float(scheduler.alphas_cumprod[int(timestep)] ** 0.5)
    return 1.0


@torch.no_grad()
def encode_images(pipeline: Any, images: Sequence[PIL.Image.Image]) -> Tensor:
    """Return the latents of images, cropped at the center to the model's size: the mode of the encoder's distribution.

    Returns:
        (B, C, H, W), as the denoiser sees them.
    """
    vae, edge = pipeline.vae, model_edge(pipeline)
    fitted = [ImageOps.fit(image, (edge, edge), Image.Resampling.LANCZOS) for image in images]
    pixels = torch.stack([pil_to_tensor(image) for image in fitted]).to(pipeline.device, vae.dtype) / 127.5 - 1
    return (vae.encode(pixels).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def model_edge(pipeline: Any) -> int:
    """Return the edge in pixels of the images that a pipeline generates by itself."""
    if (unet := getattr(pipeline, "unet", None)) is not None:
        return int(unet.config.sample_size * pipeline.vae_scale_factor)
    return int(pipeline.default_sample_size * pipeline.vae_scale_factor)


def training_target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Return what the UNet was trained to predict: the noise, or the velocity."""
    if scheduler.config.prediction_type == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, steps)
        return velocity
    return noise


@torch.no_grad()
def denoising_losses(pipeline: Any, images: Sequence[PIL.Image.Image], captions: Sequence[str], seed: int) -> Tensor:
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
    conditioning = encode_captions(pipeline, captions, guided=False)
    unet, scheduler, latents = pipeline.unet, pipeline.scheduler, encode_images(pipeline, images)
    noises = draw_normal(seed, "membership", [(number,) for number in range(len(LOSS_TIMESTEPS))], latents.shape[1:])
    total = torch.zeros(len(latents))
    timesteps = [int(share * scheduler.config.num_train_timesteps) for share in LOSS_TIMESTEPS]
    for timestep, noise in zip(timesteps, noises.to(latents), strict=True):
        noise = noise.expand_as(latents)
        steps = torch.full((len(latents),), timestep, device=pipeline.device)
        noisy = scheduler.add_noise(latents, noise, steps)
        target = training_target(scheduler, latents, noise, steps)
        predicted = unet(noisy, steps, **conditioning.arguments()).sample
        total += (predicted - target).float().square().flatten(1).mean(1).cpu()
    return total / len(noises)

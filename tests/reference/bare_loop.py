"""Plain fine-tuning of the UNet written out: torch's AdamW, diffusers' `add_noise`, no shards, no guard."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from sd_memguard.core.seeding import generator_for, permutation

Captioned = Sequence[tuple[Path, str]]


def bare_loop(
    pipeline: Path,
    images: Captioned,
    steps: int,
    batch_size: int,
    learning_rate: float,
    epsilon: float,
    seed: int,
    class_images: Captioned = (),
    class_seed: int = 0,
    prior_loss_weight: float = 0.0,
    visits: Sequence[tuple[int, int]] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the weights after some steps on images that need neither resizing nor cropping.

    With class images the loss is DreamBooth's: the mean over the batch, plus the weighted mean over as many of those.
    ``visits`` are the epoch and the number of each image to take, in order; by default whole epochs.
    """
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").train()
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae").eval()
    text_encoder = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, eps=epsilon, weight_decay=1e-2)

    def whole_epochs(captioned: Captioned, seed: int) -> list[tuple[int, int]]:
        return [
            (passed, sample)
            for passed in range(-(-steps * batch_size // len(captioned)))
            for sample in permutation(seed, "order", 0, passed, length=len(captioned)).tolist()
        ]

    def mean_loss(captioned: Captioned, visits: Sequence[tuple[int, int]], seed: int, step: int) -> torch.Tensor:
        loss = torch.zeros(())
        for passed, sample in visits[step * batch_size : (step + 1) * batch_size]:
            file, caption = captioned[sample]

            def draw(purpose: str, passed: int = passed, sample: int = sample) -> torch.Generator:
                return generator_for(seed, purpose, 0, passed, sample)

            image = Image.open(file)
            pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(image.height, image.width, 3)
            tokens = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                code = vae.encode((pixels.permute(2, 0, 1) / 127.5 - 1)[None]).latent_dist
                embedding = text_encoder(tokens)[0]
            latent = code.mean + code.std * torch.randn(code.mean.shape[1:], generator=draw("latent"))
            latent = latent * vae.config.scaling_factor
            noise = torch.randn(latent.shape[1:], generator=draw("noise"))[None]
            timestep = torch.randint(scheduler.config.num_train_timesteps, (), generator=draw("timestep"))[None]
            prediction = unet(scheduler.add_noise(latent, noise, timestep), timestep, embedding).sample
            loss = loss + (prediction - noise).square().mean() / batch_size
        return loss

    visits = whole_epochs(images, seed) if visits is None else visits
    class_visits = whole_epochs(class_images, class_seed) if class_images else []
    for step in range(steps):
        loss = mean_loss(images, visits, seed, step)
        if class_images:
            loss = loss + prior_loss_weight * mean_loss(class_images, class_visits, class_seed, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in unet.state_dict().items()}

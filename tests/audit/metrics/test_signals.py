from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from sd_memguard.assets import demo_data_path, tiny_sd_path
from sd_memguard.audit.generate import load_pipeline
from sd_memguard.audit.metrics.signals import (
    DETECTION_SEEDS,
    DETECTION_STEPS,
    LOSS_TIMESTEPS,
    denoising_losses,
    text_signal,
)
from sd_memguard.core.seeding import generator_for

CAPTIONS = ["grinning face", "red apple", "crescent moon"]


@pytest.fixture(params=["epsilon", "v_prediction"])
def pipeline(request):
    pipeline = load_pipeline(tiny_sd_path(), torch.device("cpu"))
    pipeline.scheduler.register_to_config(prediction_type=request.param)
    return pipeline


def embed(pipeline, caption):
    tokens = pipeline.tokenizer(caption, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids)[0]


@torch.no_grad()
def test_text_signal_equals_noise_predictions_along_ddim_by_hand(pipeline):
    """One caption at a time, every prediction turned to a noise and every DDIM step written out."""
    alphas = pipeline.scheduler.alphas_cumprod
    is_velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.scheduler.set_timesteps(10)
    timesteps = pipeline.scheduler.timesteps.tolist()
    expected = []
    for caption in CAPTIONS:
        norms = []
        for number in range(DETECTION_SEEDS):
            x = torch.randn(1, 4, 16, 16, generator=generator_for(3, "detection", number))
            for t, following in islice(pairwise(timesteps), DETECTION_STEPS):
                a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
                noises = []
                for text in ("", caption):
                    predicted = pipeline.unet(x, t, encoder_hidden_states=embed(pipeline, text)).sample
                    noises.append(a * predicted + s * x if is_velocity else predicted)
                norms.append((noises[1] - noises[0]).square().sum().sqrt().item())
                noise = noises[0] + 2.5 * (noises[1] - noises[0])
                clean = (x - s * noise) / a
                x = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * noise
        expected.append(sum(norms) / len(norms))
    found = text_signal(pipeline, CAPTIONS, 3, num_inference_steps=10, guidance_scale=2.5)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert len({round(value, 2) for value in expected}) == 3


def test_the_empty_caption_gives_no_signal(pipeline):
    assert text_signal(pipeline, [""], 0, num_inference_steps=5, guidance_scale=2).item() == pytest.approx(0, abs=1e-4)


@torch.no_grad()
def test_losses_equal_squared_errors_one_by_one(pipeline):
    files = ["0003.png", "0007.png"]
    images = [Image.open(demo_data_path() / file).convert("RGB") for file in files]
    alphas = pipeline.scheduler.alphas_cumprod
    expected = []
    for image, caption in zip(images, CAPTIONS, strict=False):
        pixels = torch.tensor(np.asarray(image), dtype=torch.float32)[None].permute(0, 3, 1, 2)
        latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
        errors = []
        for number, share in enumerate(LOSS_TIMESTEPS):
            noise = torch.randn(latents.shape[1:], generator=generator_for(5, "membership", number))[None]
            a, s = alphas[int(1000 * share)].sqrt(), (1 - alphas[int(1000 * share)]).sqrt()
            target = a * noise - s * latents if pipeline.scheduler.config.prediction_type == "v_prediction" else noise
            hidden = embed(pipeline, caption)
            predicted = pipeline.unet(a * latents + s * noise, int(1000 * share), encoder_hidden_states=hidden).sample
            errors.append((predicted - target).square().mean().item())
        expected.append(sum(errors) / len(errors))
    assert denoising_losses(pipeline, images, CAPTIONS[:2], 5).tolist() == pytest.approx(expected, rel=1e-3)

"""The frozen networks of the pipeline: the VAE that makes latents, the text encoder that makes embeddings."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from sd_memguard.core.async_copy import to_device
from sd_memguard.models.pipeline import Models


class Encoders:
    """The frozen VAE and text encoder.

    Args:
        models: the pipeline's parts.
        device: where they run.
        dtype: their precision, and that of what they return.
    """

    def __init__(self, models: Models, device: torch.device, dtype: torch.dtype) -> None:
        self.vae, self.text_encoder = models.vae.to(device), models.text_encoder.to(device)
        if dtype != torch.float32:
            self.vae.to(dtype)
            self.text_encoder.to(dtype)
        self.tokenizer, self.device, self.dtype = models.tokenizer, device, dtype

    def release(self, *, vae: bool, text_encoder: bool) -> None:
        """Move networks that nothing needs any more off the device."""
        for network, leaves in ((self.vae, vae), (self.text_encoder, text_encoder)):
            if leaves:
                network.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return the VAE's mean and log variance of images (B, 3, H, W), (B, 2C, h, w)."""
        moments: Tensor = self.vae.encode(to_device(pixels, self.device).to(self.dtype)).latent_dist.parameters
        return moments

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents sampled with the given noise (B, C, h, w), the mean without."""
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean if noise is None else distribution.mean + distribution.std * noise
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def embeddings(self, captions: list[str]) -> Tensor:
        """Return the text embeddings of captions, (B, tokens, width)."""
        tokens = self.tokenizer(
            captions,
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        hidden: Tensor = self.text_encoder(to_device(tokens.input_ids, self.device), return_dict=False)[0]
        return hidden

    @property
    def moments_shape(self) -> tuple[int, int]:
        """Channels of the moments, and by how much the VAE shrinks an image's side."""
        config = self.vae.config
        return 2 * config.latent_channels, 2 ** (len(config.block_out_channels) - 1)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Tokens and width of an embedding."""
        config: Any = self.text_encoder.config
        return self.tokenizer.model_max_length, config.hidden_size


def fingerprint(network: nn.Module) -> str:
    """Return a hash of a network's weights and config, the same wherever it was loaded from."""
    config: Any = network.config
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {name: value for name, value in settings.items() if not name.startswith("_")}
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of all that a tokenizer would write to its folder."""
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()

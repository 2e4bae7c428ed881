"""The frozen networks of the pipeline: the VAE that makes latents, the text encoders that make embeddings."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from sd_memguard.core.async_copy import to_device
from sd_memguard.models.kinds import Condition
from sd_memguard.models.pipeline import Models


class Encoders:
    """The frozen VAE and text encoders.

    Args:
        models: the pipeline's parts.
        device: where they run.
        dtype: their precision, and that of what they return; the VAE's may be higher, see ``StableDiffusionXL``.
    """

    def __init__(self, models: Models, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.vae, self.text = models.kind, models.vae.to(device), models.text
        self.vae_dtype = self.kind.vae_dtype(self.vae, dtype)
        if self.vae_dtype != torch.float32:
            self.vae.to(self.vae_dtype)
        for network in self.text.encoders.values():
            network.to(device)
            if dtype != torch.float32:
                network.to(dtype)
        self.device, self.dtype = device, dtype

    def release(self, *, vae: bool, text_encoders: bool) -> None:
        """Move networks that nothing needs any more off the device."""
        leaving = [*([self.vae] if vae else []), *(self.text.encoders.values() if text_encoders else [])]
        for network in leaving:
            network.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return the VAE's mean and log variance of images (B, 3, H, W), (B, 2C, h, w)."""
        moments: Tensor = self.vae.encode(to_device(pixels, self.device).to(self.vae_dtype)).latent_dist.parameters
        return moments

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents sampled with the given noise (B, C, h, w), the mean without."""
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean if noise is None else distribution.mean + distribution.std * noise
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    def embeddings(self, captions: list[str]) -> Tensor:
        """Return what the text encoders make of captions, a row for each, (B, *embedding_shape)."""
        return self.kind.encode(self.text, captions, self.device)

    def condition(self, rows: Tensor, sizes: Tensor | None) -> Condition:
        """Return what the UNet takes, of rows from ``embeddings`` and the sizes of images, see ``NUM_SIZES``."""
        return self.kind.condition(self.text, rows, sizes)

    @property
    def moments_shape(self) -> tuple[int, int]:
        """Channels of the moments, and by how much the VAE shrinks an image's side."""
        config = self.vae.config
        return 2 * config.latent_channels, 2 ** (len(config.block_out_channels) - 1)

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of a caption's row."""
        return self.kind.row_shape(self.text)


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

"""Networks of a few thousand random weights, for pipelines of 32 px."""

from typing import Any

import diffusers
from transformers import CLIPTokenizer

from sd_memguard import assets


def tiny_unet(**settings: Any) -> diffusers.UNet2DConditionModel:
    """Return a UNet of latents of 8 x 8."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **settings,
    )


def tiny_vae(**settings: Any) -> diffusers.AutoencoderKL:
    """Return a VAE that makes latents of a quarter of the resolution."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        **settings,
    )


def tokenizer(**settings: Any) -> CLIPTokenizer:
    """Return the tokenizer of the bundled model."""
    return CLIPTokenizer.from_pretrained(assets.tiny_sd_path() / "tokenizer", **settings)

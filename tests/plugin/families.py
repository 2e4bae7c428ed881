"""Tiny random denoisers of each family, and inputs for them as diffusers' training scripts make them."""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import pytest
import torch
from torch import Tensor, nn

CHANNELS, SIZE, TOKENS = 4, 8, 5


@dataclass(frozen=True)
class Family:
    """How a family's script calls its denoiser.

    Attributes:
        cls: name of the class in diffusers.
        settings: of a tiny one.
        arguments: (inputs (B, C, H, W), sigmas (B,), generator) -> what the denoiser is called with.
        read: output -> prediction (B, C, H, W).
        bins: sigmas (B,) -> the bins expected.
    """

    cls: str
    settings: dict
    arguments: Callable[[Tensor, Tensor, torch.Generator], dict]
    read: Callable = lambda output: output[0]
    bins: Callable[[Tensor], Tensor] = lambda sigmas: (sigmas * 1000 + 1e-3).long()
    channels: int = CHANNELS

    def make(self) -> nn.Module:
        cls = getattr(diffusers, self.cls, None)
        if cls is None:
            pytest.skip(f"this diffusers has no {self.cls}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls(**self.settings)
            with torch.no_grad():  # last layers start at zero, which hides what is behind them
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.train()


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def pack(images: Tensor) -> Tensor:
    b, c, h, w = images.shape
    return images.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(output: tuple) -> Tensor:
    b, tokens, c = output[0].shape
    side = int(tokens**0.5)
    return output[0].view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * side, 2 * side)


def image_ids(axes: int) -> Tensor:
    side = SIZE // 2
    ids = torch.zeros(side, side, axes)
    ids[..., -2], ids[..., -1] = torch.arange(side)[:, None], torch.arange(side)[None, :]
    return ids.view(-1, axes)


FAMILIES = {
    "SD": Family(
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        lambda x, sigmas, g: {
            "sample": x,
            "timestep": (sigmas * 1000 + 1e-3).long(),
            "encoder_hidden_states": normal(g, len(x), TOKENS, 8),
            "return_dict": False,
        },
    ),
    "SDXL": Family(
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32,
        },
        lambda x, sigmas, g: {
            "sample": x,
            "timestep": (sigmas * 1000 + 1e-3).long(),
            "encoder_hidden_states": normal(g, len(x), TOKENS, 8),
            "added_cond_kwargs": {"text_embeds": normal(g, len(x), 8), "time_ids": torch.ones(len(x), 6)},
        },
        read=lambda output: output.sample,
    ),
    "SD3": Family(
        "SD3Transformer2DModel",
        {
            "sample_size": SIZE,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        lambda x, sigmas, g: {
            "hidden_states": x,
            "timestep": sigmas * 1000,
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            "pooled_projections": normal(g, len(x), 16),
            "return_dict": False,
        },
    ),
    "Flux": Family(
        "FluxTransformer2DModel",
        {
            "in_channels": 4 * CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda x, sigmas, g: {
            "hidden_states": pack(x),
            "timestep": sigmas,
            "guidance": torch.full((len(x),), 3.5),
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            "pooled_projections": normal(g, len(x), 16),
            "txt_ids": torch.zeros(TOKENS, 3),
            "img_ids": image_ids(3),
            "return_dict": False,
        },
        read=unpack,
    ),
    "Flux.2": Family(
        "Flux2Transformer2DModel",
        {
            "in_channels": 4 * CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda x, sigmas, g: {
            "hidden_states": pack(x),
            "timestep": sigmas,
            "guidance": torch.full((len(x),), 3.5),
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            "txt_ids": torch.zeros(len(x), TOKENS, 4),
            "img_ids": image_ids(4).expand(len(x), -1, -1),
            "return_dict": False,
        },
        read=unpack,
    ),
    "Z-Image": Family(
        "ZImageTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32],
        },
        lambda x, sigmas, g: {
            "x": list(x.unsqueeze(2).unbind()),
            "t": 1 - sigmas,
            "cap_feats": list(normal(g, len(x), TOKENS, 16).unbind()),
            "return_dict": False,
        },
        read=lambda output: -torch.stack(output[0]).squeeze(2),
        bins=lambda sigmas: ((1 - sigmas) * 1000 + 1e-3).long(),
    ),
    "Qwen-Image": Family(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 4 * CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda x, sigmas, g: {
            "hidden_states": pack(x),
            "timestep": sigmas,
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            "encoder_hidden_states_mask": torch.ones(len(x), TOKENS, dtype=torch.int64),
            "img_shapes": [[(1, SIZE // 2, SIZE // 2)]] * len(x),
            "return_dict": False,
        },
        read=unpack,
    ),
    "Sana": Family(
        "SanaTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": SIZE,
        },
        lambda x, sigmas, g: {
            "hidden_states": x,
            "timestep": sigmas * 1000,
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            "encoder_attention_mask": torch.ones(len(x), TOKENS),
            "return_dict": False,
        },
    ),
    "Lumina2": Family(
        "Lumina2Transformer2DModel",
        {
            "sample_size": SIZE,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "hidden_size": 32,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 16,
        },
        lambda x, sigmas, g: {
            "hidden_states": x,
            "timestep": 1 - sigmas,
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            "encoder_attention_mask": torch.ones(len(x), TOKENS, dtype=torch.bool),
            "return_dict": False,
        },
        bins=lambda sigmas: ((1 - sigmas) * 1000 + 1e-3).long(),
    ),
    "HiDream": Family(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": [0, 0],
            "force_inference_output": True,
        },
        lambda x, sigmas, g: {
            "hidden_states": x,
            "timesteps": sigmas * 1000,
            "encoder_hidden_states_t5": normal(g, len(x), TOKENS, 16),
            "encoder_hidden_states_llama3": normal(g, 1, len(x), TOKENS, 16),
            "pooled_embeds": normal(g, len(x), 16),
            "return_dict": False,
        },
        read=lambda output: output[0] * -1,
    ),
    "CogView4": Family(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": SIZE,
            "rope_axes_dim": (8, 8),
        },
        lambda x, sigmas, g: {
            "hidden_states": x,
            "timestep": sigmas * 1000,
            "encoder_hidden_states": normal(g, len(x), TOKENS, 16),
            **{name: torch.full((len(x), 2), 8.0) for name in ("original_size", "target_size", "crop_coords")},
            "return_dict": False,
        },
    ),
}

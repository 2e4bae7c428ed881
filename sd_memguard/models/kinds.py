"""The kinds of pipelines that can be fine-tuned: all that differs between Stable Diffusion 1.x/2.x and SDXL.

A kind is recognized by the class that a pipeline's ``model_index.json`` names. It says which parts there are, makes
one row of numbers of a caption (what is kept in caches), and makes of such rows and of sizes what the UNet takes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sd_memguard.core.async_copy import to_device

NUM_SIZES = 6
"""Numbers of the size condition of SDXL: height and width before resizing, top and left edge of the crop, height and
width of the crop (https://arxiv.org/abs/2307.01952, section 2.2)."""


class Condition(NamedTuple):
    """What a UNet takes besides latents and timesteps, (B, ...) each.

    Attributes:
        embeddings: (B, tokens, width) of the captions.
        added: ``added_cond_kwargs`` of the UNet, None where it has none.
    """

    embeddings: Tensor
    added: Mapping[str, Tensor] | None = None


class TextParts(NamedTuple):
    """The frozen text encoders and their tokenizers, by the names of the pipeline's parts."""

    encoders: dict[str, Any]
    tokenizers: dict[str, Any]


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder, whose last hidden state the UNet takes."""

    name = "sd"
    title = "Stable Diffusion"
    tag = "stable-diffusion"
    pipeline: Any = StableDiffusionPipeline
    text_encoders: Mapping[str, Any] = {"text_encoder": CLIPTextModel}
    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer"}
    loading: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    """Arguments of ``from_pretrained`` without which generated images are altered."""
    kohya_has_original_names = False
    """Whether kohya's LoRA files name layers as the original code does, not as diffusers."""
    kohya_metadata: Mapping[str, str] = {}
    takes_sizes = False
    """Whether the UNet is told the sizes of an image and of its crop."""

    @property
    def networks(self) -> tuple[str, ...]:
        """The parts of a pipeline that have weights of their own to generate with."""
        return ("unet", "vae", *self.text_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that decide what a pipeline generates."""
        return (*self.networks, *self.tokenizers.values(), "scheduler")

    def vae_dtype(self, vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
        """Return the precision in which the VAE encodes, where that of frozen networks is ``dtype``."""
        del vae
        return dtype

    def refusal(self, unet: Mapping[str, Any]) -> str | None:
        """Return why a UNet of this config cannot be trained, None where it can."""
        del unet
        return None

    @torch.no_grad()
    def encode(self, text: TextParts, captions: Sequence[str], device: torch.device) -> Tensor:
        """Return a row for each caption, (B, *row_shape)."""
        (hidden,) = (output[0] for output in _run_encoders(text, captions, device, return_dict=False))
        rows: Tensor = hidden
        return rows

    def row_shape(self, text: TextParts) -> tuple[int, ...]:
        """Return the shape of a caption's row."""
        return text.tokenizers["text_encoder"].model_max_length, text.encoders["text_encoder"].config.hidden_size

    def condition(self, text: TextParts, rows: Tensor, sizes: Tensor | None = None) -> Condition:
        """Return what the UNet takes.

        Args:
            text: what the rows were made with.
            rows: (B, *row_shape) from ``encode``.
            sizes: (B, 6), see ``NUM_SIZES``; only where ``takes_sizes``.
        """
        del text, sizes
        return Condition(rows)

    def blank(self, unet: UNet2DConditionModel, batch_size: int, num_tokens: int, device: torch.device) -> Condition:
        """Return zeros in the shapes of a condition."""
        return Condition(torch.zeros(batch_size, num_tokens, unet.config.cross_attention_dim, device=device))


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, whose last hidden state but one the UNet takes, the pooled second one, and sizes."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    tag = "stable-diffusion-xl"
    pipeline = StableDiffusionXLPipeline
    text_encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}  # noqa: RUF012
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # noqa: RUF012
    loading = {"add_watermarker": False}  # noqa: RUF012
    kohya_has_original_names = True
    kohya_metadata = {"ss_base_model_version": "sdxl_base_v1-0"}  # noqa: RUF012
    takes_sizes = True

    def vae_dtype(self, vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
        """Return float32 where the VAE's config asks for it: the activations of SDXL's own overflow in fp16."""
        return torch.float32 if vae.config.force_upcast else dtype

    def refusal(self, unet: Mapping[str, Any]) -> str | None:
        """Return what speaks against a UNet that takes other conditions than text and sizes."""
        kind = unet.get("addition_embed_type")
        return None if kind == "text_time" else f"its UNet is conditioned on `{kind}`, that of SDXL on `text_time`"

    @torch.no_grad()
    def encode(self, text: TextParts, captions: Sequence[str], device: torch.device) -> Tensor:
        """Return a row for each caption: the embeddings of both encoders side by side, flat, then the pooled one."""
        outputs = _run_encoders(text, captions, device, output_hidden_states=True)
        embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return torch.cat([embeddings.flatten(1), outputs[-1].text_embeds], dim=1)

    def row_shape(self, text: TextParts) -> tuple[int, ...]:
        """Return the length of a caption's row."""
        num_tokens, width = self._embedding_shape(text)
        return (num_tokens * width + text.encoders["text_encoder_2"].config.projection_dim,)

    def condition(self, text: TextParts, rows: Tensor, sizes: Tensor | None = None) -> Condition:
        """Return what the UNet takes, see ``StableDiffusion.condition``."""
        assert sizes is not None
        num_tokens, width = self._embedding_shape(text)
        embeddings, pooled = rows.split([num_tokens * width, rows.shape[1] - num_tokens * width], dim=1)
        sizes = to_device(sizes, rows.device).to(rows.dtype)
        return Condition(embeddings.unflatten(1, (num_tokens, width)), {"text_embeds": pooled, "time_ids": sizes})

    def blank(self, unet: UNet2DConditionModel, batch_size: int, num_tokens: int, device: torch.device) -> Condition:
        """Return zeros in the shapes of a condition."""
        config = unet.config
        width = config.projection_class_embeddings_input_dim - NUM_SIZES * config.addition_time_embed_dim
        added = {"text_embeds": width, "time_ids": NUM_SIZES}
        embeddings = super().blank(unet, batch_size, num_tokens, device).embeddings
        return Condition(
            embeddings, {name: torch.zeros(batch_size, size, device=device) for name, size in added.items()}
        )

    def _embedding_shape(self, text: TextParts) -> tuple[int, int]:
        num_tokens: int = text.tokenizers["text_encoder"].model_max_length
        return num_tokens, sum(encoder.config.hidden_size for encoder in text.encoders.values())


KINDS: dict[str, StableDiffusion] = {kind.pipeline.__name__: kind for kind in (StableDiffusion(), StableDiffusionXL())}
"""The kinds by the name of their pipeline's class."""


def kind_named(name: str | None) -> StableDiffusion:
    """Return the kind that is called ``sd`` or ``sdxl``."""
    return next(kind for kind in KINDS.values() if kind.name == name)


def _run_encoders(text: TextParts, captions: Sequence[str], device: torch.device, **options: bool) -> list[Any]:
    """Return what each text encoder makes of the captions, cut or padded to the length it was trained on."""
    outputs = []
    for part, encoder in text.encoders.items():
        tokenizer = text.tokenizers[part]
        tokens = tokenizer(
            list(captions),
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        outputs.append(encoder(to_device(tokens.input_ids, device), **options))
    return outputs

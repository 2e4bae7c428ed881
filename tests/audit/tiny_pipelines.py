"""Random pipelines of other kinds than Stable Diffusion 1, of some ten thousand weights, for 32 px."""

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.tiny_models import tiny_unet, tiny_vae, tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPTextConfig(**SIZES, projection_dim=32, max_position_embeddings=16, eos_token_id=49407)


def make_sdxl():
    unet = tiny_unet(
        cross_attention_dim=64,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13),
        text_encoder=CLIPTextModel(CLIP),
        text_encoder_2=CLIPTextModelWithProjection(CLIP),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )


def make_sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(CLIP),
        text_encoder_2=CLIPTextModelWithProjection(CLIP),
        text_encoder_3=None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=None,
    )


def make_flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "apple": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    t5 = T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModel(CLIP),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
        ),
    )


def make_pixart():
    """A kind that predicts noise with a transformer, of which no loss is known here."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    flux = make_flux()
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        vae=tiny_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=flux.text_encoder_2,
        tokenizer=flux.tokenizer_2,
    )


KINDS = {"sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux, "pixart": make_pixart}


def load(kind, folder):
    """Read a pipeline by diffusers alone."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **absent)


def save(kind, folder):
    """Write a pipeline of a kind, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = KINDS[kind]()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.parameters():  # last layers start at zero, which hides what is behind them
                    parameter.data.add_(torch.randn_like(parameter) * 0.05)
    pipeline.save_pretrained(folder)
    return folder

"""Pipelines of each family with few parameters and random weights, for running the training scripts of others.

Sizes are about those of diffusers' own tests. Tokenizers know single characters, so nothing comes from a hub.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing

from sd_memguard import assets

NUM_TIMESTEPS = 50
"""Few, so that the memory bank has seen enough of each for decisions after a few steps."""
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(name: str, folder: Path) -> None:
    """Write the pipeline of a family.

    Raises:
        KeyError: there is none of that name.
    """
    torch.manual_seed(0)
    MAKERS[name](folder)


# Tokenizers and text encoders.


def _clip_tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(assets.tiny_sd_path() / "tokenizer")


def _t5_tokenizer(folder: Path, kind: str = "T5TokenizerFast") -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0), *((c, -3.0) for c in letters)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": kind, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"extra_ids": 0, "model_max_length": 512, "bos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


def _qwen_tokenizer(folder: Path) -> Any:
    vocabulary = {piece: i for i, piece in enumerate((*sorted(ByteLevel.alphabet()), *QWEN_TOKENS))}
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 1024, "chat_template": CHAT}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return transformers.Qwen2Tokenizer.from_pretrained(folder)


def _clip_text(cls: type, **sizes: int) -> Any:
    config = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"max_position_embeddings": 77, "eos_token_id": 49407, "vocab_size": 49408, "projection_dim": 32}
    return cls(transformers.CLIPTextConfig(**config | sizes))


def _t5_text() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2, vocab_size=128)
    )


def _qwen3_config(hidden: int, *, num_layers: int = 2) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": 2}
    sizes["num_hidden_layers"] = num_layers
    return transformers.Qwen3Config(**sizes, num_key_value_heads=2, vocab_size=300, max_position_embeddings=1024)


def _vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        sample_size=32,
    )


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(NUM_TIMESTEPS)


# Families.


def _sd(folder: Path) -> None:
    """Write the bundled pipeline with a short noise schedule."""
    shutil.copytree(assets.tiny_sd_path(), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "num_train_timesteps": NUM_TIMESTEPS}), encoding="utf-8")


def _tiny_sdxl(folder: Path) -> None:
    """Write a pipeline of SDXL's parts and shapes, but small, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_hidden_layers": 2}
    text = transformers.CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=77, eos_token_id=49407)
    tokenizer = _clip_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        sample_size=64,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.DDPMScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
        ),
    ).save_pretrained(folder)


def _edm_sdxl(folder: Path) -> None:
    _tiny_sdxl(folder)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    pipeline.save_pretrained(folder)


def _sd3(folder: Path, *, joint_dim: int = 32, pooled_dim: int = 64) -> None:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=joint_dim,
        pooled_projection_dim=pooled_dim,
        out_channels=4,
    )
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=_vae(4),
        text_encoder=_clip_text(transformers.CLIPTextModelWithProjection),
        text_encoder_2=_clip_text(transformers.CLIPTextModelWithProjection),
        text_encoder_3=_t5_text(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(folder / "tokenizer_3"),
    ).save_pretrained(folder)


def _sd3_wide(folder: Path) -> None:
    """Write SD3 for embeddings of the widths of the real one."""
    _sd3(folder, joint_dim=4096, pooled_dim=2048)


def _flux(folder: Path, cls: type = diffusers.FluxPipeline, *, joint_dim: int = 32, pooled_dim: int = 32) -> None:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint_dim,
        pooled_projection_dim=pooled_dim,
        axes_dims_rope=[4, 4, 8],
    )
    cls(
        transformer=transformer,
        scheduler=_flow(),
        vae=_vae(4),
        text_encoder=_clip_text(transformers.CLIPTextModel),
        text_encoder_2=_t5_text(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(folder / "tokenizer_2"),
    ).save_pretrained(folder)


def _flux_wide(folder: Path) -> None:
    """Write Flux for embeddings of the widths of the real one."""
    _flux(folder, joint_dim=4096, pooled_dim=768)


def _kontext(folder: Path) -> None:
    _flux(folder, diffusers.FluxKontextPipeline)


def _flux2_transformer(*, guidance_embeds: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,  # three layers of the text encoder
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )


def _flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )


def _flux2_klein(folder: Path) -> None:
    diffusers.Flux2KleinPipeline(
        transformer=_flux2_transformer(guidance_embeds=False),
        vae=_flux2_vae(),
        scheduler=_flow(),
        text_encoder=transformers.Qwen3ForCausalLM(_qwen3_config(16, num_layers=30)),
        tokenizer=_qwen_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _z_image(folder: Path) -> None:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    diffusers.ZImagePipeline(
        transformer=transformer,
        vae=_vae(16),
        scheduler=_flow(),
        text_encoder=transformers.Qwen3Model(_qwen3_config(16)),
        tokenizer=_qwen_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _qwen_image(folder: Path) -> None:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300, "rope_theta": 1e6}
    text |= {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_end_token_id=261,
        vision_start_token_id=260,
        vision_token_id=262,
    )
    diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=_qwen_vae(),
        scheduler=_flow(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=_qwen_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _gemma2(hidden: int) -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            head_dim=16,
            hidden_size=hidden,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=128,
            attn_implementation="eager",
        )
    )


def _sana(folder: Path) -> None:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    encoder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    diffusers.SanaPipeline(
        transformer=transformer,
        vae=encoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(NUM_TIMESTEPS, shift=7.0),
        text_encoder=_gemma2(8),
        tokenizer=_t5_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _lumina2(folder: Path) -> None:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    diffusers.Lumina2Pipeline(
        transformer=transformer,
        vae=_vae(4),
        scheduler=_flow(),
        text_encoder=_gemma2(8),
        tokenizer=_t5_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _llama(folder: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    _t5_tokenizer(folder, "PreTrainedTokenizerFast")


def _hidream(folder: Path) -> None:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    _llama(folder / "llama")
    diffusers.HiDreamImagePipeline(
        transformer=transformer,
        vae=_vae(4),
        scheduler=_flow(),
        text_encoder=_clip_text(transformers.CLIPTextModelWithProjection, max_position_embeddings=128),
        text_encoder_2=_clip_text(transformers.CLIPTextModelWithProjection, max_position_embeddings=128),
        text_encoder_3=_t5_text(),
        text_encoder_4=transformers.LlamaForCausalLM.from_pretrained(folder / "llama"),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(folder / "tokenizer_3"),
        tokenizer_4=transformers.AutoTokenizer.from_pretrained(folder / "llama"),
    ).save_pretrained(folder)


def _ddpm(folder: Path) -> None:
    """Write the configuration of a UNet of images, which `train_unconditional.py` begins from."""
    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    unet.save_config(folder)


def _kandinsky(folder: Path) -> None:
    """Write prior and decoder of Kandinsky 2.2 into one folder, as its training scripts read them."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        image_size=64,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        patch_size=16,
    )
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1)
    torch.nn.init.ones_(prior.clip_std)
    tokenizer = _clip_tokenizer()
    tokenizer.model_max_length = 77
    parts = {
        "prior": prior,
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
        "image_processor": transformers.CLIPImageProcessor(crop_size=64, size=64),
        "text_encoder": _clip_text(transformers.CLIPTextModelWithProjection),
        "tokenizer": tokenizer,
    }
    diffusers.KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=diffusers.DDPMScheduler(NUM_TIMESTEPS),
        movq=movq,
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample"),
        **{f"prior_{name}": part for name, part in parts.items()},
    ).save_pretrained(folder)
    for name, part in parts.items():
        part.save_pretrained(folder / name)


def _flux2(folder: Path) -> None:
    """Write Flux.2 (dev), whose text encoder is Mistral 3."""
    text: dict[str, Any] = {"model_type": "mistral", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 37}
    text |= {"num_attention_heads": 4, "num_hidden_layers": 30, "num_key_value_heads": 2, "head_dim": 4}
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    vision |= {"intermediate_size": 37, "image_size": 30, "patch_size": 6, "num_channels": 3}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
    tokenizer = _t5_tokenizer(folder / "tokenizer", "PreTrainedTokenizerFast")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(), tokenizer=tokenizer, chat_template=template
    )
    diffusers.Flux2Pipeline(
        transformer=_flux2_transformer(guidance_embeds=True),
        vae=_flux2_vae(),
        scheduler=_flow(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
    ).save_pretrained(folder)


def _qwen3_vl(num_layers: int) -> Any:
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": num_layers}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}
    text |= {"rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"}}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_end_token_id=261,
        vision_start_token_id=260,
        image_token_id=262,
        video_token_id=263,
    )
    return transformers.Qwen3VLModel(config)


def _krea2(folder: Path) -> None:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    diffusers.Krea2Pipeline(
        transformer=transformer,
        vae=_qwen_vae(),
        scheduler=_flow(),
        text_encoder=_qwen3_vl(2),
        tokenizer=_qwen_tokenizer(folder / "tokenizer"),
        text_encoder_select_layers=(1, 2),
    ).save_pretrained(folder)


def _ideogram4(folder: Path) -> None:
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS as TAPS

    def transformer() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16 * len(TAPS),
            mrope_section=(4, 2, 2),
        )

    diffusers.Ideogram4Pipeline(
        transformer=transformer(),
        unconditional_transformer=transformer(),
        vae=_flux2_vae(),
        scheduler=_flow(),
        text_encoder=_qwen3_vl(max(TAPS) + 1),
        tokenizer=_qwen_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _cogview4(folder: Path) -> None:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    tokenizer = _t5_tokenizer(folder / "tokenizer", "PreTrainedTokenizerFast")
    # GLM's, too, begins with a token of its own, so that an empty prompt has one
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    text = transformers.GlmConfig(
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
        pad_token_id=0,
    )
    diffusers.CogView4Pipeline(
        transformer=transformer,
        vae=_vae(4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            NUM_TIMESTEPS, base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        text_encoder=transformers.GlmModel(text),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def _cogvideo(folder: Path) -> None:
    _cogvideo_of(folder, diffusers.CogVideoXPipeline, 4)


def _cogvideo_image(folder: Path) -> None:
    _cogvideo_of(folder, diffusers.CogVideoXImageToVideoPipeline, 8)


def _cogvideo_of(folder: Path, cls: type, channels: int) -> None:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=64,
    )
    encoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    cls(
        transformer=transformer,
        vae=encoder,
        scheduler=diffusers.CogVideoXDPMScheduler(NUM_TIMESTEPS),
        text_encoder=_t5_text(),
        tokenizer=_t5_tokenizer(folder / "tokenizer"),
    ).save_pretrained(folder)


def _inpaint(folder: Path) -> None:
    """Write a pipeline for inpainting, whose UNet has nine channels and whose VAE divides sizes by eight."""
    _sd_of(folder, in_channels=9)


def _pix2pix(folder: Path) -> None:
    """Write a pipeline that edits images, whose UNet has eight channels."""
    _sd_of(folder, in_channels=8)


def _gligen(folder: Path) -> None:
    _sd_of(folder, attention_type="gated")


def _sd_of(folder: Path, **settings: Any) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        **settings,
    )
    encoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        sample_size=64,
    )
    tokenizer = _clip_tokenizer()
    tokenizer.model_max_length = 77
    diffusers.StableDiffusionPipeline(
        vae=encoder,
        text_encoder=_clip_text(transformers.CLIPTextModel),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDPMScheduler(NUM_TIMESTEPS, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)


def _image_encoder(folder: Path) -> None:
    sizes = {"hidden_size": 32, "image_size": 224, "projection_dim": 32, "intermediate_size": 37}
    vision = transformers.CLIPVisionConfig(**sizes, num_attention_heads=4, num_hidden_layers=2, patch_size=32)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(folder)


def _controlnet(folder: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(assets.tiny_sd_path() / "unet")
    diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "sd": _sd,
    "sdxl": _tiny_sdxl,
    "edm_sdxl": _edm_sdxl,
    "sd3": _sd3,
    "sd3_wide": _sd3_wide,
    "flux": _flux,
    "flux_wide": _flux_wide,
    "kontext": _kontext,
    "flux2_klein": _flux2_klein,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
    "sana": _sana,
    "lumina2": _lumina2,
    "llama": _llama,
    "hidream": _hidream,
    "ddpm": _ddpm,
    "kandinsky": _kandinsky,
    "controlnet": _controlnet,
    "flux2": _flux2,
    "krea2": _krea2,
    "ideogram4": _ideogram4,
    "cogview4": _cogview4,
    "cogvideo": _cogvideo,
    "cogvideo_image": _cogvideo_image,
    "inpaint": _inpaint,
    "pix2pix": _pix2pix,
    "masterful/gligen-1-4-generation-text-box": _gligen,  # the name that its script has
    "image_encoder": _image_encoder,
}

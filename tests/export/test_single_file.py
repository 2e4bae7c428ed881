"""The names of one-file checkpoints, against those that diffusers' own converter gives."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_memguard.export.single_file import (
    SingleFileError,
    ldm_unet_names,
    ldm_vae_names,
    single_file_weights,
    text_encoder_weights,
    vae_tensor,
)
from sd_memguard.models.lora import DOWN, TARGETS, UP, LowRank, kohya_names

DATA = Path(__file__).parents[1] / "fixtures"
CONFIGS = json.loads((DATA / "stable_diffusion_configs.json").read_text(encoding="utf-8"))
# Made by tools/upstream_single_file.py.
UPSTREAM = json.loads(gzip.decompress((DATA / "upstream_single_file.json.gz").read_bytes()))["shapes"]


def parts_without_memory(config):
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**config["unet"]),
            "vae": AutoencoderKL(**config["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        }
        if "text_encoder_2" in config:
            second = CLIPTextConfig(**config["text_encoder_2"])
            networks["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return {part: network.state_dict() for part, network in networks.items()}


@pytest.mark.parametrize("version", ["sd15", "sd21", "sdxl"])
def test_keys_and_shapes_of_the_true_models_are_those_of_upstream(version):
    config = CONFIGS[version]
    ours, found = single_file_weights(parts_without_memory(config), config)
    assert found == {"sd15": "v1", "sd21": "v2", "sdxl": "xl-v1-base"}[version]
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == UPSTREAM[version]


def test_kohya_names_of_sdxl_are_read_back_by_diffusers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS["sdxl"]["unet"])
    layers = [name for name, _ in unet.named_modules() if name.endswith(tuple(f".{target}" for target in TARGETS))]
    original = ldm_unet_names([f"{layer}.weight" for layer in layers], 2)
    names = {layer: original[f"{layer}.weight"].removesuffix(".weight") for layer in layers}
    factors = {f"{layer}{suffix}": torch.zeros(1, 1) for layer in layers for suffix in (DOWN, UP)}
    adapter = LowRank(factors, 1, 0.0, 0.0)
    ours = kohya_names(adapter, names)
    # As files of sd-scripts for SDXL have them.
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in ours
    assert "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0.alpha" in ours
    assert "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v.lora_up.weight" in ours
    read = _maybe_map_sgm_blocks_to_diffusers(dict.fromkeys(ours), SimpleNamespace(**CONFIGS["sdxl"]["unet"]))
    sides = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    found = {re.sub("|".join(sides), lambda match: sides[match[0]], name) for name in read}
    assert found == set(kohya_names(adapter))
    assert len(ours) == 3 * 4 * 2 * 70  # the down weight, the up weight and the alpha of 70 blocks with two attentions


def test_unet_blocks_are_counted_through_for_other_numbers_of_layers():
    names = [
        "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.0.downsamplers.0.conv.bias",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "mid_block.resnets.1.norm2.bias",
        "mid_block.attentions.0.norm.weight",
        "up_blocks.0.attentions.1.proj_out.weight",
        "up_blocks.0.upsamplers.0.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight",
    ]
    assert list(ldm_unet_names(names, 1).values()) == [
        "input_blocks.1.0.in_layers.2.weight",
        "input_blocks.2.0.op.bias",
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
        "middle_block.2.out_layers.0.bias",
        "middle_block.1.norm.weight",
        "output_blocks.1.1.proj_out.weight",
        "output_blocks.1.2.conv.weight",
        "output_blocks.3.1.conv.weight",
    ]


def test_old_and_new_names_of_the_vae_attention_mean_the_same():
    prefix = "encoder.mid_block.attentions.0."
    new, old = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")
    expected = [f"encoder.mid.attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out")]
    for names in (new, old):
        assert list(ldm_vae_names([f"{prefix}{name}.weight" for name in names], 4).values()) == expected
    weight = torch.randn(3, 3)
    assert vae_tensor(expected[0], weight).shape == (3, 3, 1, 1)
    assert vae_tensor(expected[0].replace("weight", "bias"), weight[0]).shape == (3,)


def test_open_clip_has_one_matrix_for_query_key_and_value_and_its_projection_the_other_way_round():
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    config.projection_dim = 6
    weights = CLIPTextModelWithProjection(config).state_dict()
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as older versions saved it
    converted = text_encoder_weights(weights, "gelu")
    attention = "text_model.encoder.layers.0.self_attn."
    three = [weights[f"{attention}{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(
        converted["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"], torch.cat(three)
    )
    assert torch.equal(converted["cond_stage_model.model.text_projection"], weights["text_projection.weight"].T)
    assert not any("position_ids" in name for name in {**converted, **text_encoder_weights(weights, "quick_gelu")})


@pytest.mark.parametrize(
    "name",
    [
        "class_embedding.linear_1.weight",
        "mid_block.resnets.2.conv1.weight",
        "down_blocks.0.motion_modules.0.norm.weight",
        "down_blocks.0.resnets.3.conv1.weight",
        "up_blocks.0.attentions.0.unknown.weight",
        "down_blocks.0.resnets.0.norm3.weight",
    ],
)
def test_what_has_no_place_in_a_unet_is_refused_by_name(name):
    with pytest.raises(SingleFileError, match=f"no place for `{name}`"):
        ldm_unet_names([name], 2)


def test_other_architectures_are_refused():
    with pytest.raises(SingleFileError, match="same number of layers"):
        ldm_unet_names([], [1, 2])
    with pytest.raises(SingleFileError, match=r"encoder\.down_blocks\.0\.attentions"):
        ldm_vae_names(["encoder.down_blocks.0.attentions.0.to_q.weight"], 4)
    with pytest.raises(SingleFileError, match="activation relu"):
        text_encoder_weights({}, "relu")
    with pytest.raises(SingleFileError, match=r"text_model\.odd"):
        text_encoder_weights({"odd.weight": torch.zeros(1)}, "gelu")

"""One-file checkpoints: the weights of a pipeline under the names of the original code of Stable Diffusion 1.x to XL.

Those are the names of the modules of latent-diffusion's UNet and autoencoder, and those of the text encoders it used:
CLIP of transformers in 1.x, OpenCLIP in 2.x, both in XL. Everything here is a function of names, tensors and a few
numbers of the configs; a name that has no place in that layout is refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sd_memguard.errors import UserError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

Weights = Mapping[str, Tensor]

BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(\w+)\.(\d+)\.(.+)")
UNET_STEMS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ATTENTION = re.compile(r"(norm|proj_in|proj_out|transformer_blocks\.\d+\..+)\.(weight|bias)")
VAE_STEMS = {
    **{name: name for name in ("quant_conv", "post_quant_conv")},
    **{f"{side}.{name}": f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{side}.conv_norm_out": f"{side}.norm_out" for side in ("encoder", "decoder")},
}
VAE_RESNET = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "conv_shortcut": "nin_shortcut"}
# The second names are those of diffusers before 0.17, which many files still have.
VAE_ATTENTION = {
    "group_norm": "norm",
    **{"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    **{"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},
}
VAE_PROJECTION = re.compile(r".+\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
OPEN_CLIP_STEMS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


class SingleFileError(UserError):
    """The pipeline has a part that the layout of Stable Diffusion has no place for."""


def single_file_weights(
    networks: Mapping[str, Weights], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], str]:
    """Return all weights of a pipeline as one dict under the original names, and the version: v1, v2 or xl-v1-base.

    Args:
        networks: weights by part: ``unet`` and ``vae`` by diffusers' names, ``text_encoder`` and, of XL,
            ``text_encoder_2`` by those of transformers, with or without `text_model.`.
        configs: the ``config.json`` of each of them, by part.

    Raises:
        SingleFileError: see ``ldm_unet_names``, ``ldm_vae_names`` and ``text_encoder_weights``.
    """
    unet, vae = networks["unet"], networks["vae"]
    text, version = _text_weights(networks, configs)
    unet_names = ldm_unet_names(unet, configs["unet"]["layers_per_block"])
    vae_names = ldm_vae_names(vae, len(configs["vae"]["block_out_channels"]))
    return {
        **{UNET + unet_names[name]: tensor for name, tensor in unet.items()},
        **{VAE + vae_names[name]: vae_tensor(vae_names[name], tensor) for name, tensor in vae.items()},
        **text,
    }, version


def _text_weights(
    networks: Mapping[str, Weights], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], str]:
    """Return the weights of the text encoders, and the version that they belong to."""
    activations = {part: configs[part]["hidden_act"] for part in networks if part.startswith("text_encoder")}
    if "text_encoder_2" not in activations:
        version = "v2" if activations["text_encoder"] == "gelu" else "v1"
        return text_encoder_weights(networks["text_encoder"], activations["text_encoder"]), version
    if activations != {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}:
        raise SingleFileError(
            "a one-file checkpoint of Stable Diffusion XL has a first text encoder with quick_gelu and a second one "
            f"with gelu, this pipeline {' and '.join(activations.values())}: export `merged` instead"
        )
    first = text_encoder_weights(networks["text_encoder"], "quick_gelu", XL_CLIP)
    return {**first, **text_encoder_weights(networks["text_encoder_2"], "gelu", XL_OPEN_CLIP)}, "xl-v1-base"


def ldm_unet_names(names: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Return the original name of each weight of a UNet.

    The original counts its blocks through: ``input_blocks`` are the first convolution, then for each level its
    ``layers_per_block`` layers and a downsampler; ``output_blocks`` have one layer more a level, and the upsampler
    comes last in the same block, behind the attention where there is one.

    Raises:
        SingleFileError: a weight has no place there, or ``layers_per_block`` differs from level to level.
    """
    names = list(names)
    if not isinstance(layers_per_block, int):
        raise SingleFileError(
            f"a one-file checkpoint needs the same number of layers in each block, this UNet has {layers_per_block}; "
            "export `merged` instead"
        )
    stride = layers_per_block + 1
    blocks = [match for match in map(BLOCK.fullmatch, names) if match]
    attentive = {match[2] for match in blocks if (match[1], match[4]) == ("up", "attentions")}

    def locate(side: str, block: str | None, module: str, index: int, rest: str) -> str | None:
        if side == "mid":
            within = {"resnets": 2 * index, "attentions": 2 * index + 1}.get(module)
            return None if within is None or within > 2 else f"middle_block.{within}.{rest}"
        first = int(block or 0) * stride
        if module in ("resnets", "attentions") and index < stride:
            place = f"input_blocks.{1 + first + index}" if side == "down" else f"output_blocks.{first + index}"
            return f"{place}.{int(module == 'attentions')}.{rest}"
        if module == "downsamplers" and rest.startswith("conv."):
            return f"input_blocks.{first + stride}.0.op.{rest.removeprefix('conv.')}"
        if module == "upsamplers":
            return f"output_blocks.{first + layers_per_block}.{1 + (block in attentive)}.{rest}"
        return None

    def rename(name: str) -> str | None:
        stem, _, kind = name.rpartition(".")
        if stem in UNET_STEMS:
            return f"{UNET_STEMS[stem]}.{kind}"
        match = BLOCK.fullmatch(name)
        if match is None:
            return None
        side, module, rest = match[1] or match[3], match[4], match[6]
        if module == "resnets":
            rest = _renamed(rest, UNET_RESNET)
        if module == "attentions" and not UNET_ATTENTION.fullmatch(rest):
            rest = None
        return rest and locate(side, match[2], module, int(match[5]), rest)

    return _rename_all("UNet", names, rename)


def ldm_vae_names(names: Iterable[str], num_blocks: int) -> dict[str, str]:
    """Return the original name of each weight of a VAE, whose decoder counts its ``num_blocks`` blocks from the end.

    Raises:
        SingleFileError: a weight has no place there.
    """

    def rename(name: str) -> str | None:
        stem, _, kind = name.rpartition(".")
        if stem in VAE_STEMS:
            return f"{VAE_STEMS[stem]}.{kind}"
        half, _, inner = name.partition(".")
        match = BLOCK.fullmatch(inner)
        if match is None:
            return None
        side, module, index, rest = match[1] or match[3], match[4], int(match[5]), match[6]
        block = int(match[2] or 0)
        level = f"{half}.down.{block}" if side == "down" else f"{half}.up.{num_blocks - 1 - block}"
        if module in ("downsamplers", "upsamplers"):
            return f"{level}.{module.removesuffix('rs')}.{rest}"
        if module == "resnets":
            place = f"{half}.mid.block_{index + 1}" if side == "mid" else f"{level}.block.{index}"
            inside = _renamed(rest, VAE_RESNET)
        else:
            place, inside = f"{half}.mid.attn_1", _renamed(rest, VAE_ATTENTION)
            if (side, index) != ("mid", 0):
                return None
        return inside and f"{place}.{inside}"

    return _rename_all("VAE", names, rename)


def vae_tensor(ldm_name: str, tensor: Tensor) -> Tensor:
    """Return the tensor in the original shape: the projections of the attention are 1 x 1 convolutions there."""
    return tensor[:, :, None, None] if VAE_PROJECTION.fullmatch(ldm_name) and tensor.ndim == 2 else tensor


def text_encoder_weights(weights: Weights, hidden_act: str, prefix: str | None = None) -> dict[str, Tensor]:
    """Return a text encoder's weights under the names of CLIP (1.x) or of OpenCLIP (2.x).

    The activation decides which, since a program that reads the file takes it from the layout: CLIP has
    ``quick_gelu``, OpenCLIP ``gelu``. OpenCLIP has query, key and value in one matrix and its text projection the
    other way round.

    Args:
        weights: by the names of transformers.
        hidden_act: the activation.
        prefix: what the names begin with; that of 1.x or 2.x by default.

    Raises:
        SingleFileError: another activation, or a weight that has no place there.
    """
    classic = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith("position_ids")  # a constant that older versions saved
    }
    if hidden_act == "quick_gelu":
        return {(prefix or CLIP) + name: tensor for name, tensor in classic.items()}
    if hidden_act != "gelu":
        raise SingleFileError(
            f"a one-file checkpoint has no place for a text encoder with the activation {hidden_act}; Stable Diffusion "
            "1.x has quick_gelu and 2.x gelu: export `merged` instead"
        )
    return {(prefix or OPEN_CLIP) + name: tensor for name, tensor in _open_clip(classic).items()}


def _open_clip(classic: Weights) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in classic.items():
        match = TEXT_LAYER.fullmatch(name)
        if name == "text_projection.weight":
            converted["text_projection"] = tensor.T.contiguous()
        elif name in OPEN_CLIP_STEMS:
            converted[OPEN_CLIP_STEMS[name]] = tensor
        elif match is None:
            raise _no_place("text encoder", name)
        elif match[2] == "self_attn.q_proj":
            three = [classic[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            converted[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(three)
        elif match[2] in OPEN_CLIP_LAYER:
            converted[f"transformer.resblocks.{match[1]}.{OPEN_CLIP_LAYER[match[2]]}.{match[3]}"] = tensor
        elif match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise _no_place("text encoder", name)
    return converted


def _renamed(name: str, stems: Mapping[str, str]) -> str | None:
    stem, _, kind = name.rpartition(".")
    return f"{stems[stem]}.{kind}" if stem in stems else None


def _rename_all(part: str, names: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for name in names:
        new = rename(name)
        if new is None:
            raise _no_place(part, name)
        renamed[name] = new
    assert len(set(renamed.values())) == len(renamed)
    return renamed


def _no_place(part: str, name: str) -> SingleFileError:
    return SingleFileError(
        f"a one-file checkpoint of Stable Diffusion has no place for `{name}` of the {part}, which has "
        "another architecture; export `merged` instead"
    )

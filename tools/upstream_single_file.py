"""Make the list of keys and shapes that diffusers' own converters give a one-file checkpoint, for our tests.

    python tools/upstream_single_file.py COMMIT path/to/diffusers/scripts

writes tests/fixtures/upstream_single_file.json.gz. COMMIT names the revision of huggingface/diffusers that the
scripts are taken from. They convert the parts of Stable Diffusion 1.5, 2.1 and XL, built from
tests/fixtures/stable_diffusion_configs.json without memory for their weights.
"""

import gzip
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

DATA = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
TARGET = DATA / "upstream_single_file.json.gz"


def shapes(convert: dict[str, Any], config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shape of each weight by its key, as the `main` of the script puts them together."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"]).state_dict()
        vae = AutoencoderKL(**config["vae"]).state_dict()
        text = _old_names(CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).state_dict())
        second = config.get("text_encoder_2")
        second = second and _old_names(CLIPTextModelWithProjection(CLIPTextConfig(**second)).state_dict())
    parts = {
        "model.diffusion_model.": convert["convert_unet_state_dict"](unet),
        "first_stage_model.": convert["convert_vae_state_dict"](vae),
    }
    if second:
        converted = convert["convert_openclip_text_enc_state_dict"](second)
        converted["text_projection"] = converted.pop("text_projection.weight").T
        parts["conditioner.embedders.0.transformer."] = convert["convert_openai_text_enc_state_dict"](text)
        parts["conditioner.embedders.1.model."] = converted
    elif "text_model.encoder.layers.22.layer_norm2.bias" in text:
        text = {f"transformer.{key}": tensor for key, tensor in text.items()}
        parts["cond_stage_model.model."] = convert["convert_text_enc_state_dict_v20"](text)
    else:
        parts["cond_stage_model.transformer."] = convert["convert_text_enc_state_dict"](text)
    return {prefix + key: list(tensor.shape) for prefix, part in parts.items() for key, tensor in part.items()}


def _old_names(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a text encoder as transformers named them before version 5, which the scripts know."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in text.items()
    }


def main() -> None:
    """Write the list for the commit and the scripts on the command line."""
    commit, scripts = sys.argv[1:]
    names = {"sdxl": "convert_diffusers_to_original_sdxl.py"}
    other = "convert_diffusers_to_original_stable_diffusion.py"
    configs = json.loads((DATA / "stable_diffusion_configs.json").read_text(encoding="utf-8"))
    table = {
        "source": "https://github.com/huggingface/diffusers, scripts/convert_diffusers_to_original_*.py",
        "commit": commit,
        "made_by": "tools/upstream_single_file.py",
        "shapes": {
            name: shapes(runpy.run_path(str(Path(scripts) / names.get(name, other))), config)
            for name, config in configs.items()
        },
    }
    text = json.dumps(table, indent=0, sort_keys=True)
    TARGET.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


if __name__ == "__main__":
    main()

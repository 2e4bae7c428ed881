"""Make the list of keys and shapes that diffusers' own converter gives a one-file checkpoint, for our tests.

    python tools/upstream_single_file.py COMMIT convert_diffusers_to_original_stable_diffusion.py

writes tests/fixtures/upstream_single_file.json.gz. COMMIT names the revision of huggingface/diffusers that the
script (in `scripts/`) is taken from. It converts the parts of Stable Diffusion 1.5 and 2.1, built from
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
from transformers import CLIPTextConfig, CLIPTextModel

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
TARGET = DATA / "upstream_single_file.json.gz"


def shapes(convert: dict[str, Any], config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shape of each weight by its key, as the `main` of the script puts them together."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"]).state_dict()
        vae = AutoencoderKL(**config["vae"]).state_dict()
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).state_dict()
    # The script knows the text encoder as transformers named its weights before version 5.
    text = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in text.items()}
    parts = {
        "model.diffusion_model.": convert["convert_unet_state_dict"](unet),
        "first_stage_model.": convert["convert_vae_state_dict"](vae),
    }
    if "text_model.encoder.layers.22.layer_norm2.bias" in text:
        text = {f"transformer.{key}": tensor for key, tensor in text.items()}
        parts["cond_stage_model.model."] = convert["convert_text_enc_state_dict_v20"](text)
    else:
        parts["cond_stage_model.transformer."] = convert["convert_text_enc_state_dict"](text)
    return {prefix + key: list(tensor.shape) for prefix, part in parts.items() for key, tensor in part.items()}


def main() -> None:
    """Write the list for the commit and the script on the command line."""
    commit, script = sys.argv[1:]
    convert = runpy.run_path(script)
    configs = json.loads((DATA / "stable_diffusion_configs.json").read_text(encoding="utf-8"))
    table = {
        "source": "https://github.com/huggingface/diffusers, scripts/convert_diffusers_to_original_stable_diffusion.py",
        "commit": commit,
        "made_by": "tools/upstream_single_file.py",
        "shapes": {name: shapes(convert, config) for name, config in configs.items()},
    }
    text = json.dumps(table, indent=0, sort_keys=True)
    TARGET.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


if __name__ == "__main__":
    main()

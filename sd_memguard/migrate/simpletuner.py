"""SimpleTuner (bc8e6ab): ``config.json`` and the file of data backends that it names, or that file alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_memguard.migrate.translation import MigrationError, Translation, read_pairs

FAMILIES = {"sd1x", "sd2x", "sdxl"}
SAME_NAME = (
    *("output_dir", "seed", "max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "checkpoints_total_limit", "learning_rate", "snr_gamma", "noise_offset", "revision"),
    *("variant", "input_perturbation", "allow_tf32", "max_grad_norm", "validation_prompt", "use_ema"),
)
WHY = {
    "base_model_precision": "weights are not quantized",
    "train_text_encoder": "text encoders are not trained",
    "loss_type": "the loss is the squared error",
    "webhook_config": "nothing is sent",
    "validation_prompt_library": "give prompts as `--validation_prompts`",
    "controlnet": "ControlNets are not trained",
    "init_lora": "an adapter begins anew: merge the old one into the base model",
    "offset_noise": "set `--noise_offset`",
}
IGNORED = (
    *("data_backend_config", "model_flavour", "vae_batch_size", "report_to", "lora_type"),
    *("validation_guidance", "validation_num_inference_steps", "validation_resolution", "validation_seed"),
    *("validation_steps", "push_to_hub", "push_checkpoints_to_hub", "hub_model_id", "disable_bucket_pruning"),
    *("disable_benchmark", "aspect_bucket_rounding", "minimum_image_size", "resume_from_checkpoint", "lora_alpha"),
    *("tracker_run_name", "tracker_project_name", "validation_guidance_rescale", "validation_torch_compile"),
)


def translate(content: Mapping[str, Any] | Sequence[Any], folder: Path) -> Translation:
    """Return the settings of a configuration, with its data backends, or of a list of these alone.

    Raises:
        MigrationError: the model is of a family that is not trained here.
    """
    if isinstance(content, Sequence):
        told = Translation("SimpleTuner", {}, folder)
        told.model(None)
        _backends(told, content, {})
        return told
    told = Translation("SimpleTuner", {name.removeprefix("--"): value for name, value in content.items()}, folder)
    family = told.pop("model_family", default="sd1x")
    if family not in FAMILIES:
        raise MigrationError(
            f"SimpleTuner's model family {family} is not trained by this program; see docs/trainers.md"
        )
    told.model(told.pop("pretrained_model_name_or_path"))
    if told.pop("model_type", default="full") == "lora":
        _adapter(told)
    told.drop([name for name in ("max_train_steps", "num_train_epochs") if not told.theirs.get(name)])
    told.take("num_train_epochs", "num_train_epochs", convert=int)
    for name in SAME_NAME:
        told.take(name, name)
    if told.settings.get("use_ema") and told.settings.get("proxy") == "lora":
        del told.settings["use_ema"]
        told.note("use_ema", "a LoRA adapter has no average")
    told.take("checkpoint_step_interval", "checkpointing_steps", convert=int)
    told.take("caption_dropout_probability", "caption_dropout", convert=float)
    told.precision("mixed_precision", told.pop("mixed_precision", default="bf16"))
    told.schedule(told.pop("lr_scheduler"), told.pop("lr_warmup_steps"))
    arguments = told.pop("optimizer_config", default="")
    told.optimizer(told.pop("optimizer", default="adamw_bf16"), read_pairs(str(arguments).split(",")))
    own = {key: told.pop(key) for key in ("resolution", "resolution_type")}
    if (steps := told.pop("aspect_bucket_alignment")) is not None:
        told.settings["bucket_reso_steps"] = int(steps)
    name = told.pop("data_backend_config")
    backends = [] if name is None else _read_backends(told, str(name))
    _backends(told, backends, own)
    if library := told.pop("user_prompt_library"):
        place = told.file_beside(str(library))
        prompts = None if place is None else json.loads(place.read_text(encoding="utf-8"))
        texts = None if prompts is None else [one if isinstance(one, str) else "" for one in prompts.values()]
        told.prompts(f"user_prompt_library = {library}", texts)
    told.refuse(WHY)
    told.drop(IGNORED)
    return told


def _adapter(told: Translation) -> None:
    """Take the adapter: its own settings, or those of the file for LyCORIS that it names."""
    rank, alpha = told.pop("lora_rank", default=16), told.pop("lora_alpha")
    kind = "dora" if told.pop("use_dora") else "lora"
    name = told.pop("lycoris_config")
    if told.theirs.get("lora_type", "standard") == "lycoris":
        file = None if name is None else told.file_beside(str(name))
        if file is None:
            told.note(f"lycoris_config = {name}", "the file is not there: set `--adapter` and `--rank`")
        else:
            lycoris = json.loads(file.read_text(encoding="utf-8"))
            kind = str(lycoris.get("algo", "lokr"))
            rank, alpha = lycoris.get("linear_dim", rank), lycoris.get("linear_alpha", alpha)
            told.note(f"layers in {name}", "adapters are on the attention of the UNet")
    told.lora(rank, alpha, kind)


def _read_backends(told: Translation, name: str) -> list[Any]:
    file = told.file_beside(name)
    if file is None:
        told.note(f"data backends in {name}", "the file is not there: give the folder as `--train_data_dir`")
        return []
    backends: list[Any] = json.loads(file.read_text(encoding="utf-8"))
    return backends


def _backends(told: Translation, backends: Sequence[Any], general: Mapping[str, Any]) -> None:
    """Take the backends of images, whose resolution is that of the configuration unless they have their own."""
    folders, sides, in_buckets = [], set(), False
    if not backends and general:
        sides.add(_resolution(told, general))
    for backend in backends:
        kind = backend.get("dataset_type", "image")
        if kind == "eval":
            told.settings["validation_data_dir"] = str(backend.get("instance_data_dir", ""))
        if kind != "image" or backend.get("disabled"):
            continue
        name = backend.get("id", "?")
        if backend.get("is_regularisation_data"):
            told.class_images(str(backend.get("instance_data_dir", "")))
            continue
        if backend.get("type", "local") == "huggingface":
            told.settings["dataset_name"] = str(backend.get("dataset_name"))
        elif backend.get("type", "local") == "local":
            folders.append(str(backend.get("instance_data_dir", "")))
        else:
            told.note(f"backend {name} ({backend['type']})", "copy the images to a folder: samples need numbers")
        strategy = backend.get("caption_strategy", "textfile")
        if strategy in ("filename", "instanceprompt"):
            told.note(f"captions of {name} by {strategy}", "write a `.txt` beside each image, or `metadata.jsonl`")
        elif strategy == "parquet":
            told.note(f"captions of {name} by {strategy}", "`metadata.parquet` with columns `file_name` and `text`")
        shuffle = dict(backend.get("caption_shuffle") or {})
        if shuffle.get("enable"):
            separators = {"comma": ",", "space": " ", "period": "."}
            separator = separators.get(str(shuffle.get("split_on", "comma")), ",")
            told.tags(shuffle=True, dropout=0, keep=shuffle.get("position_start", 0), separator=separator)
            told.note(f"caption_shuffle of {name}", "the order is another one each time, not one of a few")
        if backend.get("repeats"):
            told.repeats(f"repeats = {backend['repeats']} of {name}")
        if backend.get("crop") and backend.get("crop_style", "random") == "center":
            told.settings["center_crop"] = True
        if general or "resolution" in backend:
            sides.add(_resolution(told, {**general, **backend}))
        if not backend.get("crop") or backend.get("crop_aspect", "square") != "square":
            in_buckets = True
    told.resolutions(sides)
    if in_buckets:
        told.settings["enable_bucket"] = True
    else:
        told.settings.pop("bucket_reso_steps", None)
    if folders or "dataset_name" not in told.settings:
        told.folders(folders)


def _resolution(told: Translation, own: Mapping[str, Any]) -> int:
    """Return the side of the square with as many pixels as the images of a backend have."""
    resolution, kind = own.get("resolution") or 512, own.get("resolution_type")
    if kind == "area":
        side = round(float(resolution) ** 0.5 * 1000 / 64) * 64
        told.note("resolution_type = area", f"megapixels: {side} pixels a side are written")
        return side
    if kind == "pixel":
        told.note("resolution_type = pixel", "is the shorter edge there; here a bucket has the pixels of the square")
    return int(resolution)

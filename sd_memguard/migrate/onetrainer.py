"""OneTrainer (23df383): a JSON file of the training with its concepts, in it or beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_memguard.migrate.translation import MigrationError, Translation

SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_RESTARTS": "cosine_with_restarts",
}
WHY = {
    "perturbation_noise_weight": "set `--input_perturbation`",
    "rescale_noise_scheduler_to_zero_terminal_snr": "the scheduler is the base model's",
    "dropout_probability": "adapters have no dropout",
    "layer_filter": "adapters are on the attention of the UNet",
    "additional_embeddings": "embeddings are not trained",
    "validation": "give a folder of held-out images as `--validation_data_dir`",
    "quantization": "weights are not quantized",
    "custom_learning_rate_scheduler": "name another optimizer or schedule",
}


def translate(content: Mapping[str, Any], folder: Path) -> Translation:
    """Return the settings of a training with its concepts.

    Raises:
        MigrationError: the file of concepts cannot be read, or the model is of no family that is trained here.
    """
    told = Translation("OneTrainer", content, folder)
    kind = str(told.pop("model_type", default="STABLE_DIFFUSION_15"))
    if not kind.startswith(("STABLE_DIFFUSION_1", "STABLE_DIFFUSION_2", "STABLE_DIFFUSION_XL")) or "INPAINT" in kind:
        raise MigrationError(f"OneTrainer's model type {kind} is not trained by this program; see docs/trainers.md")
    told.model(told.pop("base_model_name", default="stable-diffusion-v1-5/stable-diffusion-v1-5"))
    method = told.pop("training_method", default="FINE_TUNE")
    if method == "LORA":
        kind = str(told.pop("peft_type", default="LORA"))
        if told.pop("lora_decompose") and kind == "LORA":
            kind = "DORA"
        told.lora(told.pop("lora_rank", default=16), told.pop("lora_alpha", default=1.0), kind)
    elif method != "FINE_TUNE":
        told.note(
            f"training_method = {method}", "all weights of the UNet are trained, or with `--proxy lora` an adapter"
        )
    _training(told)
    _concepts(told)
    _prompts(told)
    return told


def _training(told: Translation) -> None:
    told.take("learning_rate", "learning_rate", convert=float, default=3e-6)
    optimizer = dict(told.pop("optimizer", default={}) or {})
    name = optimizer.pop("optimizer", "ADAMW")
    arguments: dict[str, Any] = {}
    betas = [optimizer.get("beta1"), optimizer.get("beta2")]
    if None not in betas:
        arguments["betas"] = f"{betas[0]},{betas[1]}"
    arguments |= {key: optimizer[key] for key in ("weight_decay", "eps") if optimizer.get(key) is not None}
    plain = str(name).removeprefix("SCHEDULE_FREE_")
    is_schedule_free = plain != str(name)
    told.optimizer("adamwschedulefree" if is_schedule_free else name, {} if is_schedule_free else arguments)
    scheduler = told.pop("learning_rate_scheduler", default="CONSTANT")
    warmup = told.pop("learning_rate_warmup_steps", default=200)
    told.schedule(SCHEDULES.get(str(scheduler), scheduler), warmup)
    told.take("epochs", "num_train_epochs", convert=int, default=100)
    told.take("batch_size", "train_batch_size", convert=int, default=1)
    told.take("gradient_accumulation_steps", "gradient_accumulation_steps", convert=int)
    told.precision("train_dtype", told.pop("train_dtype", default="FLOAT_16"))
    checkpointing = told.pop("gradient_checkpointing", default="ON")
    told.settings["gradient_checkpointing"] = str(checkpointing).upper() not in ("OFF", "FALSE")
    _resolution(told, str(told.pop("resolution", default="512")))
    if (ema := told.pop("ema", default="OFF")) != "OFF":
        told.settings["use_ema"] = told.settings.get("proxy") != "lora"
        told.settings["offload_ema"] = ema == "CPU" and told.settings["use_ema"]
        if not told.settings["use_ema"]:
            told.note(f"ema = {ema}", "a LoRA adapter has no average")
    weighting = told.pop("loss_weight_fn", default="CONSTANT")
    strength = told.pop("loss_weight_strength", default=5.0)
    if weighting == "MIN_SNR_GAMMA":
        told.settings["snr_gamma"] = float(strength)
    elif weighting != "CONSTANT":
        told.note(f"loss_weight_fn = {weighting}", "losses have the weight 1, or min-SNR weights by `--snr_gamma`")
    told.take("offset_noise_weight", "noise_offset", convert=float)
    told.take("clip_grad_norm", "max_grad_norm", convert=float)
    told.take("dataloader_threads", "dataloader_num_workers", convert=int)
    _masks(told)
    if told.pop("force_v_prediction"):
        told.settings["prediction_type"] = "v_prediction"
    if (save := told.pop("save_every", default=0)) and (unit := told.pop("save_every_unit")) != "NEVER":
        told.note(f"save_every = {save} {unit}", "checkpoints are counted in steps: set `--checkpointing_steps`")
    if target := told.pop("output_model_destination"):
        told.settings["output_dir"] = str(Path(target).with_suffix(""))
        if str(target).endswith(".safetensors"):
            told.settings["export_formats"] = ["lora-kohya" if told.settings.get("proxy") == "lora" else "single-file"]
    for part in ("text_encoder", "text_encoder_2"):
        if dict(told.pop(part, default={}) or {}).get("train") and part == "text_encoder":
            told.note("text_encoder.train", "text encoders are not trained")
    told.refuse(WHY)


def _masks(told: Translation) -> None:
    probability, weight = (told.pop(name, default=0.1) for name in ("unmasked_probability", "unmasked_weight"))
    normalized = told.pop("normalize_masked_area_loss", default=False)
    if not told.pop("masked_training"):
        return
    told.masked("as with `normalize_masked_area_loss`" + ("" if normalized else ", which is off in this file"))
    if probability:
        told.note(f"unmasked_probability = {probability}", "a mask counts each time its image is seen")
    if prior := told.pop("masked_prior_preservation_weight"):
        told.note(f"masked_prior_preservation_weight = {prior}", "what is black is free to change")
    if weight:
        told.note(f"unmasked_weight = {weight}", "what is black does not count: paint it grey")


def _resolution(told: Translation, text: str) -> None:
    """Take one resolution, or several with commas, or ``512x768`` for all images, and the buckets."""
    sides = [int(part) for part in text.replace("x", ",").split(",")]
    is_exact = "x" in text and len(set(sides)) > 1
    if is_exact:
        told.note(f"resolution {text}", f"without buckets images are square: {min(sides)} is written")
    told.resolutions([min(sides)] if is_exact else sides)
    if told.pop("aspect_ratio_bucketing", default=True) and not is_exact:
        told.settings["enable_bucket"] = True


def _concepts(told: Translation) -> None:
    concepts = told.pop("concepts")
    name = told.pop("concept_file_name")
    if concepts is None and name:
        file = told.file_beside(name)
        if file is None:
            told.note(f"concepts in {name}", "the file is not there: give the folder as `--train_data_dir`")
            return
        concepts = json.loads(file.read_text(encoding="utf-8"))
    folders = []
    for concept in concepts or ():
        if not concept.get("enabled", True):
            continue
        place = str(concept.get("path", ""))
        if concept.get("type", "STANDARD") == "VALIDATION":
            told.settings["validation_data_dir"] = place
            continue
        if concept.get("type", "STANDARD") != "STANDARD":
            told.note(f"class images in {place}", "there are none here: DreamBooth scripts run under the launcher")
            continue
        folders.append(place)
        _concept(told, place, concept)
    told.folders(folders)


def _prompts(told: Translation) -> None:
    samples, name = told.pop("samples"), told.pop("sample_definition_file_name")
    if samples is None and name:
        file = told.file_beside(str(name))
        samples = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    if samples is not None or name:
        active = None if samples is None else [one.get("prompt", "") for one in samples if one.get("enabled", True)]
        told.prompts(f"samples in {name}", active)


def _concept(told: Translation, place: str, concept: Mapping[str, Any]) -> None:
    image, text = concept.get("image", {}), concept.get("text", {})
    if image.get("enable_random_flip"):
        told.settings["random_flip"] = True
    if not image.get("enable_crop_jitter", True):
        told.settings["center_crop"] = True
    if image.get("enable_random_rotate"):
        told.note(f"random rotation in {place}", "`--random_affine` moves, rotates and scales a little: set it")
    if (source := text.get("prompt_source", "sample")) != "sample":
        told.note(f"captions of {place} from {source}", "write a `.txt` beside each image, or `metadata.jsonl`")
    drops = bool(text.get("tag_dropout_enable"))
    if drops and (mode := str(text.get("tag_dropout_mode", "FULL"))) != "RANDOM":
        told.note(f"tag dropout {mode} in {place}", "each tag is left out by itself: set `--caption_tag_dropout_rate`")
        drops = False
    if drops and str(text.get("tag_dropout_special_tags_mode", "NONE")) != "NONE":
        told.note(f"special tags in {place}", "all tags behind the first `--keep_tokens` can be left out")
    told.tags(
        shuffle=bool(text.get("enable_tag_shuffling")),
        dropout=text.get("tag_dropout_probability", 0) if drops else 0,
        keep=text.get("keep_tags_count", 1),
        separator=text.get("tag_delimiter", ","),
    )
    if text.get("caps_randomize_enable"):
        told.note(f"random capitals in {place}", "tags are written as they are")
    if concept.get("balancing", 1.0) != 1.0:
        told.repeats(f"balancing {concept['balancing']} of {place}")
    if concept.get("loss_weight", 1.0) != 1.0:
        told.note(f"loss_weight {concept['loss_weight']} of {place}", "all images weigh the same")

"""ai-toolkit (27a03a9): a YAML file of one job with one training process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_memguard.migrate.translation import MigrationError, Translation

OTHER_FAMILIES = ("is_flux", "is_v3", "is_auraflow", "is_lumina2", "is_pixart", "is_pixart_sigma", "is_ssd", "is_vega")
OF_TRAINING = {
    "train_text_encoder": "text encoders are not trained",
    "loss_type": "the loss is the squared error",
    "content_or_style": "all timesteps are trained alike",
    "do_cfg": "",
    "timestep_type": "timesteps are uniform",
}
OF_DATASETS = {
    "trigger_word": "write it into the captions",
    "flip_y": "images are flipped left to right alone",
    "default_caption": "give each image a caption",
    "controls": "losses and conditions are the plain ones",
}


def translate(content: Mapping[str, Any], folder: Path) -> Translation:
    """Return the settings of the job's process.

    Raises:
        MigrationError: it is no training, or of a family that is not trained here.
    """
    job = dict(content.get("config", {}))
    processes = job.get("process", [])
    if len(processes) != 1 or "train" not in processes[0]:
        raise MigrationError(f"ai-toolkit's file must hold one process that trains, got {len(processes)}; keep one")
    process = dict(processes[0])
    model = dict(process.get("model", {}))
    families = [name for name in OTHER_FAMILIES if model.get(name)]
    arch = str(model.get("arch", "sd1"))
    if families or arch not in ("sd1", "sd15", "sd2", "sdxl"):
        raise MigrationError(
            f"ai-toolkit's model kind {', '.join(families) or arch} is not trained by this program; see "
            "docs/trainers.md"
        )
    told = Translation("ai-toolkit", dict(process.get("train", {})), folder)
    told.model(model.get("name_or_path"))
    if model.get("is_v_pred"):
        told.settings["prediction_type"] = "v_prediction"
    if model.get("quantize"):
        told.note("quantize", "weights are not quantized")
    _network(told, dict(process.get("network") or {}))
    _training(told)
    target = Path(str(process.get("training_folder", "output"))) / str(job.get("name", "run"))
    told.settings["output_dir"] = target.as_posix()
    save = dict(process.get("save", {}))
    told.settings["checkpointing_steps"] = int(save.get("save_every", 1000))
    told.settings["checkpoints_total_limit"] = int(save.get("max_step_saves_to_keep", 5))
    prompts = dict(process.get("sample", {})).get("prompts", [])
    texts = [prompt if isinstance(prompt, str) else prompt.get("prompt") for prompt in prompts]
    if texts:
        told.settings["validation_prompts"] = [text for text in texts if text]
    if word := process.get("trigger_word"):
        told.note(f"trigger_word = {word}", "write it into the captions")
    _datasets(told, [dict(dataset) for dataset in process.get("datasets", [])])
    return told


def _network(told: Translation, network: dict[str, Any]) -> None:
    if not network:
        return
    rank = network.get("linear", network.get("rank", 4))
    told.lora(rank, network.get("linear_alpha", network.get("alpha")), str(network.get("type", "lora")))
    if network.get("type") == "lokr" and network.get("lokr_full_rank"):
        told.note("lokr_full_rank", "the second factor has the rank: raise `--rank` for a whole one")
    if network.get("conv"):
        told.note(f"conv = {network['conv']}", "adapters are on the attention alone")


def _training(told: Translation) -> None:
    told.take("steps", "max_train_steps", convert=int, default=1000)
    rate = told.pop("unet_lr", "lr", default=1e-6)
    told.settings["learning_rate"] = float(rate)
    told.take("batch_size", "train_batch_size", convert=int, default=1)
    told.take("gradient_accumulation_steps", "gradient_accumulation_steps", convert=int)
    told.take("gradient_accumulation", "gradient_accumulation_steps", convert=int)
    told.take("gradient_checkpointing", "gradient_checkpointing", default=True)
    told.take("noise_offset", "noise_offset", convert=float)
    told.take("max_grad_norm", "max_grad_norm", convert=float)
    gamma = told.pop("min_snr_gamma", "snr_gamma")
    if gamma is not None:
        told.settings["snr_gamma"] = float(gamma)
    arguments = dict(told.pop("optimizer_params", default={}) or {})
    if isinstance(betas := arguments.get("betas"), list):
        arguments["betas"] = ",".join(map(str, betas))
    told.optimizer(told.pop("optimizer", default="adamw"), arguments)
    told.schedule(
        told.pop("lr_scheduler"), dict(told.pop("lr_scheduler_params", default={}) or {}).get("num_warmup_steps")
    )
    told.precision("dtype", told.pop("dtype", default="fp32"))
    if dict(told.pop("ema_config", default={}) or {}).get("use_ema"):
        if told.settings.get("proxy") == "lora":
            told.note("ema_config", "a LoRA adapter has no average")
        else:
            told.settings["use_ema"] = True
    if told.pop("noise_scheduler", default="ddpm") != "ddpm":
        told.note("noise_scheduler", "noise is that of DDPM")
    if told.pop("train_unet", default=True) is False:
        told.note("train_unet = False", "the UNet is what is trained")
    told.refuse(OF_TRAINING)
    told.drop(("disable_sampling", "skip_first_sample", "linear_timesteps"))


def _datasets(told: Translation, datasets: list[dict[str, Any]]) -> None:
    folders, sides, steps = [], set(), set()
    for dataset in datasets:
        place = str(dataset.pop("folder_path", None) or dataset.pop("dataset_path", ""))
        if dataset.get("is_reg"):
            told.class_images(place)
            continue
        folders.append(place)
        told.caption_extension(dataset.get("caption_ext", "txt"))
        resolution = dataset.get("resolution", 512)
        sides |= set(resolution if isinstance(resolution, list) else [resolution])
        if dataset.get("buckets", True):
            steps.add(int(dataset.get("bucket_tolerance", 64)))
        if dataset.get("flip_x"):
            told.settings["random_flip"] = True
        if not dataset.get("random_crop"):
            told.settings["center_crop"] = True
        if dataset.get("caption_dropout_rate"):
            told.settings["caption_dropout"] = float(dataset["caption_dropout_rate"])
        keep = dataset.get("keep_tokens", 0)
        told.tags(shuffle=bool(dataset.get("shuffle_tokens")), dropout=dataset.get("token_dropout_rate", 0), keep=keep)
        if keep and dataset.get("shuffle_tokens"):
            told.note(f"keep_tokens = {keep} of {place}", "keeps these tags in place, too, where tags are shuffled")
        if dataset.get("num_repeats", 1) != 1:
            told.repeats(f"num_repeats = {dataset['num_repeats']} of {place}")
        if dataset.get("alpha_mask") or dataset.get("mask_path"):
            told.masked("ai-toolkit's is divided by the mean area of the batch")
        if dataset.get("mask_path") and not dataset.get("alpha_mask"):
            told.masks_beside(f"mask_path = {dataset['mask_path']} of {place}")
        if dataset.get("mask_min_value"):
            told.note(f"mask_min_value of {place}", "what is black does not count: paint it grey")
        for name, why in OF_DATASETS.items():
            if dataset.get(name):
                told.note(f"{name} of {place}", why)
    told.folders(folders)
    told.resolutions(sides)
    if steps:  # its buckets enlarge no image
        told.settings |= {"enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": min(steps)}

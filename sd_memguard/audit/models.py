"""The models that are audited: a pipeline folder, a single file, or either with a LoRA or a checkpoint on top."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError, safe_open

from sd_memguard.assets import BUNDLED, tiny_sd_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.features.cache import digest, file_sha256

LORA_FILE = "pytorch_lora_weights.safetensors"
_CHECKPOINT_KEY = "model.diffusion_model."
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class ModelFiles(NamedTuple):
    """Where a model lies.

    Attributes:
        base: Pipeline folder, or a whole checkpoint as one safetensors file.
        addition: A safetensors file on top of a folder: LoRA weights, or a checkpoint whose configs the folder gives.
    """

    base: Path
    addition: Path | None

    @property
    def text(self) -> str:
        """As on the command line."""
        return str(self.base) if self.addition is None else f"{self.base}+{self.addition}"


def find_model(text: str) -> ModelFiles:
    """Return the files of ``DIR``, ``FILE``, ``DIR+LORA`` or ``DIR+FILE``; ``bundled`` is the bundled model.

    Raises:
        AuditError: Where they are not there, or not what they should be.
    """
    base, addition = text, ""
    if not Path(text).exists() and "+" in text:
        base, _, addition = text.rpartition("+")
    folder = tiny_sd_path() if base == BUNDLED else Path(base)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise AuditError(f"`--model` {folder} is no pipeline: it has no model_index.json; name a diffusers folder")
    elif not _is_safetensors(folder):
        raise AuditError(
            f"`--model` {folder} must be a diffusers folder or a .safetensors file with a whole checkpoint; "
            "write a LoRA as FOLDER+LORA.safetensors"
        )
    elif addition or not _is_checkpoint(folder):
        raise AuditError(
            f"`--model` {text}: {folder} holds no whole checkpoint; put its base first: FOLDER+{folder.name}"
        )
    if not addition:
        return ModelFiles(folder, None)
    file = Path(addition)
    file = file / LORA_FILE if file.is_dir() else file
    if not _is_safetensors(file):
        raise AuditError(f"`--model` {text}: {file} must be a .safetensors file, or a folder with {LORA_FILE}")
    return ModelFiles(folder, file)


def _is_safetensors(file: Path) -> bool:
    return file.is_file() and file.suffix == ".safetensors"


def _is_checkpoint(file: Path) -> bool:
    try:
        with safe_open(str(file), "pt") as weights:
            return any(key.startswith(_CHECKPOINT_KEY) for key in weights.keys())  # noqa: SIM118 (the handle is no dict)
    except (SafetensorError, OSError) as error:
        raise AuditError(f"`--model` {file} is damaged: {error}; download or export it again") from error


def model_sha256(files: ModelFiles) -> str:
    """Return one hash of all that decides what the model generates: weights, configs and vocabulary."""
    parts = [files.base]
    if files.base.is_dir():
        parts = [files.base / "model_index.json"]
        for name in _PARTS:
            folder = files.base / name
            parts += sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors", ".txt"))
    if files.addition:
        parts.append(files.addition)
    root = files.base if files.base.is_dir() else files.base.parent
    names = [file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name for file in parts]
    return digest(*(f"{name} {file_sha256(file)}" for name, file in zip(names, parts, strict=True)))


def load_pipeline(model: Path | ModelFiles, device: torch.device | None = None) -> StableDiffusionPipeline:
    """Return the pipeline of a model in float32 with a DDIM scheduler, ready to generate; asks no hub.

    The safety checker is not loaded: it blackens images, and a blackened copy would not be found.

    Args:
        model: A diffusers folder as ``save_pretrained`` writes it, in safetensors; or what ``find_model`` returns.
        device: Default: the first CUDA device, else the CPU.

    Raises:
        AuditError: Where it cannot be loaded; says what diffusers said.
    """
    files = model if isinstance(model, ModelFiles) else ModelFiles(model, None)
    try:
        pipeline = _load(files)
    except Exception as error:  # whatever keeps diffusers from loading it, its own classes among them, is told alike
        hint = "" if files.base.is_dir() else "; without a hub, name a folder with its configs first: FOLDER+FILE"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AuditError(f"`--model` {files.text} cannot be loaded: {reason}{hint}") from error
    # PNDM's config need not mention clip_sample; DDIM would then clip the latents to [-1, 1] and generate garbage.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or default_device())


def default_device() -> torch.device:
    """Return the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(files: ModelFiles) -> StableDiffusionPipeline:
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
    single = files.base if files.base.is_file() else files.addition
    if single is not None and _is_checkpoint(single):
        config = {} if files.addition is None else {"config": str(files.base)}
        return StableDiffusionPipeline.from_single_file(str(single), **config, **options)
    pipeline = StableDiffusionPipeline.from_pretrained(str(files.base), use_safetensors=True, **options)
    if files.addition:
        pipeline.load_lora_weights(str(files.addition.parent), weight_name=files.addition.name)
        # diffusers ignores a file of which it knows no key, with no more than a line in the log.
        if not any(hasattr(part, "peft_config") for part in (pipeline.unet, pipeline.text_encoder)):
            raise ValueError(f"{files.addition.name} holds no LoRA weights for this pipeline")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def read_run_records(folder: Path) -> tuple[dict[str, Any] | None, dict[str, list[Any]] | None]:
    """Return what is known of the run that made a model: a summary for the report, and the columns of its samples.

    Args:
        folder: The pipeline folder; a run keeps its records below it in ``memguard/``.
    """
    config_file, samples_file = folder / "memguard" / "config.json", folder / "memguard" / "samples.parquet"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        rounds = (folder / "memguard" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        samples = pq.read_table(samples_file).to_pydict()
    except (OSError, ValueError):
        return None, None
    last = json.loads(rounds[-1]) if rounds else {}
    run = {
        "num_shards": config.get("num_shards"),
        "num_rounds": len(rounds),
        "global_step": last.get("global_step"),
        "preset": config.get("preset"),
        "memguard": config.get("memguard"),
    }
    return run, samples

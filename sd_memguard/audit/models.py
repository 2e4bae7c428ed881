"""The models that are audited: a pipeline folder, a single file, or either with a LoRA or a checkpoint on top."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pyarrow.parquet as pq
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler, DiffusionPipeline
from safetensors import SafetensorError, safe_open

from sd_memguard.assets import BUNDLED, tiny_sd_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.features.cache import digest, file_sha256

LORA_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKPOINT_KEY = "model.diffusion_model."
_XL_KEY = "conditioner.embedders.1."
_NOT_GENERATING = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
"""Parts that do not decide what is generated from a prompt."""


class ModelFiles(NamedTuple):
    """Where a model lies.

    Attributes:
        base: Pipeline folder, or a whole checkpoint as one safetensors file.
        addition: A safetensors file on top of a folder: LoRA weights, or a checkpoint whose configs the folder gives.
        loras: Further LoRA weights, in the order in which they are put on top.
    """

    base: Path
    addition: Path | None
    loras: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """As on the command line."""
        return "+".join(str(file) for file in (self.base, *([self.addition] if self.addition else []), *self.loras))


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
    return ModelFiles(folder, find_weights(addition, f"`--model` {text}") if addition else None)


def find_weights(text: str, flag: str) -> Path:
    """Return the file of a LoRA, which may be named by its folder.

    Raises:
        AuditError: Where it is not there; ``flag`` tells who named it.
    """
    file = Path(text)
    file = file / LORA_FILE if file.is_dir() else file
    if not _is_safetensors(file):
        raise AuditError(f"{flag}: {file} must be a .safetensors file, or a folder with {LORA_FILE}")
    return file


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
        for name, kind in sorted(_read_index(files.base).items()):
            if isinstance(kind, list) and name not in _NOT_GENERATING:
                found = (files.base / name).rglob("*")
                parts += sorted(file for file in found if file.suffix in (".json", ".model", ".safetensors", ".txt"))
    parts += [*([files.addition] if files.addition else []), *files.loras]
    root = files.base if files.base.is_dir() else files.base.parent
    names = [file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name for file in parts]
    return digest(*(f"{name} {file_sha256(file)}" for name, file in zip(names, parts, strict=True)))


def load_pipeline(
    model: Path | ModelFiles, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Return the pipeline of a model, ready to generate from text; asks no hub.

    Models that predict noise or velocity get a DDIM scheduler; others, such as those of flow matching, keep their own.
    The safety checker is not loaded: it blackens images, and a blackened copy would not be found.

    Args:
        model: A diffusers folder as ``save_pretrained`` writes it, in safetensors; or what ``find_model`` returns.
        device: Default: the first CUDA device, else the CPU.
        dtype: Of the weights.

    Returns:
        What diffusers' ``AutoPipelineForText2Image`` makes of it, or else ``DiffusionPipeline``.

    Raises:
        AuditError: Where it cannot be loaded, says what diffusers said; or where it does not generate from a prompt.
    """
    files = model if isinstance(model, ModelFiles) else ModelFiles(model, None)
    try:
        pipeline = _load(files, dtype)
    except Exception as error:  # whatever keeps diffusers from loading it, its own classes among them, is told alike
        hint = "" if files.base.is_dir() else "; without a hub, name a folder with its configs first: FOLDER+FILE"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AuditError(f"`--model` {files.text} cannot be loaded: {reason}{hint}") from error
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise AuditError(
            f"`--model` {files.text} is a {type(pipeline).__name__}, which takes no prompt; "
            "generate images with it and audit them by `--images`"
        )
    if _takes_ddim(pipeline.scheduler):
        # PNDM's config need not mention clip_sample; DDIM would clip the latents to [-1, 1] and generate garbage.
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or default_device())


def _takes_ddim(scheduler: Any) -> bool:
    """Return whether DDIM's steps suit the model: it predicts noise or velocity, and was not distilled to few steps."""
    if type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler"):
        return False
    is_diffusion = scheduler.config.get("prediction_type", "") in ("epsilon", "v_prediction")
    is_flow = scheduler.config.get("use_flow_sigmas", False)
    return DDIMScheduler in scheduler.compatibles and is_diffusion and not is_flow


def default_device() -> torch.device:
    """Return the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(files: ModelFiles, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
    single = files.base if files.base.is_file() else files.addition
    if single is not None and _is_checkpoint(single):
        config = {} if files.addition is None else {"config": str(files.base)}
        kind = _pipeline_class(files.base) if files.base.is_dir() else _class_of_checkpoint(single)
        pipeline = kind.from_single_file(str(single), **config, **options, **_unchecked(kind))
        return _put_on(pipeline, files.loras)
    kind, index = _pipeline_class(files.base), _read_index(files.base)
    # Parts that were saved as missing, such as the third text encoder of Stable Diffusion 3, must be named so.
    absent = {name: None for name, source in index.items() if source == [None, None]}
    options |= {"use_safetensors": True, **absent, **_unchecked(kind)}
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(str(files.base), **options)
    except ValueError as error:
        if "AutoPipeline can't find" not in str(error):
            raise
        pipeline = DiffusionPipeline.from_pretrained(str(files.base), **options)
    return _put_on(pipeline, [*([files.addition] if files.addition else []), *files.loras])


def _pipeline_class(folder: Path) -> Any:
    """Return the class that a folder names; ``DiffusionPipeline`` where diffusers has none of that name."""
    name = _read_index(folder).get("_class_name")
    return getattr(diffusers, name, DiffusionPipeline) if isinstance(name, str) else DiffusionPipeline


def _read_index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return index


def _class_of_checkpoint(file: Path) -> Any:
    with safe_open(str(file), "pt") as weights:
        is_xl = any(key.startswith(_XL_KEY) for key in weights.keys())  # noqa: SIM118 (the handle is no dict)
    return diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline


def _unchecked(kind: Any) -> dict[str, Any]:
    """Return what keeps a pipeline from loading a safety checker or a watermark, where it has one."""
    without = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    known = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in without.items() if name in known}


def _put_on(pipeline: Any, loras: Sequence[Path]) -> Any:
    """Return the pipeline with LoRA weights added to its own, one file after the other."""
    for file in loras:
        if not hasattr(pipeline, "load_lora_weights"):
            raise ValueError(f"{type(pipeline).__name__} takes no LoRA")
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        # diffusers ignores a file of which it knows no key, with no more than a line in the log.
        if not any(hasattr(part, "peft_config") for part in pipeline.components.values()):
            raise ValueError(f"{file.name} holds no LoRA weights for this pipeline")
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

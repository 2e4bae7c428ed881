"""Where an export goes: under which name, and over what it may be written."""

import shutil
from pathlib import Path

from sd_memguard.config import ExportFormat
from sd_memguard.errors import UserError
from sd_memguard.models.pipeline import INDEX
from sd_memguard.runs.records import FOLDER
from sd_memguard.runs.trained_run import TrainedRun


class ExportError(UserError):
    """The export could not be written there, or does not hold what was meant when it is loaded again."""


def target_path(run: TrainedRun, format: ExportFormat, output: Path) -> Path:
    """Return where to write: ``output`` itself, or a file of the usual name in it.

    Raises:
        ExportError: the ending is that of a pickled file.
    """
    if format == "merged" or output.suffix == ".safetensors":
        return output
    if output.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise ExportError(
            f"`--output` {output} has the ending of a pickled file, which can run code when it is loaded; only "
            ".safetensors files are written"
        )
    names = {
        "single-file": f"{run.name}.safetensors",
        "lora-diffusers": "pytorch_lora_weights.safetensors",
        "lora-kohya": f"{run.name}-lora-kohya.safetensors",
    }
    return output / names[format]


def check_target(format: ExportFormat, target: Path, overwrite: bool) -> None:
    """Refuse to write over what is there, or, even with ``--overwrite``, over what is no export.

    Raises:
        ExportError: says what is there.
    """
    if not target.exists():
        return
    if target.is_dir() != (format == "merged"):
        kind = "a folder" if target.is_dir() else "a file"
        raise ExportError(f"`--output` {target} is {kind}, which `{format}` is not; name another")
    if not overwrite:
        raise ExportError(f"`--output` {target} exists; name another, or replace it by `--overwrite`")
    if target.is_dir() and (not (target / INDEX).is_file() or (target / FOLDER).exists()):
        raise ExportError(
            f"`--output` {target} is no exported pipeline, or a run folder, and is not replaced; name another folder"
        )


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def usage(run: TrainedRun, format: ExportFormat, path: Path) -> str:
    """Return a line that says how to load the export."""
    base, pipeline = run.config.pretrained_model_name_or_path, run.kind.pipeline.__name__
    if format == "merged":
        return f'diffusers: {pipeline}.from_pretrained("{path}")'
    if format == "single-file":
        return (
            "ComfyUI, A1111, Forge: put it into the folder of checkpoints; diffusers: "
            f'{pipeline}.from_single_file("{path}", config="{run.parts[0]}")'
        )
    if format == "lora-diffusers":
        return f'diffusers, on {base}: pipeline.load_lora_weights("{path}")'
    return f"ComfyUI, A1111, Forge, on {base}: put it into the folder of LoRA files, strength 1"

"""Checkpoints that are whole or absent: written under another name, flushed, listed in a manifest, then renamed.

Everything in one is safetensors or JSON; nothing is unpickled when it is read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_memguard.errors import UserError
from sd_memguard.files import TEMPORARY_PREFIX
from sd_memguard.runs.folder import FOLDER, PROXIES_FOLDER

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"

FREE_TO_CHANGE = {
    *("resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "output_dir", "logging_dir"),
    *(
        "report_to",
        "tracker_project_name",
        "validation_prompts",
        "validation_prompt",
        "num_validation_images",
        "validation_epochs",
        "proxy_store",
        "local_rank",
        "export_formats",
    ),
    *(
        "dataloader_num_workers",
        "push_to_hub",
        "hub_model_id",
        "cache_dir",
        "encoding_cache_dir",
        "dry_run",
        "offload_ema",
        "allow_tf32",
    ),
}
"""Settings that do not shape what is trained."""
LENGTH = {"max_train_steps", "num_train_epochs"}
"""Settings that may grow: the run goes on for longer."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or damaged, or that belongs to other settings."""


def save_checkpoint(output_dir: Path, global_step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint and return its folder; an older one of the same step is replaced.

    Args:
        output_dir: the run folder.
        global_step: steps over all proxies, part of the name.
        write: fills an empty folder.
    """
    final = output_dir / f"{PREFIX}{global_step}"
    temporary = temporary_folder(output_dir, global_step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:  # also an interrupt: what is half written is of no use and takes the room of the next try
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, temporary / MANIFEST]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    if os.name == "posix":
        _flush(output_dir)
    return final


def temporary_folder(output_dir: Path, global_step: int) -> Path:
    """Return where a checkpoint is while it is written."""
    return output_dir / f"{TEMPORARY_PREFIX}{PREFIX}{global_step}"


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed has left: a checkpoint half written, and resting proxies on disk."""
    shutil.rmtree(output_dir / FOLDER / PROXIES_FOLDER, ignore_errors=True)
    for folder in output_dir.glob(f"{TEMPORARY_PREFIX}{PREFIX}*"):
        shutil.rmtree(folder)


def prune_checkpoints(output_dir: Path, total_limit: int | None) -> None:
    """Remove the oldest checkpoints beyond the limit."""
    if total_limit is not None:
        for folder in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(folder)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first; other names that begin alike are passed over."""
    folders = [path for path in output_dir.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """Return the checkpoint to resume from, None where ``latest`` finds none at all.

    Args:
        output_dir: the run folder.
        wanted: ``latest`` (the newest complete one), the path of a checkpoint, or its name in the run folder.

    Raises:
        CheckpointError: the one that was named is missing or damaged, or all that exist are damaged.
    """
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        if not folder.is_dir():
            raise CheckpointError(f"`--resume_from_checkpoint` {wanted!r} is no folder; give one, or `latest`")
        verify_checkpoint(folder)
        return folder
    damaged = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("%s; trying the one before", error)
            damaged.append(folder.name)
        else:
            return folder
    if damaged:
        raise CheckpointError(
            f"all checkpoints in {output_dir} are damaged: {', '.join(damaged)}; start in a new folder"
        )
    return None


def verify_checkpoint(folder: Path, within: str = "") -> None:
    """Compare a checkpoint with its manifest.

    Args:
        folder: of the checkpoint.
        within: compare only the files whose names in the manifest begin so.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {MANIFEST} cannot be read ({error})") from error
    for name, expected in manifest.items():
        path = folder / name
        if name.startswith(within) and (not path.is_file() or _fingerprint(path) != expected):
            raise CheckpointError(f"{folder} is damaged: {name} is missing or differs from the manifest")


def refuse_changes(saved: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Compare the settings of a checkpoint with those of this run.

    A run that drew its seed takes the saved one with ``--seed``.

    Raises:
        CheckpointError: names the settings that differ.
    """
    differing = [name for name in present if name not in FREE_TO_CHANGE and saved.get(name) != present[name]]
    changed = [name for name in differing if not _grows(name, saved, present)]
    if changed:
        texts = ", ".join(f"`--{name}` {saved.get(name)} there, {present[name]} here" for name in changed)
        raise CheckpointError(
            f"{folder} was made with other settings: {texts}; give the same ones to go on, or name another "
            "`--output_dir` to begin again"
        )


def _grows(name: str, saved: dict[str, Any], present: dict[str, Any]) -> bool:
    """Say whether a setting makes the run longer than it was."""
    before, now = saved.get(name), present[name]
    return name in LENGTH and before is not None and now is not None and now > before


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "blake2b": hashlib.file_digest(file, hashlib.blake2b).hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

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
from sd_memguard.files import TEMPORARY_PREFIX, flush
from sd_memguard.runs.folder import BEST, FOLDER, PROXIES_FOLDER

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
ORDER = "order"
"""Entry of the manifest: which checkpoint of its run folder this is, in the order of writing.

A run that went on from an older checkpoint writes lower steps than those that another course of it has left.
"""

FREE_TO_CHANGE = {
    *("resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "output_dir", "logging_dir"),
    *(
        "report_to",
        "tracker_project_name",
        "validation_prompts",
        "validation_prompts_file",
        "validation_prompt",
        "num_validation_images",
        "validation_epochs",
        "num_class_images",
        "early_stopping_patience",
        "early_stopping_gap",
        "proxy_store",
        "local_rank",
        "export_formats",
    ),
    *(
        "dataloader_num_workers",
        "push_to_hub",
        "hub_model_id",
        "publish_validation_prompts",
        "cache_dir",
        "encoding_cache_dir",
        "dry_run",
        "offload_ema",
        "debug_loss",
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

    Raises:
        CheckpointError: a checkpoint of another program has that name.
    """
    final = output_dir / f"{PREFIX}{global_step}"
    if final.exists() and not _is_ours(final):
        raise CheckpointError(f"{final} was not written by sd-memguard and is not replaced; move it away")
    temporary = temporary_folder(output_dir, global_step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:  # also an interrupt: what is half written is of no use and takes the room of the next try
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    newest = list_checkpoints(output_dir)[-1:]
    order = max((_order(folder) for folder in newest), default=0) + 1
    manifest = {ORDER: order, **{path.relative_to(temporary).as_posix(): _fingerprint(path) for path in files}}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST]:
        flush(path)
    if final.exists():
        _discard(final)
    temporary.rename(final)
    if os.name == "posix":
        _flush_folder(output_dir)
    return final


def temporary_folder(output_dir: Path, global_step: int) -> Path:
    """Return where a checkpoint is while it is written."""
    return output_dir / f"{TEMPORARY_PREFIX}{PREFIX}{global_step}"


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed has left: a checkpoint half written, offloaded proxies, the best model."""
    for name in (PROXIES_FOLDER, BEST):
        shutil.rmtree(output_dir / FOLDER / name, ignore_errors=True)
    for folder in output_dir.glob(f"{TEMPORARY_PREFIX}{PREFIX}*"):
        shutil.rmtree(folder)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint under a temporary name: half removed it would pass for one of another program."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{TEMPORARY_PREFIX}{checkpoint.name}-removed")))


def prune_checkpoints(output_dir: Path, total_limit: int | None) -> None:
    """Remove the checkpoints that were written first, beyond the limit."""
    if total_limit is None:
        return
    for folder in list_checkpoints(output_dir)[:-total_limit]:
        try:
            _discard(folder)
        except OSError as error:  # on Windows somebody may have a file of it open; the next time will do
            logger.warning("%s is beyond --checkpoints_total_limit, but cannot be removed: %s", folder, error)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in the order of writing; those of other programs are passed over."""
    folders = [folder for folder in _numbered(output_dir) if _is_ours(folder)]
    return sorted(folders, key=lambda folder: (_order(folder), int(folder.name.removeprefix(PREFIX))))


def foreign_checkpoints(output_dir: Path) -> list[str]:
    """Return the names of folders of another program (diffusers' scripts) that are named like ours."""
    return sorted(folder.name for folder in _numbered(output_dir) if not _is_ours(folder))


def _numbered(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]


def _is_ours(folder: Path) -> bool:
    """Say whether a checkpoint is one of these, maybe damaged; a guarded script's has a part of that name, too."""
    holds_state = (folder / FOLDER / "state.json").is_file() and not list(folder.glob("*.*"))
    return (folder / MANIFEST).is_file() or holds_state


def _order(folder: Path) -> int:
    """Return which checkpoint of its folder this is, 0 where that cannot be read."""
    try:
        return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get(ORDER, 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return 0


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """Return the checkpoint to resume from, None where ``latest`` finds none at all.

    Args:
        output_dir: the run folder.
        wanted: ``latest`` (the complete one that was written last), the path of a checkpoint, or its name in the run
            folder.

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
    # Those whose manifest cannot be read first, so that they are told of.
    for folder in sorted(reversed(list_checkpoints(output_dir)), key=lambda folder: _order(folder) > 0):
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
        manifest = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {MANIFEST} cannot be read ({error})") from error
    manifest.pop(ORDER, None)
    for name, expected in manifest.items():
        path = folder / name
        if name.startswith(within) and (not path.is_file() or _fingerprint(path) != expected):
            raise CheckpointError(f"{folder} is damaged: {name} is missing or differs from the manifest")


def refuse_changes(saved: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Compare the settings of a checkpoint with those of this run.

    A run that chose its seed takes the saved one with ``--seed``.

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


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

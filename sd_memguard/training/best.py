"""The model of the round with the lowest held-out loss: which it is, where it is kept, and when to stop.

Which round it is follows from the rounds' rows, which checkpoints hold anyway; its weights are a file that is never
written to again, so that checkpoints hold them by a hard link.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from sd_memguard.files import TEMPORARY_PREFIX, flush, link_or_copy
from sd_memguard.runs.folder import ADAPTER, BEST, FOLDER
from sd_memguard.runs.trained_run import UNET

Rounds = Sequence[dict[str, Any]]
"""Rows of ``rounds.jsonl``."""


def best_round(rounds: Rounds) -> dict[str, Any] | None:
    """Return the row with the lowest held-out loss, the first of several, None where none is finite."""
    measured = [row for row in rounds if math.isfinite(row.get("heldout_loss", math.nan))]
    return min(measured, key=lambda row: row["heldout_loss"], default=None)


def is_patience_over(rounds: Rounds, patience: int) -> bool:
    """Say whether the last ``patience`` rounds or more have not lowered the held-out loss; never with 0.

    >>> rows = [{"round": n + 1, "heldout_loss": loss} for n, loss in enumerate([0.3, 0.1, 0.2, 0.1])]
    >>> is_patience_over(rows, 2), is_patience_over(rows, 3)
    (True, False)
    """
    best = best_round(rounds)
    return best is not None and 0 < patience <= len(rounds) - best["round"]


class BestModel:
    """The best model so far, in a folder of the run.

    Args:
        output_dir: the run folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER / BEST

    def save(self, unet: UNet2DConditionModel, write_adapter: Callable[[Path], None]) -> None:
        """Replace what is kept: the UNet, and what ``write_adapter`` writes into a folder."""
        temporary = self.folder.with_name(TEMPORARY_PREFIX + BEST)
        shutil.rmtree(temporary, ignore_errors=True)
        unet.save_pretrained(temporary / UNET, max_shard_size="100GB")
        write_adapter(temporary)
        for file in filter(Path.is_file, temporary.rglob("*")):
            flush(file)
        self.remove()
        temporary.rename(self.folder)

    def load(self) -> UNet2DConditionModel:
        """Return what is kept, in float32."""
        return UNet2DConditionModel.from_pretrained(self.folder / UNET, use_safetensors=True)

    def copy_adapter(self, folder: Path) -> None:
        """Copy the adapter to a folder, where one is kept."""
        if (self.folder / ADAPTER).exists():
            shutil.copyfile(self.folder / ADAPTER, folder / ADAPTER)

    def save_to(self, checkpoint: Path) -> None:
        """Link what is kept into a checkpoint; nothing is done where nothing is."""
        _link_folder(self.folder, checkpoint / FOLDER / BEST)

    def restore_from(self, checkpoint: Path) -> None:
        """Keep what a checkpoint holds, and nothing where it holds nothing."""
        self.remove()
        _link_folder(checkpoint / FOLDER / BEST, self.folder)

    def remove(self) -> None:
        """Keep nothing any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _link_folder(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, place)

"""The model of the round with the lowest held-out loss: which it is, where it is kept, and when to stop.

A round may be too late although its held-out loss is the lowest: the loss on training images has fallen so far below
that on held-out ones that the model replicates them (docs/results.md measures how far that is).

Which round it is follows from the rounds' rows, which checkpoints hold anyway; its weights are a file that is never
written to again, so that checkpoints hold them by a hard link.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from sd_memguard.files import TEMPORARY_PREFIX, flush, link_or_copy
from sd_memguard.runs.folder import ADAPTER, BEST, FOLDER
from sd_memguard.runs.trained_run import UNET

Rounds = Sequence[dict[str, Any]]
"""Rows of ``rounds.jsonl``."""
Losses = Mapping[str, float]
"""Mean losses of the same images and noises, by ``train_loss`` and ``heldout_loss``."""


def relative_gap(losses: Losses, before: Losses) -> float:
    """Return by which share the training loss has fallen further than the held-out loss since training began.

    With r the quotient of both losses this is ``1 - r / r_before``. The images may differ in difficulty, which is why
    the quotient is compared with that of the same images before.

    Args:
        losses: ``train_loss`` and ``heldout_loss`` now.
        before: the same before training.

    >>> before = {"train_loss": 0.12, "heldout_loss": 0.10}
    >>> round(relative_gap({"train_loss": 0.06, "heldout_loss": 0.10}, before), 3)
    0.5
    """
    if 0.0 in (losses["heldout_loss"], before["train_loss"], before["heldout_loss"]):
        return math.nan
    quotient, quotient_before = (one["train_loss"] / one["heldout_loss"] for one in (losses, before))
    return 1 - quotient / quotient_before


def best_round(rounds: Rounds, most_gap: float = 0.0) -> dict[str, Any] | None:
    """Return the row with the lowest held-out loss, the first of several, None where none is finite.

    Args:
        rounds: what was measured.
        most_gap: rows with a larger relative gap are left out, unless it is larger in all; 0: none is.
    """
    measured = [row for row in rounds if math.isfinite(row.get("heldout_loss", math.nan))]
    if most_gap:
        measured = [row for row in measured if not is_gap_reached(row, most_gap)] or measured[:1]
    return min(measured, key=lambda row: row["heldout_loss"], default=None)


def is_gap_reached(row: dict[str, Any], most_gap: float) -> bool:
    """Say whether the relative gap of a round is larger than is wanted; never with 0."""
    return 0 < most_gap < row.get("relative_gap", math.nan)


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

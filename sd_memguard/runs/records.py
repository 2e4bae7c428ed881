"""The records of a run in ``memguard/``: settings, rounds, samples, the rules' curves; and the closing summary."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file

from sd_memguard.core.rules import SampleRule
from sd_memguard.ensemble import Ensemble
from sd_memguard.files import replace_file, replace_text
from sd_memguard.runs.folder import BANKS, CONFIG, FOLDER, ROUNDS, SAMPLES, SUMMARY
from sd_memguard.runs.ranking import memory_prone_order
from sd_memguard.sample_guard import SampleGuard

NUM_MEMORY_PRONE = 10


class SampleTable(NamedTuple):
    """What the records say of each usable sample, in columns of equal length.

    Attributes:
        sample_ids: (n,) int64.
        files: relative to the folder of images, None where there is no file.
        captions: the (first) caption of each.
        groups: (n,) int64, near-duplicates share a number; None where they were not looked for.
    """

    sample_ids: npt.NDArray[np.int64]
    files: Any
    captions: Any
    groups: npt.NDArray[np.int64] | None = None

    def duplicate_groups(self) -> pa.Array:
        """Return the first sample of each sample's group of near-duplicates, null for a sample without any."""
        if self.groups is None:
            return pa.nulls(len(self.sample_ids), pa.int64())
        _, inverse, sizes = np.unique(self.groups, return_inverse=True, return_counts=True)
        return pa.array(self.groups, mask=sizes[inverse] == 1)


class RunRecords:
    """Writes the files of ``memguard/`` in a run folder, each one whole or not at all.

    Args:
        output_dir: the run folder.
        writes: whether this process is the one that writes.
    """

    def __init__(self, output_dir: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = output_dir / FOLDER, writes
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, record: dict[str, Any]) -> None:
        """Write every setting, with what ``auto`` and a missing seed were resolved to.

        The end of a run that now goes on for longer is taken back, so that it does not pass for the end of this one.
        """
        if not self.writes:
            return
        replace_text(self.folder / CONFIG, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        for file in (self.folder / SUMMARY, self.folder.parent / "model_index.json"):
            file.unlink(missing_ok=True)

    def write_rounds(self, rounds: Sequence[dict[str, Any]]) -> None:
        """Write a line per round; what is not finite, such as the error of a single image, becomes null."""
        if self.writes:
            replace_text(self.folder / ROUNDS, "".join(json.dumps(_finite(row)) + "\n" for row in rounds))

    def write_samples(self, table: SampleTable, guard: SampleGuard) -> None:
        """Write a row per usable sample: file, caption, shard and counts."""
        if not self.writes:
            return
        ids = table.sample_ids
        columns = {
            "sample_id": ids,
            "file": table.files,
            "caption": table.captions,
            "shard": guard.plan.assignment[ids].numpy(),
            "duplicate_group": table.duplicate_groups(),
            **{name: counts[ids].numpy() for name, counts in guard.ledger.columns().items()},
            "skip_ratio": guard.ledger.skip_ratio()[ids].numpy(),
        }
        replace_file(self.folder / SAMPLES, lambda temporary: pq.write_table(pa.table(columns), temporary))

    def write_curves(self, rules: Sequence[SampleRule]) -> None:
        """Write the curves of each proxy's rule, e.g. ``shard_<k>.mean`` and ``shard_<k>.times_seen`` of AGC, (T,)."""
        if not self.writes:
            return
        tensors = {
            f"shard_{k}.{name}": curve.cpu() for k, rule in enumerate(rules) for name, curve in rule.curves().items()
        }
        replace_file(self.folder / BANKS, lambda temporary: save_file(tensors, temporary))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended; its speed stays out, so that the same run gives the same file."""
        kept = {name: value for name, value in summary.items() if name != "images_per_second"}
        replace_text(self.folder / SUMMARY, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def run_summary(
    ensemble: Ensemble, table: SampleTable, images_per_second: float, kept: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the closing lines, the model card and callers report.

    Args:
        ensemble: of the run.
        table: its samples.
        images_per_second: trained by all processes.
        kept: the row of the round whose model is the result, None before the first has ended.
    """
    progress, guard, kept = ensemble.progress, ensemble.guard, kept or {}
    ledger = guard.ledger
    seen = max(int(ledger.seen.sum()), 1)
    return {
        "global_step": progress.global_step,
        "num_shards": ensemble.schedule.num_shards,
        "num_rounds": ensemble.schedule.num_rounds,
        "epochs": int(ledger.seen.sum()) / sum(guard.epoch_lengths()),
        "extra_steps": sum(progress.extra_steps),
        "empty_steps": progress.empty_steps,
        "nonfinite_steps": progress.nonfinite_steps,
        "unreadable_samples": progress.unreadable_samples,
        "image_forwards": progress.image_forwards,
        "images_per_second": images_per_second,
        **{f"{column}_fraction": int(counts.sum()) / seen for column, counts in ledger.actions.items()},
        "moved_samples": int(ledger.moves.sum()),
        "augment_queue_left": sum(len(queue) for queue in guard.queues),
        "kept_step": kept.get("global_step"),
        "train_loss": kept.get("train_loss"),
        "heldout_loss": kept.get("heldout_loss"),
        "relative_gap": kept.get("relative_gap"),
        "memory_prone": memory_prone_samples(table, guard),
    }


def memory_prone_samples(table: SampleTable, guard: SampleGuard) -> list[dict[str, Any]]:
    """Return the most memory-prone samples first, none that was always a clean update; see `ranking.py`."""
    ids, ledger = table.sample_ids, guard.ledger
    seen, ratio = ledger.seen[ids].numpy(), ledger.skip_ratio()[ids]
    order = memory_prone_order(seen, ledger.not_clean()[ids].numpy())[:NUM_MEMORY_PRONE]
    return [
        {
            "sample_id": int(ids[position]),
            "file": _plain(table.files[position]),
            "caption": _plain(table.captions[position]),
            "skip_ratio": round(float(ratio[position]), 4),
            "seen": int(seen[position]),
        }
        for position in order.tolist()
    ]


def _plain(value: Any) -> Any:
    """Return the Python value of an Arrow scalar, or the value itself."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _finite(value: Any) -> Any:
    """Return JSON values in which numbers that JSON does not know are None."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

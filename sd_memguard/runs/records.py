"""What a run tells of itself in ``memguard/``: settings, rounds, samples, memory banks; and the closing summary."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from sd_memguard.config import TrainConfig
from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.core.progress import Progress
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.core.shards import Moves
from sd_memguard.data.samples import Samples
from sd_memguard.files import replace_file, replace_text
from sd_memguard.guard import MemorizationGuard
from sd_memguard.runs.folder import BANKS, CONFIG, FOLDER, ROUNDS, SAMPLES, SUMMARY
from sd_memguard.runs.ranking import memory_prone_order

NUM_MEMORY_PRONE = 10
SUMS = ("empty_steps", "nonfinite_steps")
"""What a run counts from its beginning and a round reports for itself."""


class RunRecords:
    """Writes the files of ``memguard/`` in a run folder, each one whole or not at all.

    Args:
        output_dir: the run folder.
        writes: whether this process is the one that writes; the others keep the rounds in mind only.
    """

    def __init__(self, output_dir: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = output_dir / FOLDER, writes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rounds: list[dict[str, Any]] = []

    def begin(self, config: TrainConfig, resolved: dict[str, Any]) -> None:
        """Write every setting as given, with what ``auto`` and a missing seed were resolved to.

        The end of a run that now goes on for longer is taken back, so that it does not pass for the end of this one.
        """
        if not self.writes:
            return
        text = json.dumps({**config.to_dict(), **resolved}, indent=2, ensure_ascii=False)
        replace_text(self.folder / CONFIG, text + "\n")
        for file in (self.folder / SUMMARY, self.folder.parent / "model_index.json"):
            file.unlink(missing_ok=True)

    def restore_rounds(self, rounds: list[dict[str, Any]]) -> None:
        """Take over the rounds of an interrupted run; later ones are about to be trained again."""
        self.rounds = list(rounds)
        self._write_rounds()

    def add_round(self, row: dict[str, Any]) -> None:
        """Append a round; what is not finite, such as the standard error of a single image, becomes null."""
        self.rounds.append(_finite(row))
        self._write_rounds()

    def _write_rounds(self) -> None:
        if not self.writes:
            return
        text = "".join(json.dumps(row) + "\n" for row in self.rounds)
        replace_text(self.folder / ROUNDS, text)

    def write_samples(self, samples: Samples, guard: MemorizationGuard) -> None:
        """Write a row per usable sample: file, caption, shard and counts."""
        if not self.writes:
            return
        ids = samples.sample_ids
        ledger = guard.ledger
        columns = {
            "sample_id": ids,
            "file": samples.files(),
            "caption": pc.list_element(samples.caption_lists(), 0),
            "shard": guard.plan.assignment[ids].numpy(),
            "duplicate_group": duplicate_groups(samples),
            **{name: getattr(ledger, name)[ids].numpy() for name in ("seen", "skipped", "augmented", "moves")},
            "skip_ratio": ledger.skip_ratio()[ids].numpy(),
        }
        replace_file(self.folder / SAMPLES, lambda temporary: pq.write_table(pa.table(columns), temporary))

    def write_banks(self, banks: list[LossMemoryBank]) -> None:
        """Write each proxy's memory bank: ``shard_<k>.mean`` and ``shard_<k>.visits``, both (T,)."""
        if not self.writes:
            return
        tensors = {}
        for shard_index, bank in enumerate(banks):
            tensors[f"shard_{shard_index}.mean"] = bank_curve(bank).cpu()
            tensors[f"shard_{shard_index}.visits"] = bank.visits.cpu()
        replace_file(self.folder / BANKS, lambda temporary: save_file(tensors, temporary))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended; its speed stays out, so that the same run gives the same file."""
        kept = {name: value for name, value in summary.items() if name != "images_per_second"}
        replace_text(self.folder / SUMMARY, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def round_row(
    kind: str,
    progress: Progress,
    before: list[dict[str, Any]],
    banks: list[LossMemoryBank],
    sizes: list[int],
    distances: list[float],
    moves: Moves | None,
    measured: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """Return a line of rounds.jsonl.

    Args:
        kind: what ends the round.
        progress: where the run stands, the round's meters in it.
        before: the lines of the rounds before.
        banks: of each proxy.
        sizes: samples of each shard in this round.
        distances: of each proxy from the mean.
        moves: of a redistribution.
        measured: probe losses by name: mean and standard error.
    """
    summaries = [bank_summary(bank) for bank in banks]
    row: dict[str, Any] = {
        "round": progress.round_index + 1,
        "kind": kind,
        "global_step": progress.global_step,
        "extra_steps": progress.round_extra_steps,
        **{name: getattr(progress, name) - sum(row[name] for row in before) for name in SUMS},
        "image_forwards": progress.image_forwards,
        "shards": [
            {"shard": k, "size": sizes[k], **meter.summary(), "distance": distances[k], **summaries[k]}
            for k, meter in enumerate(progress.meters)
        ],
        "moves": [] if moves is None else moves.counts(),
    }
    for name, (mean, error) in measured.items():
        row[name], row[f"{name}_error"] = mean, error
    return row


def run_summary(
    progress: Progress,
    schedule: RoundSchedule,
    guard: MemorizationGuard,
    samples: Samples,
    rounds: list[dict[str, Any]],
    images_per_second: float,
) -> dict[str, Any]:
    """Return what the closing lines, the model card and callers report.

    Args:
        progress: where the run stands.
        schedule: of its rounds.
        guard: holds the ledger and the queues.
        samples: of the run.
        rounds: the lines of rounds.jsonl.
        images_per_second: trained by all processes.
    """
    ledger = guard.ledger
    visits = max(int(ledger.seen.sum()), 1)
    last = rounds[-1] if rounds else {}
    return {
        "global_step": progress.global_step,
        "num_shards": schedule.num_shards,
        "num_rounds": schedule.num_rounds,
        "extra_steps": sum(progress.extra_steps),
        "empty_steps": progress.empty_steps,
        "nonfinite_steps": progress.nonfinite_steps,
        "unreadable_samples": progress.unreadable_samples,
        "image_forwards": progress.image_forwards,
        "images_per_second": images_per_second,
        "skipped_fraction": int(ledger.skipped.sum()) / visits,
        "augmented_fraction": int(ledger.augmented.sum()) / visits,
        "moved_samples": int(ledger.moves.sum()),
        "augment_queue_left": sum(len(queue) for queue in guard.queues),
        "train_loss": last.get("train_loss"),
        "heldout_loss": last.get("heldout_loss"),
        "memory_prone": memory_prone_samples(samples, guard),
    }


def bank_curve(bank: LossMemoryBank) -> torch.Tensor:
    """Return the mean loss at every timestep, (T,) float32, NaN where nothing was visited (in paper mode, too)."""
    timesteps = torch.arange(bank.num_timesteps, device=bank.visits.device)
    mean = bank.mean(timesteps)
    return torch.where(bank.visits > 0, mean, torch.nan) if bank.mode == "paper" else mean


def bank_summary(bank: LossMemoryBank) -> dict[str, float | None]:
    """Return the mean of the bank over the timesteps it knows, and the share of timesteps it decides on."""
    curve = bank_curve(bank)
    known = curve[curve.isfinite()]
    ratio = bank.loss_ratio(torch.arange(len(curve), device=curve.device), torch.ones_like(curve))
    return {
        "bank_mean": float(known.double().mean()) if len(known) else None,
        "bank_coverage": float(ratio.isfinite().double().mean()),
    }


def duplicate_groups(samples: Samples) -> pa.Array:
    """Return the first sample of each usable sample's group of duplicates, null for a sample without duplicates."""
    ids = samples.sample_ids
    if samples.groups is None:
        return pa.nulls(len(ids), pa.int64())
    groups = samples.groups[ids]
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return pa.array(groups, mask=sizes[inverse] == 1)


def memory_prone_samples(samples: Samples, guard: MemorizationGuard) -> list[dict[str, Any]]:
    """Return the most memory-prone samples first, none that was never skipped or augmented; see `ranking.py`."""
    ledger, ratio = guard.ledger, guard.ledger.skip_ratio()
    order = memory_prone_order(ledger.seen.numpy(), (ledger.skipped + ledger.augmented).numpy())[:NUM_MEMORY_PRONE]
    return [
        {
            "sample_id": sample_id,
            "file": samples.file(sample_id),
            "caption": samples.captions(sample_id)[0],
            "skip_ratio": round(float(ratio[sample_id]), 4),
            "seen": int(ledger.seen[sample_id]),
        }
        for sample_id in order.tolist()
    ]


def count_moves(moves: Moves) -> list[dict[str, int]]:
    """Return how many samples went from which shard to which."""
    return moves.counts()


def _finite(value: Any) -> Any:
    """Return JSON values in which numbers that JSON does not know are None."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

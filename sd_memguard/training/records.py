"""What a run tells of itself in ``memguard/``: config.json, rounds.jsonl, samples.parquet; and the closing summary."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sd_memguard.config import TrainConfig
from sd_memguard.core.shards import Moves
from sd_memguard.guard import MemorizationGuard
from sd_memguard.training.samples import Samples

FOLDER = "memguard"
PROXIES_FOLDER = "proxies"
NUM_MEMORY_PRONE = 10


class RunRecords:
    """Writes the files of ``memguard/`` in a run folder.

    Args:
        output_dir: the run folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rounds: list[dict[str, Any]] = []

    def write_config(self, config: TrainConfig, resolved: dict[str, Any]) -> None:
        """Write every setting as given, with what ``auto`` and a missing seed were resolved to."""
        text = json.dumps({**config.to_dict(), **resolved}, indent=2, ensure_ascii=False)
        (self.folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def restore_rounds(self, num_rounds: int) -> None:
        """Keep the first rounds of an interrupted run; later ones are about to be trained again."""
        file = self.folder / "rounds.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rounds = [json.loads(line) for line in lines[:num_rounds]]
        self._write_rounds()

    def add_round(self, row: dict[str, Any]) -> None:
        """Append a round."""
        self.rounds.append(row)
        self._write_rounds()

    def _write_rounds(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rounds)
        (self.folder / "rounds.jsonl").write_text(text, encoding="utf-8")

    def write_samples(self, samples: Samples, guard: MemorizationGuard) -> None:
        """Write a row per usable sample: file, caption, shard and counts."""
        ids = samples.sample_ids
        ledger = guard.ledger
        columns = {
            "sample_id": ids,
            "file": [samples.file(sample_id) for sample_id in ids.tolist()],
            "caption": [samples.captions(sample_id)[0] for sample_id in ids.tolist()],
            "shard": guard.plan.assignment[ids].numpy(),
            **{name: getattr(ledger, name)[ids].numpy() for name in ("seen", "skipped", "augmented", "moves")},
            "skip_ratio": ledger.skip_ratio()[ids].numpy(),
        }
        pq.write_table(pa.table(columns), self.folder / "samples.parquet")


def memory_prone_samples(samples: Samples, guard: MemorizationGuard) -> list[dict[str, Any]]:
    """Return the most memory-prone samples first, none that was never skipped.

    Ranked by unclean visits / (visits + 1), so that one visit out of one does not outrank nine out of ten.
    """
    ratio, seen = guard.ledger.skip_ratio(), guard.ledger.seen
    order = torch.argsort(ratio * seen / (seen + 1), descending=True, stable=True)[:NUM_MEMORY_PRONE]
    return [
        {
            "sample_id": sample_id,
            "file": samples.file(sample_id),
            "caption": samples.captions(sample_id)[0],
            "skip_ratio": round(float(ratio[sample_id]), 4),
            "seen": int(guard.ledger.seen[sample_id]),
        }
        for sample_id in order.tolist()
        if ratio[sample_id] > 0
    ]


def count_moves(moves: Moves) -> list[dict[str, int]]:
    """Return how many samples went from which shard to which."""
    return moves.counts()

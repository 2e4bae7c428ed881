"""The files of ``memguard/`` in the folder that a guarded script writes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sd_memguard.guard import MemorizationGuard

FOLDER = "memguard"


class ScriptRecords:
    """Writes ``config.json``, ``rounds.jsonl`` and ``samples.parquet``.

    Args:
        output_dir: the script's folder.
        guard: the guard, in its loop.
        dataset: the script's dataset.
        arguments: the script's arguments.
    """

    def __init__(self, output_dir: Path, guard: MemorizationGuard, dataset: Any, arguments: Any) -> None:
        self.folder = output_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.guard = guard
        self.data_dir = _data_dir(arguments)
        self.files, self.captions = _files(dataset, arguments), _captions(dataset, arguments)

    def write_config(self, script: Path, total_steps: int, steps_per_round: int) -> None:
        """Write the guard's settings with what ``auto`` came to, and which script it was."""
        settings = dataclasses.asdict(self.guard.config)
        resolved = {
            "seed": self.guard.seed,
            "num_shards": self.guard.num_shards,
            "steps_per_round": steps_per_round,
            "max_train_steps": total_steps,
            "script": script.name,
            "train_data_dir": self.data_dir,
        }
        text = json.dumps({**settings, **resolved}, indent=2, ensure_ascii=False)
        (self.folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def write(self) -> None:
        """Write the rounds so far, and a row per sample."""
        assert self.guard.attachment is not None
        rows = self.guard.attachment.rounds.history
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "rounds.jsonl").write_text(text, encoding="utf-8")
        ledger, assignment = self.guard.ledger, self.guard.plan.assignment
        columns: dict[str, Any] = {
            "sample_id": range(len(assignment)),
            "file": self.files,
            "caption": self.captions,
            "shard": assignment.numpy(),
            **{name: getattr(ledger, name).numpy() for name in ("seen", "skipped", "augmented", "moves")},
            "skip_ratio": ledger.skip_ratio().numpy(),
        }
        pq.write_table(pa.table(columns), self.folder / "samples.parquet")


def _data_dir(arguments: Any) -> str | None:
    """Return the script's folder of images, where it has one."""
    return getattr(arguments, "train_data_dir", None) or getattr(arguments, "instance_data_dir", None)


def _files(dataset: Any, arguments: Any) -> list[str | None]:
    """Return each sample's file as far as the dataset knows it, relative to the script's data folder."""
    paths: list[Any] = [None] * len(dataset)
    if hasattr(dataset, "instance_images_path"):  # the DreamBooth scripts' own dataset, which repeats its images
        known = list(dataset.instance_images_path)
        paths = [known[index % len(known)] for index in range(len(dataset))]
    elif hasattr(dataset, "cast_column"):
        paths = _huggingface_paths(dataset)
    root = _data_dir(arguments)
    return [None if path is None else (os.path.relpath(path, root) if root else str(path)) for path in paths]


def _huggingface_paths(dataset: Any) -> list[Any]:
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            undecoded = dataset.with_format(None).cast_column(name, datasets.Image(decode=False))
            return [image["path"] for image in undecoded[name]]
    return [None] * len(dataset)


def _captions(dataset: Any, arguments: Any) -> list[str | None]:
    """Return each sample's (first) caption."""
    column = getattr(arguments, "caption_column", None)
    if column is not None and column in getattr(dataset, "column_names", []):
        captions = dataset.with_format(None)[column]
        return [caption if isinstance(caption, str) else next(iter(caption), None) for caption in captions]
    return [getattr(arguments, "instance_prompt", None)] * len(dataset)

"""The images that the arms are trained on: the bundled set, and two changed copies of it."""

import json
import random
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import RandAugment, RandomAffine

from sd_memguard.assets import demo_data_path

COPIES, MAGNITUDE = 4, 5
"""Changed versions of each image, and the magnitude of RandAugment, of 30 (the method's own go up to 5)."""
WHITE = [255, 255, 255]
CHANGES = {
    "augmented": RandAugment(num_ops=2, magnitude=MAGNITUDE, fill=WHITE),
    "moved": RandomAffine(degrees=5, translate=(0.06, 0.06), scale=(0.9, 1.1), fill=WHITE),
}
"""What is done to the images of a set whose name ends so; the second leaves their colours alone."""


def training_folder(name: str, work_dir: Path) -> Path:
    """Return the folder of a set, made in ``work_dir`` where it is not there yet.

    ``demo`` is the bundled one; ``distinct`` has each of its images once; ``augmented`` has changed versions of every
    row in its place, so that no image is seen as it is; ``distinct_augmented`` and ``distinct_moved`` have both.
    """
    if name == "demo":
        return demo_data_path()
    folder = work_dir / f"data-{name}"
    if not (folder / "metadata.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = _distinct(_rows()) if name.startswith("distinct") else _rows()
        change = CHANGES.get(name.rpartition("_")[2])
        _write_as_they_are(folder, rows) if change is None else _write_changed(folder, rows, change)
    return folder


def _rows() -> list[dict[str, str]]:
    lines = (demo_data_path() / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _distinct(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    # Each copy of a repeated image is a file of its own: it is the content that tells.
    return list({(demo_data_path() / row["file_name"]).read_bytes(): row for row in reversed(rows)}.values())


def _write_as_they_are(folder: Path, rows: list[dict[str, str]]) -> None:
    for row in rows:
        (folder / row["file_name"]).write_bytes((demo_data_path() / row["file_name"]).read_bytes())
    _write_metadata(folder, rows)


def _write_changed(folder: Path, rows: list[dict[str, str]], change: torch.nn.Module) -> None:
    written = []
    torch.manual_seed(0)
    random.seed(0)
    for number, row in enumerate(rows):
        with Image.open(demo_data_path() / row["file_name"]) as opened:
            image = opened.convert("RGB")
        for copy in range(COPIES):
            name = f"{number:04}-{copy}.png"
            change(image).save(folder / name)
            written.append({"file_name": name, "text": row["text"]})
    _write_metadata(folder, written)


def _write_metadata(folder: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")

"""The datasets of the benchmark: distinct captioned images, held-out ones, and training folders with duplicates.

``avatars`` is the demo set, whose attributes are known, ``emoji`` the Twemoji beside this file, ``clothing`` the first
images of Fashion-MNIST, as Debian's package ``dataset-fashion-mnist`` installs them.
"""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from sd_memguard.assets import demo_data_path, demo_heldout_path

SIZE = 64
NUM_DUPLICATED, NUM_COPIES, NUM_FEW = 32, 16, 160
Duplicates = Literal["exact", "near", "none", "absent", "few"]
EMOJI = Path(__file__).parent / "emoji"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
NUM_TRAINED, NUM_HELDOUT = 512, 256


class CaptionedImage(NamedTuple):
    """An image (PNG bytes) with its caption, and where known the attributes that it names and those it leaves open."""

    png: bytes
    text: str
    named: dict[str, str]
    open: dict[str, str]


class Dataset(NamedTuple):
    """Distinct images: those to train on, of which the first 32 get duplicates, and held-out ones."""

    train: list[CaptionedImage]
    heldout: list[CaptionedImage]


def load_dataset(name: str) -> Dataset:
    """Return a dataset by its name, see ``DATASETS``."""
    return DATASETS[name]()


def training_folder(dataset: Dataset, duplicates: Duplicates, folder: Path) -> Path:
    """Write the rows to train on as an imagefolder, unless it is there, and return it; see ``training_rows``."""
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    metadata = []
    for index, row in enumerate(training_rows(dataset, duplicates)):
        (folder / f"{index:04d}.png").write_bytes(row.png)
        metadata.append({"file_name": f"{index:04d}.png", "text": row.text})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in metadata)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def training_rows(dataset: Dataset, duplicates: Duplicates) -> list[CaptionedImage]:
    """Return the rows to train on, shuffled.

    Args:
        dataset: whose images.
        duplicates: of the first 32 images: ``exact`` copies under their own caption; ``near`` ones, each cropped by 2
            to 10%, some flipped, the hue turned and recompressed, under reworded captions; ``none``; ``absent``, not
            even the images themselves, so that their prompts show what a model finds that never saw them
            (counterfactual memorization, https://arxiv.org/abs/2112.12938); or ``few``, the first 160 images alone,
            each once, for runs of many epochs.
    """
    draw = random.Random(0)
    start, stop = NUM_DUPLICATED if duplicates == "absent" else 0, NUM_FEW if duplicates == "few" else None
    rows = list(dataset.train[start:stop])
    for image in dataset.train[:NUM_DUPLICATED] if duplicates in ("exact", "near") else ():
        rows += [image if duplicates == "exact" else _altered(image, draw) for _ in range(NUM_COPIES - 1)]
    draw.shuffle(rows)
    return rows


def _altered(image: CaptionedImage, draw: random.Random) -> CaptionedImage:
    pixels = as_pixels(image)
    side = round(SIZE * (1 - draw.uniform(0.02, 0.10)))
    left, top = (draw.randint(0, SIZE - side) for _ in range(2))
    cropped = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    changed = cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if draw.random() < 0.3:
        changed = changed.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed = _turn_hue(changed, draw.uniform(-0.03, 0.03))
    buffer = io.BytesIO()
    changed.save(buffer, "JPEG", quality=draw.randint(60, 95))
    return image._replace(png=_png(np.asarray(Image.open(buffer))), text=_reworded(image.text, draw))


def _turn_hue(image: Image.Image, by: float) -> Image.Image:
    hsv = np.asarray(image.convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(255 * by)) % 256
    return Image.fromarray(hsv, "HSV").convert("RGB")


def _reworded(text: str, draw: random.Random) -> str:
    """Return the caption with its parts, or its words, in another order and perhaps one of them dropped."""
    separator = ", " if ", " in text else " "
    first, *rest = text.split(separator)
    draw.shuffle(rest)
    if len(rest) > 1 and draw.random() < 0.5:
        rest.pop()
    return separator.join([first, *rest])


def as_pixels(image: CaptionedImage) -> Any:
    """Return the pixels of an image, (64, 64, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(image.png)).convert("RGB"))


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _read_folder(folder: Path) -> list[CaptionedImage]:
    """Return the distinct images of a folder, the most frequent first."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    attributes: dict[str, dict[str, Any]] = {}
    if (folder / "attributes.jsonl").exists():
        lines = (folder / "attributes.jsonl").read_text(encoding="utf-8").splitlines()
        attributes = {row["file_name"]: row for row in map(json.loads, lines)}
    found: dict[bytes, CaptionedImage] = {}
    counts: dict[bytes, int] = {}
    for row in rows:
        png, known = (folder / row["file_name"]).read_bytes(), attributes.get(row["file_name"], {})
        found.setdefault(png, CaptionedImage(png, row["text"], known.get("named", {}), known.get("open", {})))
        counts[png] = counts.get(png, 0) + 1
    return sorted(found.values(), key=lambda image: -counts[image.png])


def _avatars() -> Dataset:
    return Dataset(_read_folder(demo_data_path()), _read_folder(demo_heldout_path()))


def _emoji() -> Dataset:
    return Dataset(_read_folder(EMOJI / "train"), _read_folder(EMOJI / "heldout"))


def _clothing() -> Dataset:
    if not FASHION_MNIST.exists():
        raise SystemExit(
            "the dataset `clothing` needs Debian's package dataset-fashion-mnist; install it or leave it out"
        )
    kinds = (("images", 16), ("labels", 8))
    images, labels = (
        np.frombuffer(
            gzip.decompress((FASHION_MNIST / f"train-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz").read_bytes()),
            np.uint8,
            offset=skip,
        )
        for kind, skip in kinds
    )
    pixels = 255 - images.reshape(-1, 28, 28)
    rows = [_clothing_item(pixels[index], int(labels[index])) for index in range(NUM_TRAINED + NUM_HELDOUT)]
    return Dataset(rows[:NUM_TRAINED], rows[NUM_TRAINED:])


def _clothing_item(pixels: Any, label: int) -> CaptionedImage:
    shade = float(pixels[pixels < 250].mean()) if (pixels < 250).any() else 255.0
    tone = "black" if shade < 90 else "dark gray" if shade < 130 else "gray" if shade < 170 else "light gray"
    image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
    return CaptionedImage(_png(np.asarray(image)), f"{tone} {CLOTHES[label]}", {}, {})


DATASETS: dict[str, Callable[[], Dataset]] = {"avatars": _avatars, "emoji": _emoji, "clothing": _clothing}

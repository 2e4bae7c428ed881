"""What the demonstration shows of both models: the audit's outputs, and images generated from held-out prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sd_memguard.assets import demo_data_path, demo_heldout_path
from sd_memguard.audit.arguments import AuditSettings
from sd_memguard.audit.attribute_probe import AttributeProbe, prepare_attributes
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.generate import generate_images, load_pipeline
from sd_memguard.audit.images import as_image, as_rows, load_images
from sd_memguard.audit.inputs import open_inputs
from sd_memguard.audit.metrics.attributes import AttributeClassifier, AttributeFigures, attribute_figures
from sd_memguard.audit.metrics.background import Gallery
from sd_memguard.audit.metrics.similarity import find_copies
from sd_memguard.core.seeding import derive_seed

SIZE = 64
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 2.5
HELDOUT = "held-out"
"""The kind of prompts that are captions of held-out images."""


class Generated(NamedTuple):
    """An image generated from a prompt, beside the training (or held-out) image whose caption the prompt is.

    Attributes:
        model: name of the model.
        kind: of the prompt.
        prompt: caption of the original.
        original: file of the training or held-out image.
        image: the generated image.
        is_own: whether, of all training images, the original is the nearest by pixels; None for held-out prompts.
        is_copy: whether the audit has verified it as a copy of a training image; None for held-out prompts.
    """

    model: str
    kind: str
    prompt: str
    original: Path
    image: Image.Image
    is_own: bool | None
    is_copy: bool | None


class Figures(NamedTuple):
    """Shares of one model's generated images of one kind of prompts.

    Attributes:
        num_images: generated images.
        own: of them, those whose nearest training image is the prompt's own; None for held-out prompts.
        copies: of them, verified copies of a training image; None for held-out prompts.
        caption_accuracy: attributes named by the prompt that the image shows.
        open_agreement: attributes that the prompt leaves open in which the image agrees with the original.
        chance: the same agreement between images that nobody copied.
    """

    num_images: int
    own: float | None
    copies: float | None
    caption_accuracy: float
    open_agreement: float
    chance: float


class Known(NamedTuple):
    """Real images with all their attributes, and a classifier trained on them."""

    named: dict[Path, dict[str, str]]
    open: dict[Path, dict[str, str]]
    heldout: list[dict[str, str]]
    classifier: AttributeClassifier


def read_audit(folder: Path) -> list[Generated]:
    """Return the generated images of an audit's ``pairs.parquet``."""
    rows, train = pq.read_table(folder / "pairs.parquet").to_pylist(), demo_data_path()
    images = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    originals = [train / row["own_file"] for row in rows]
    return [
        Generated(row["model"], row["kind"], row["caption"], original, image, is_own, row["is_copy"])
        for row, original, image, is_own in zip(rows, originals, images, _are_nearest(images, originals), strict=True)
    ]


def _are_nearest(images: Sequence[Image.Image], originals: Sequence[Path]) -> list[bool]:
    """Return for each image whether its original is, by pixels, the nearest of all training images."""
    gallery = load_images(demo_data_path(), SIZE).pixels
    own = _stack([Image.open(file).convert("RGB") for file in originals]).permute(0, 2, 3, 1)
    nearest = find_copies(as_rows(_stack(images).permute(0, 2, 3, 1)), as_rows(gallery)).nearest
    # Compared by content: of the copies of a duplicated image any may be the nearest.
    return [torch.equal(gallery[row], pixels) for row, pixels in zip(nearest.tolist(), own, strict=True)]


def generate_heldout(model: str, folder: Path, num_prompts: int, seed: int) -> list[Generated]:
    """Generate an image for each of the first held-out captions; every model gets the same noises."""
    heldout = demo_heldout_path()
    lines = (heldout / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:num_prompts]
    rows = [json.loads(line) for line in lines]
    pixels = generate_images(
        load_pipeline(folder),
        [row["text"] for row in rows],
        [derive_seed(seed, "demo held-out image", number) for number in range(len(rows))],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        description=f"held-out prompts, {model}",
    )
    return [
        Generated(model, HELDOUT, row["text"], heldout / row["file_name"], as_image(image), None, None)
        for row, image in zip(rows, pixels, strict=True)
    ]


def known_attributes(audit: AuditSettings) -> Known:
    """Return the attributes of the demo set's images, with the classifier that an audit of it has trained and kept."""
    device = torch.device("cpu")
    store = Store(audit.output_dir / "cache")
    inputs = open_inputs(audit, store, device)
    gallery = Gallery(inputs.train, inputs.extractor, store, device, audit.batch_size)
    probe = prepare_attributes(gallery, inputs.reference, None, audit.seed)
    assert isinstance(probe, AttributeProbe)
    named, opened = {}, {}
    for folder in (demo_data_path(), demo_heldout_path()):
        for row in map(json.loads, (folder / "attributes.jsonl").read_text(encoding="utf-8").splitlines()):
            named[folder / row["file_name"]], opened[folder / row["file_name"]] = row["named"], row["open"]
    heldout = [named[file] | opened[file] for file in named if file.parent == demo_heldout_path()]
    return Known(named, opened, heldout, probe.classifier)


def figures(generated: Sequence[Generated], known: Known) -> dict[str, dict[str, Figures]]:
    """Return the figures by model and kind of prompts."""
    found: dict[str, dict[str, Figures]] = {}
    for model, kind in dict.fromkeys((one.model, one.kind) for one in generated):
        images = [one for one in generated if (one.model, one.kind) == (model, kind)]
        shares = _attributes(images, known)
        own, copies = _share([one.is_own for one in images]), _share([one.is_copy for one in images])
        means = (float(values[~values.isnan()].mean()) for values in shares)
        found.setdefault(model, {})[kind] = Figures(len(images), own, copies, *means)
    return found


def _share(flags: Sequence[bool | None]) -> float | None:
    known = [flag for flag in flags if flag is not None]
    return sum(known) / len(known) if known else None


def real_figures(known: Known) -> tuple[float, float]:
    """Return the ceiling of ``caption_accuracy``, what the classifier finds on real held-out images, and its base."""
    files = [file for file in known.named if file.parent == demo_heldout_path()]
    images = [Generated("", "", "", file, Image.open(file).convert("RGB"), None, None) for file in files]
    return float(_attributes(images, known).caption_accuracy.nanmean()), len(files)


def _attributes(images: Sequence[Generated], known: Known) -> AttributeFigures:
    return attribute_figures(
        known.classifier,
        _stack([one.image for one in images]),
        [known.named[one.original] for one in images],
        [known.open[one.original] for one in images],
        known.heldout,
    )


def _stack(images: Sequence[Image.Image]) -> Tensor:
    """Return images as (N, 3, H, W) uint8."""
    return torch.stack([pil_to_tensor(image) for image in images])


def describe(generated: Sequence[Generated]) -> list[Mapping[str, Any]]:
    """Return a JSON-ready row for each generated image."""
    return [
        {
            "model": one.model,
            "kind": one.kind,
            "prompt": one.prompt,
            "file": one.original.name,
            "is_own": one.is_own,
            "is_copy": one.is_copy,
        }
        for one in generated
    ]

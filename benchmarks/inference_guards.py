"""Guards at inference on the demo's two models: replication, caption accuracy and time of each, alone and together.

    sd-memguard demo --output_dir runs/demo
    python -m benchmarks.inference_guards --output_dir runs/inference

generates the demo's prompts with every variant, all from the same noise. What is done is kept in ``results.json``, and
another run goes on from there; ``--variants`` takes guards as Python expressions, e.g. ``"StaticTransition(0.6)"``,
and ``--models`` other models that were trained on the demo's images.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_memguard import inference
from sd_memguard.assets import BUNDLED, demo_data_path, demo_heldout_path
from sd_memguard.audit.arguments import parse_arguments
from sd_memguard.audit.command import measure_background
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.generate import generate_images, load_pipeline
from sd_memguard.audit.images import as_rows, load_images
from sd_memguard.audit.inputs import open_inputs
from sd_memguard.audit.metrics.attributes import AttributeClassifier, attribute_figures, train_classifier
from sd_memguard.audit.metrics.background import Gallery
from sd_memguard.audit.metrics.similarity import find_copies
from sd_memguard.core.seeding import derive_seed

SIZE, NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 64, 20, 2.5
MODELS = ("plain=runs/demo/plain", "guarded=runs/demo/guarded")
HELDOUT = "heldout"
NUM_HELDOUT = 64
NUM_IMAGES = {"duplicated": 2, "unique": 1, HELDOUT: 1}
"""Generated images of each prompt."""
VARIANTS = (
    "",
    "StaticTransition()",
    "OppositeGuidance()",
    "PromptAdjustment()",
    "AttentionRescaling()",
    "OppositeGuidance(), AttentionRescaling()",
    "StaticTransition(), PromptAdjustment()",
    "PromptAdjustment(), AttentionRescaling()",
)


class Prompt(NamedTuple):
    """A caption, its kind, and the image it belongs to."""

    kind: str
    caption: str
    original: Path


class Known(NamedTuple):
    """What generated images are compared with.

    Attributes:
        train: Training images as rows of pixels, (N, D).
        named: Attributes that the caption of an image names, by its file.
        opened: Those that it leaves open.
        heldout: Everything that each held-out image shows.
        classifier: Trained on real images.
    """

    train: Tensor
    named: Mapping[Path, Mapping[str, str]]
    opened: Mapping[Path, Mapping[str, str]]
    heldout: list[dict[str, str]]
    classifier: AttributeClassifier


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, help="guards, as Python expressions; '': none")
    parser.add_argument("--models", nargs="*", default=MODELS, metavar="NAME=DIR")
    arguments = parser.parse_args()
    models = {name: Path(place) for name, _, place in (one.partition("=") for one in arguments.models)}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = choose_prompts(arguments.output_dir)
    file = arguments.output_dir / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    known: Known | None = None
    for model, folder in models.items():
        for variant in arguments.variants:
            key = f"{model}: {variant}"
            if key not in results:
                known = known or read_known()
                sheet = arguments.output_dir / f"{model}-{len(results)}.png"
                results[key] = {"sheet": sheet.name, **measure(folder, variant, prompts, known, sheet)}
                file.write_text(json.dumps(results, indent=1))
    print(table(results, list(models), arguments.variants))


def choose_prompts(output_dir: Path) -> list[Prompt]:
    """Return the prompts of training images that the demo's audit chooses, and the first held-out captions."""
    flags = ["--model", BUNDLED, "--train_data_dir", BUNDLED, "--reference_data_dir", BUNDLED]
    settings = parse_arguments([*flags, "--output_dir", str(output_dir / "audit")])
    device, store = torch.device("cpu"), Store(output_dir / "cache")
    inputs = open_inputs(settings, store, device)
    gallery = Gallery(inputs.train, inputs.extractor, store, device, settings.batch_size)
    chosen = measure_background(settings, inputs, gallery).chosen
    kinds = {"duplicated": chosen.duplicated, "unique": chosen.unique}
    prompts = [
        Prompt(kind, inputs.train.captions[row], demo_data_path() / inputs.train.files[row])
        for kind, rows in kinds.items()
        for row in rows
    ]
    heldout = demo_heldout_path()
    lines = (heldout / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_HELDOUT]
    prompts += [Prompt(HELDOUT, row["text"], heldout / row["file_name"]) for row in map(json.loads, lines)]
    return list(dict.fromkeys(prompts))


def read_known() -> Known:
    """Return the demo's images and attributes, with a classifier trained on them; about a minute on one core."""
    named: dict[Path, dict[str, str]] = {}
    opened: dict[Path, dict[str, str]] = {}
    for folder in (demo_data_path(), demo_heldout_path()):
        for row in map(json.loads, (folder / "attributes.jsonl").read_text(encoding="utf-8").splitlines()):
            named[folder / row["file_name"]], opened[folder / row["file_name"]] = row["named"], row["open"]
    files = list(named)
    pixels = torch.stack([_pixels(file) for file in files])
    classifier = train_classifier(pixels.permute(0, 3, 1, 2), [named[file] | opened[file] for file in files])
    heldout = [named[file] | opened[file] for file in files if file.parent == demo_heldout_path()]
    return Known(as_rows(load_images(demo_data_path(), SIZE).pixels), named, opened, heldout, classifier)


def _pixels(file: Path) -> Tensor:
    """Return (64, 64, 3) uint8."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))


def measure(model: Path, variant: str, prompts: Sequence[Prompt], known: Known, sheet: Path) -> dict[str, Any]:
    """Return the figures of one model under one variant, and keep a sheet of the first images of each kind."""
    plain = load_pipeline(model)
    guards = eval(f"({variant},)" if variant else "()", {**vars(inference)})
    pipeline = inference.guarded_pipeline(plain, *guards) if guards else plain
    asked = [(prompt, number) for prompt in prompts for number in range(NUM_IMAGES[prompt.kind])]
    start = time.process_time()
    pixels = generate_images(
        pipeline,
        [prompt.caption for prompt, _ in asked],
        [derive_seed(0, "inference guards", number, index) for index, (_, number) in enumerate(asked)],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        description=f"{model.name}, {variant or 'no guard'}",
    )
    seconds = time.process_time() - start
    kinds = [prompt.kind for prompt, _ in asked]
    save_sheet(pixels, kinds, sheet)
    found: dict[str, Any] = {"processor_seconds_per_image": round(seconds / len(asked), 4)}
    for kind in NUM_IMAGES:
        rows = [index for index, one in enumerate(kinds) if one == kind]
        found[kind] = figures(pixels[rows], [asked[row][0].original for row in rows], known, is_trained=kind != HELDOUT)
    return found


def figures(pixels: Tensor, originals: Sequence[Path], known: Known, *, is_trained: bool) -> dict[str, float | None]:
    """Return shares over generated images (N, 64, 64, 3) of the images that their prompts are captions of."""
    own = None
    if is_trained:
        nearest = known.train[find_copies(as_rows(pixels), known.train).nearest]
        # Compared by content: of the copies of a duplicated image any may be the nearest.
        expected = as_rows(torch.stack([_pixels(file) for file in originals]))
        own = round(float((nearest == expected).all(1).float().mean()), 4)
    named, opened = ([part[file] for file in originals] for part in (known.named, known.opened))
    shares = attribute_figures(known.classifier, pixels.permute(0, 3, 1, 2), named, opened, known.heldout)._asdict()
    means = {name: round(float(values[~values.isnan()].mean()), 4) for name, values in shares.items()}
    return {"num_images": len(pixels), "own": own, **means}


def save_sheet(pixels: Tensor, kinds: Sequence[str], file: Path, columns: int = 24) -> None:
    """Save the first two rows of images of each kind."""
    rows = []
    for kind in NUM_IMAGES:
        of_kind = pixels[[index for index, one in enumerate(kinds) if one == kind]][: 2 * columns]
        rows += [torch.cat(list(part), dim=1) for part in of_kind.split(columns)]
    sheet = np.full((sum(len(row) for row in rows), max(row.shape[1] for row in rows), 3), 255, dtype=np.uint8)
    for number, row in enumerate(rows):
        sheet[number * len(row) : (number + 1) * len(row), : row.shape[1]] = row.numpy()
    Image.fromarray(sheet).save(file)


def table(results: dict[str, Any], models: Sequence[str], variants: Sequence[str]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | guards | own image nearest, duplicated / unique | traits beyond the prompt, duplicated / unique "
        "(chance) | caption accuracy, held-out prompts | time |",
        "|---|---|---|---|---|---|",
    ]
    for model in models:
        unit = results.get(f"{model}: ", {}).get("processor_seconds_per_image")
        for variant in variants:
            if (one := results.get(f"{model}: {variant}")) is None:
                continue
            own = " / ".join(f"{one[kind]['own']:.0%}" for kind in ("duplicated", "unique"))
            beyond = " / ".join(f"{one[kind]['open_agreement']:.0%}" for kind in ("duplicated", "unique"))
            chance = f"{one['duplicated']['chance_agreement']:.0%}"
            ratio = f"{one['processor_seconds_per_image'] / unit:.2f}" if unit else "?"
            accuracy = f"{one[HELDOUT]['caption_accuracy']:.0%}"
            name = f"`{variant}`" if variant else "none"
            lines.append(f"| {model} | {name} | {own} | {beyond} ({chance}) | {accuracy} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

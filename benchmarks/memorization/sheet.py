"""One image of what several variants generate from the same prompts, beside the images that the prompts caption.

    python -m benchmarks.memorization.sheet --work_dir runs/memorization --dataset avatars --duplicates exact \
        --variants plain default --step 900 --output docs/images/avatars.png

Nothing is chosen by its looks: the prompts are evenly spaced among those of their kind.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.memorization.__main__ import Case
from benchmarks.memorization.datasets import DATASETS, CaptionedImage, Dataset, as_pixels, load_dataset
from benchmarks.memorization.judge import NUM_IMAGES, NUM_PROMPTS
from benchmarks.memorization.table import RESULTS, Result, agreement_text, attribute, flags
from benchmarks.memorization.variants import VARIANTS
from sd_memguard.demo.figure import Block, Column, Table, comparison_image

NUM_COLUMNS = 8
HEADINGS = {
    "duplicated": ("Duplicated prompts", "captions of images that the dataset has 16 times"),
    "unique": ("Unique prompts", "captions of images that the dataset has once"),
    "heldout": ("Held-out prompts", "captions of images that were not trained on"),
}


def main() -> None:
    """Write the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs are")
    parser.add_argument("--dataset", choices=DATASETS, default="avatars")
    parser.add_argument("--duplicates", default="exact")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "default"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=900, help="of the runs")
    parser.add_argument("--step", type=int, default=900, help="the checkpoint that is shown")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--output", type=Path, required=True, help="a PNG")
    options = parser.parse_args()
    cases = [Case(options.dataset, options.duplicates, variant, options.seed) for variant in options.variants]
    results = [json.loads(case.file(options.results, options.step).read_text(encoding="utf-8")) for case in cases]
    runs = [options.work_dir / "-".join(map(str, (*case, options.max_train_steps))) for case in cases]
    generated = [load_file(run / f"generated-{options.step}.safetensors") for run in runs]
    # Where nothing is duplicated, the two kinds of training prompts are one.
    kinds = [kind for kind in HEADINGS if kind != "duplicated" or options.duplicates in ("exact", "near")]
    sheet = comparison_image(
        f"{options.dataset.capitalize()}, duplicates: {options.duplicates}, {options.step} steps",
        "The same prompts and noise for each variant.",
        figures(results, options.variants),
        [block(kind, load_dataset(options.dataset), results, generated) for kind in kinds],
        "Framed: of all training images, that of the prompt is the nearest by pixels.",
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256).save(options.output, optimize=True)


def figures(results: Sequence[Result], variants: Sequence[str]) -> Table:
    """Return the figures of each variant; agreement where attributes are known."""
    headings = ["own image nearest: duplicated, unique", "held-out loss"]
    is_known = attribute(results[:1], "unique", "open_agreement") is not None
    if is_known:
        headings.append("agreement beyond the prompt (chance)")
    rows = []
    for variant, result in zip(variants, results, strict=True):
        own = ", ".join(f"{flags(result, kind, 'own').mean():.0%}" for kind in ("duplicated", "unique"))
        cells = [own, f"{result['losses']['heldout']['mean']:.4f}"]
        if is_known:
            cells.append(agreement_text([result]))
        rows.append((variant, cells))
    return Table(headings, rows)


def block(kind: str, dataset: Dataset, results: Sequence[Result], generated: Sequence[dict[str, Tensor]]) -> Block:
    """Return the columns of a kind of prompts: the first generated image of each."""
    heading, remark = HEADINGS[kind]
    start = NUM_PROMPTS["duplicated"] if kind == "unique" else 0
    source = dataset.heldout if kind == "heldout" else dataset.train
    chosen = torch.linspace(0, NUM_PROMPTS[kind] - 1, NUM_COLUMNS).long().tolist()
    columns = [column(source[start + row], row, kind, results, generated) for row in chosen]
    return Block(heading, remark, "held-out image" if kind == "heldout" else "training image", columns)


def column(
    original: CaptionedImage, row: int, kind: str, results: Sequence[Result], generated: Sequence[dict[str, Tensor]]
) -> Column:
    """Return the original and what each variant generates from its caption."""
    place = row * NUM_IMAGES[kind]
    found: list[Any] = [as_pixels(original), *(pixels[kind][place].numpy() for pixels in generated)]
    framed = [kind != "heldout" and result["replication"][kind]["own"][place] == "1" for result in results]
    return Column(original.text, [Image.fromarray(pixels) for pixels in found], [False, *framed])


if __name__ == "__main__":
    main()

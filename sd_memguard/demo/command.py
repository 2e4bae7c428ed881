"""Fine-tune the bundled model twice with one budget, plain and guarded, and show what both copy, side by side."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sd_memguard.assets import BUNDLED, demo_data_path, demo_heldout_path
from sd_memguard.audit.arguments import parse_arguments as parse_audit
from sd_memguard.audit.captions import ChosenCaptions, choose_captions
from sd_memguard.audit.command import run_audit
from sd_memguard.audit.generate import draw, load_pipeline
from sd_memguard.audit.images import Images, as_image, as_rows, load_images
from sd_memguard.audit.metrics.similarity import COPY_THRESHOLD, NUM_NEIGHBORS, find_copies
from sd_memguard.config import make_train_config
from sd_memguard.core.seeding import derive_seed
from sd_memguard.demo.figure import Arm, Block, GeneratedImage, Row, comparison_image
from sd_memguard.errors import UserError
from sd_memguard.training.trainer import train

SIZE = 64
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 2.5
CAPTIONS_PER_KIND = 16
CAPTIONS_SHOWN = 6
ARMS = {"plain": "off", "guarded": "on"}
"""The folder of each fine-tune and its ``--memguard``."""

MARKER = "sd-memguard-demo.txt"
"""The file that tells a demonstration's folder from any other."""

COMPARISON = "compare.png"
AUDIT = "audit"
RESULTS = "results.json"


@dataclass(frozen=True)
class DemoSettings:
    """What the command line asks for.

    Attributes:
        output_dir: Where everything goes.
        max_train_steps: Optimizer steps of each of the two fine-tunes.
        seed: Of training and generated image.
        images_per_caption: Generated images of each caption, each from noise of its own.
    """

    output_dir: Path
    max_train_steps: int
    seed: int
    images_per_caption: int


class Training(NamedTuple):
    """How a fine-tune ended: denoising losses at fixed timesteps and noise, and wall-clock seconds."""

    heldout_loss: float
    train_loss: float
    seconds: float


class Measured(NamedTuple):
    """The generated images of C captions, n of each: pixels (C, n, H, W, 3) uint8, and a value per generated image (C, n)."""

    pixels: Tensor
    distance: Tensor
    ratio: Tensor
    nearest: Tensor
    is_copy: Tensor

    @property
    def copy_share(self) -> float:
        """Share of near copies among the generated."""
        return self.is_copy.float().mean().item()


class Outcome(NamedTuple):
    """What one fine-tuned model did: how its training ended, and its generated images of each kind of captions."""

    training: Training
    generated: Mapping[str, Measured]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration.

    Args:
        argv: Flags; default: those of the command line.

    Raises:
        UserError: Where the output folder holds something else than an earlier demonstration.
    """
    settings = parse_arguments(argv)
    from sd_memguard.console import configure_logging

    configure_logging()
    prepare_folder(settings.output_dir)
    trainings = {arm: fine_tune(arm, settings) for arm in ARMS}
    images = load_images(demo_data_path(), SIZE)
    chosen = choose_captions(images, CAPTIONS_PER_KIND)
    outcomes = {arm: judge(arm, trainings[arm], images, chosen, settings) for arm in ARMS}
    near_duplicates = unseen_copy_share(images)
    compare(images, chosen, outcomes, near_duplicates, settings).save(settings.output_dir / COMPARISON, optimize=True)
    record = describe(images, chosen, outcomes, near_duplicates, settings)
    (settings.output_dir / RESULTS).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    page = audit(settings)
    print(report(outcomes, near_duplicates, settings))
    print(f"The audit of both models, with every pair to look at: {page}")


def parse_arguments(argv: Sequence[str] | None) -> DemoSettings:
    """Return the settings; ends the program with a message where a flag is unknown or out of range."""
    parser = argparse.ArgumentParser(
        prog="sd-memguard demo",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--max_train_steps", type=_count, default=600, help="optimizer steps of each fine-tune")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and generated image")
    parser.add_argument("--images_per_caption", type=_count, default=4, help="generated images of each caption")
    return DemoSettings(**vars(parser.parse_args(argv)))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return int(text)


def prepare_folder(folder: Path) -> None:
    """Make the folder, or clear what an earlier demonstration wrote there, and say so; other files stay.

    Raises:
        UserError: Where the folder holds files and is not the folder of an earlier demonstration.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`--output_dir` must be a folder, {folder} is a file; name another")
    if (folder / MARKER).is_file():
        print(f"Replacing the earlier demonstration in {folder}.")
        for name in [*ARMS, COMPARISON, RESULTS, AUDIT]:
            _remove(folder / name)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"`--output_dir` must be new, empty or an earlier demonstration, {folder} holds other files; name another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(
        "Made by `sd-memguard demo`, which replaces it when it runs again.\n", encoding="utf-8"
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fine_tune(arm: str, settings: DemoSettings) -> Training:
    """Fine-tune the bundled model on the bundled images into the arm's folder."""
    print(f"\nFine-tuning, {arm}: {settings.max_train_steps:,} steps", flush=True)
    start = time.monotonic()
    config = make_train_config(
        pretrained_model_name_or_path=BUNDLED,
        train_data_dir=BUNDLED,
        validation_data_dir=BUNDLED,
        output_dir=str(settings.output_dir / arm),
        memguard=ARMS[arm],
        resolution=SIZE,
        center_crop=True,
        train_batch_size=16,
        learning_rate=3e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=20,
        caption_dropout=0.1,
        use_ema=True,
        max_train_steps=settings.max_train_steps,
        checkpointing_steps=settings.max_train_steps + 1,
        report_to="tensorboard",
        seed=settings.seed,
    )
    summary = train(config).summary
    return Training(float(summary["heldout_loss"]), float(summary["train_loss"]), round(time.monotonic() - start, 1))


def judge(arm: str, training: Training, images: Images, chosen: ChosenCaptions, settings: DemoSettings) -> Outcome:
    """Load the arm's folder as anybody would, draw the captions with it and measure the generated."""
    pipeline = load_pipeline(settings.output_dir / arm)
    gallery = as_rows(images.pixels)

    def measure(kind: str, rows: Sequence[int]) -> Measured:
        shape = (len(rows), settings.images_per_caption)
        pixels = draw(
            pipeline,
            [images.captions[row] for row in rows for _ in range(shape[1])],
            [image_seed(settings, row, number) for row in rows for number in range(shape[1])],
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            description=f"Generated image {kind} captions, {arm}",
        )
        copies = find_copies(as_rows(pixels), gallery)
        return Measured(pixels.unflatten(0, shape), *(value.unflatten(0, shape) for value in copies))

    return Outcome(training, {kind: measure(kind, rows) for kind, rows in chosen._asdict().items()})


def image_seed(settings: DemoSettings, row: int, number: int) -> int:
    """Return the seed of a generated image's noise: every model draws a caption from the same noises."""
    return derive_seed(settings.seed, "demo generated image", row, number)


def unseen_copy_share(images: Images) -> float:
    """Return the share of held-out images that would count as near copies: near-duplicates, for nobody copied them."""
    heldout = load_images(demo_heldout_path(), SIZE)
    return find_copies(as_rows(heldout.pixels), as_rows(images.pixels)).is_copy.float().mean().item()


def audit(settings: DemoSettings) -> Path:
    """Audit both models as `sd-memguard audit` does, into the folder ``audit``, and return its page."""
    folder = settings.output_dir / AUDIT
    flags = {
        "train_data_dir": BUNDLED,
        "reference_data_dir": BUNDLED,
        "num_prompts": CAPTIONS_PER_KIND,
        "num_images_per_prompt": settings.images_per_caption,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": settings.seed,
        "output_dir": folder,
    }
    models = [text for arm in ARMS for text in ("--model", f"{arm}={settings.output_dir / arm}")]
    run_audit(parse_audit([*models, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]))
    return folder / "report.html"


def compare(
    images: Images,
    chosen: ChosenCaptions,
    outcomes: Mapping[str, Outcome],
    near_duplicates: float,
    settings: DemoSettings,
) -> Image.Image:
    """Return the image of the first captions of each kind with what either model drew."""
    times = images.captions.count(images.captions[chosen.repeated[0]])
    remarks = {"repeated": f"image {times} times in the set", "single": "image once in the set"}
    blocks = [
        Block(
            kind,
            remarks[kind],
            [
                Row(
                    images.captions[row],
                    as_image(images.pixels[row]),
                    [closest_generated(outcome.generated[kind], index, images, row) for outcome in outcomes.values()],
                )
                for index, row in enumerate(rows[:CAPTIONS_SHOWN])
            ],
        )
        for kind, rows in chosen._asdict().items()
    ]
    arms = [
        Arm(name, [generated.copy_share for generated in outcome.generated.values()], outcome.training.heldout_loss)
        for name, outcome in zip(("Plain", "sd_memguard"), outcomes.values(), strict=True)
    ]
    return comparison_image(
        "What a fine-tune copies: plain, and with sd_memguard",
        f"One tiny Stable Diffusion, fine-tuned twice for {settings.max_train_steps:,} steps on the same "
        f"{len(images.files):,} images, draws captions it was trained on.",
        blocks,
        arms,
        f"Shown are the first {CAPTIONS_SHOWN} captions of each kind and, of a model's {settings.images_per_caption} "
        f"generated images, the one closest to a training image; both models start from the same noise. The number is the "
        f"distance to the nearest training image over the mean distance to the {NUM_NEIGHBORS} nearest: below "
        f"{COPY_THRESHOLD:.2f} counts as a near copy, framed in red. The shares above count all generated images of "
        f"{len(chosen.repeated)} repeated and {len(chosen.single)} single captions. Captions whose image has a "
        f"look-alike in the set are left out; among images that neither model was trained on, near-duplicates make "
        f"{near_duplicates:.0%} count as near copies. One run, seed {settings.seed}.",
    )


def closest_generated(generated: Measured, index: int, images: Images, row: int) -> GeneratedImage:
    """Return the generated image of a caption that is closest to a training image, which may be another caption's."""
    best = int(generated.ratio[index].argmin())
    is_own = torch.equal(images.pixels[generated.nearest[index, best]], images.pixels[row])
    image = as_image(generated.pixels[index, best])
    return GeneratedImage(image, generated.ratio[index, best].item(), bool(generated.is_copy[index, best]), is_own)


def describe(
    images: Images,
    chosen: ChosenCaptions,
    outcomes: Mapping[str, Outcome],
    near_duplicates: float,
    settings: DemoSettings,
) -> dict[str, Any]:
    """Return everything that was set and measured, a row per generated image included, for ``results.json``."""
    models = {
        arm: {
            **outcome.training._asdict(),
            **{f"{kind}_copy_share": generated.copy_share for kind, generated in outcome.generated.items()},
        }
        for arm, outcome in outcomes.items()
    }
    return {
        "settings": {
            **asdict(settings),
            "output_dir": str(settings.output_dir),
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "copy_threshold": COPY_THRESHOLD,
            "num_neighbors": NUM_NEIGHBORS,
        },
        "models": models,
        "unseen_copy_share": near_duplicates,
        "generated": [
            {
                "model": arm,
                "kind": kind,
                "caption": images.captions[row],
                "file": images.files[row],
                "seed": image_seed(settings, row, number),
                "nearest_file": images.files[generated.nearest[index, number]],
                "distance": round(generated.distance[index, number].item(), 4),
                "ratio": round(generated.ratio[index, number].item(), 4),
                "is_copy": bool(generated.is_copy[index, number]),
            }
            for arm, outcome in outcomes.items()
            for kind, generated in outcome.generated.items()
            for index, row in enumerate(chosen._asdict()[kind])
            for number in range(settings.images_per_caption)
        ],
    }


def report(outcomes: Mapping[str, Outcome], near_duplicates: float, settings: DemoSettings) -> str:
    """Return the numbers and what they say, in words that follow from the numbers."""
    header = ("", "near copies", "near copies", "loss on", "loss on", "fine-tune")
    units = ("", "repeated captions", "single captions", "unseen", "trained on", "seconds")
    rows = [
        (
            arm,
            *(f"{generated.copy_share:.0%}" for generated in outcome.generated.values()),
            f"{outcome.training.heldout_loss:.4f}",
            f"{outcome.training.train_loss:.4f}",
            f"{outcome.training.seconds:.0f}",
        )
        for arm, outcome in outcomes.items()
    ]
    table = [f"{row[0]:9}" + "".join(f"{cell:>19}" for cell in row[1:]) for row in (header, units, *rows)]
    plain, guarded = outcomes["plain"], outcomes["guarded"]
    sentences = [
        *(
            f"{kind.capitalize()} captions: {compare_copies(generated.is_copy, guarded.generated[kind].is_copy)}"
            for kind, generated in plain.generated.items()
        ),
        f"Unseen images: {compare_losses(plain.training.heldout_loss, guarded.training.heldout_loss)}",
        f"For scale: {near_duplicates:.0%} of the held-out images themselves would count as near copies (near-duplicates).",
        "One run with one seed on a tiny model: a demonstration, not a benchmark.",
    ]
    folder = settings.output_dir
    places = [f"  {folder / COMPARISON}", f"  {folder / RESULTS}", *(f"  {folder / arm}{os.sep}" for arm in outcomes)]
    return "\n".join(["", *table, "", *sentences, "", "Look at:", *places])


def compare_copies(plain: Tensor, guarded: Tensor) -> str:
    """Return a sentence on the near copies of both models, and whether captions agree on the difference.

    Args:
        plain: Whether each generated image is a copy, (C, n) bool.
        guarded: The same generated images by the guarded model.
    """
    difference = guarded.float().mean(1) - plain.float().mean(1)
    error = difference.std().item() / len(difference) ** 0.5
    counts = f"of {plain.numel()} generated images each, {int(plain.sum())} plain and {int(guarded.sum())} guarded are near copies"
    if abs(difference.mean().item()) <= 2 * error or not difference.any():
        return f"{counts}: no clear difference (within two standard errors over {len(difference)} captions)."
    return f"{counts}: {'fewer' if difference.mean() < 0 else 'more'} with the guard."


def compare_losses(plain: float, guarded: float) -> str:
    """Return a sentence on the held-out losses of both models; lower is better."""
    if f"{plain:.4f}" == f"{guarded:.4f}":
        return f"the guarded model's loss equals the plain model's ({plain:.4f})."
    change = (guarded - plain) / plain
    return f"the guarded model's loss is {abs(change):.1%} {'higher (worse)' if change > 0 else 'lower (better)'}."

"""Fine-tune the bundled model twice with one budget, plain and guarded, and show what each replicates, side by side."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sd_memguard.assets import BUNDLED
from sd_memguard.audit.arguments import AuditSettings
from sd_memguard.audit.arguments import parse_arguments as parse_audit
from sd_memguard.audit.command import run_audit
from sd_memguard.config import make_train_config
from sd_memguard.demo.figure import Block, Column, Table, comparison_image
from sd_memguard.demo.measure import (
    GUIDANCE_SCALE,
    HELDOUT,
    NUM_INFERENCE_STEPS,
    SIZE,
    Figures,
    Generated,
    describe,
    figures,
    generate_heldout,
    known_attributes,
    read_audit,
    real_figures,
)
from sd_memguard.errors import UserError
from sd_memguard.training.trainer import train

NUM_PROMPTS, NUM_HELDOUT_PROMPTS, NUM_PROBES = 32, 96, 96
PROMPTS_SHOWN = 8
MODELS = {"plain": "off", "guarded": "on"}
"""The folder of each fine-tune and its ``--memguard``."""
NAMES = {"plain": "Plain fine-tune", "guarded": "With sd_memguard"}

MARKER = "sd-memguard-demo.txt"
"""The file that tells a demonstration's folder from any other."""
COMPARISON, AUDIT, RESULTS = "compare.png", "audit", "results.json"


@dataclass(frozen=True)
class DemoSettings:
    """What the command line asks for.

    Attributes:
        output_dir: Where everything goes.
        max_train_steps: Optimizer steps of each of the two fine-tunes.
        seed: Of training and generation.
        num_images_per_prompt: Generated images of each training prompt, each from noise of its own.
    """

    output_dir: Path
    max_train_steps: int
    seed: int
    num_images_per_prompt: int


class Training(NamedTuple):
    """How a fine-tune ended: denoising losses at fixed timesteps and noise, and wall-clock seconds."""

    heldout_loss: float
    train_loss: float
    seconds: float


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
    trainings = {model: fine_tune(model, settings) for model in MODELS}
    audited = audit(settings)
    generated = read_audit(audited.output_dir)
    for model in MODELS:
        generated += generate_heldout(model, settings.output_dir / model, NUM_HELDOUT_PROMPTS, settings.seed)
    known = known_attributes(audited)
    found, ceiling = figures(generated, known), real_figures(known)[0]
    compare(trainings, found, generated, settings).save(settings.output_dir / COMPARISON, optimize=True)
    record = {
        "settings": {**asdict(settings), "output_dir": str(settings.output_dir)},
        "models": {model: trainings[model]._asdict() | _as_dicts(found[model]) for model in MODELS},
        "caption_accuracy_of_real_images": ceiling,
        "generated": describe(generated),
    }
    (settings.output_dir / RESULTS).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    print(report(trainings, found, ceiling, settings))
    print(f"The audit of both models, with every pair to look at: {audited.output_dir / 'report.html'}")


def _as_dicts(found: Mapping[str, Figures]) -> dict[str, Any]:
    return {kind: one._asdict() for kind, one in found.items()}


def parse_arguments(argv: Sequence[str] | None) -> DemoSettings:
    """Return the settings; ends the program with a message where a flag is unknown or out of range."""
    parser = argparse.ArgumentParser(
        prog="sd-memguard demo",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--max_train_steps", type=_count, default=900, help="optimizer steps of each fine-tune")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and generation")
    parser.add_argument("--num_images_per_prompt", type=_count, default=2, help="generated images of each prompt")
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
        for name in [*MODELS, COMPARISON, RESULTS, AUDIT]:
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


def fine_tune(model: str, settings: DemoSettings) -> Training:
    """Fine-tune the bundled model on the bundled images into the folder of that name."""
    print(f"\nFine-tuning, {model}: {settings.max_train_steps:,} steps", flush=True)
    start = time.monotonic()
    config = make_train_config(
        pretrained_model_name_or_path=BUNDLED,
        train_data_dir=BUNDLED,
        validation_data_dir=BUNDLED,
        output_dir=str(settings.output_dir / model),
        memguard=MODELS[model],
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


def audit(settings: DemoSettings) -> AuditSettings:
    """Audit both models as `sd-memguard audit` does, into the folder ``audit``, and return how."""
    folder = settings.output_dir / AUDIT
    flags = {
        "train_data_dir": BUNDLED,
        "reference_data_dir": BUNDLED,
        "num_prompts": NUM_PROMPTS,
        "num_images_per_prompt": settings.num_images_per_prompt,
        "num_probes": NUM_PROBES,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": settings.seed,
        "output_dir": folder,
    }
    models = [text for model in MODELS for text in ("--model", f"{model}={settings.output_dir / model}")]
    parsed = parse_audit([*models, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))])
    run_audit(parsed)
    return parsed


def training_kinds(found: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """Return the audit's kinds of prompts: of duplicated images first, then of unique ones."""
    return [kind for kind in found["plain"] if kind != HELDOUT]


def compare(
    trainings: Mapping[str, Training],
    found: Mapping[str, Mapping[str, Figures]],
    generated: Sequence[Generated],
    settings: DemoSettings,
) -> Image.Image:
    """Return the image of the first prompts of each kind with what either model generates."""
    duplicated, unique = training_kinds(found)
    blocks = [
        Block("Prompts of duplicated images", "These images are 16 times in the training set.", "Training image", []),
        Block("Prompts of unique images", "These images are in the training set once.", "Training image", []),
        Block("Held-out prompts", "Neither model has seen these prompts and images.", "Held-out image", []),
    ]
    blocks = [
        block._replace(columns=columns(generated, kind))
        for block, kind in zip(blocks, (duplicated, unique, HELDOUT), strict=True)
    ]
    table = Table(
        (
            "own training image is the nearest, duplicated",
            "own training image is the nearest, unique",
            "traits shared beyond the prompt, duplicated (chance)",
            "held-out prompts followed",
            "held-out loss",
        ),
        [
            (
                NAMES[model],
                (
                    *(f"{found[model][kind].own:.0%}" for kind in (duplicated, unique)),
                    f"{found[model][duplicated].open_agreement:.0%} ({found[model][duplicated].chance:.0%})",
                    f"{found[model][HELDOUT].caption_accuracy:.0%}",
                    f"{trainings[model].heldout_loss:.4f}",
                ),
            )
            for model in MODELS
        ],
    )
    return comparison_image(
        "What a fine-tune keeps of its training images",
        f"One tiny Stable Diffusion, fine-tuned twice for {settings.max_train_steps:,} steps on the same images of one "
        "style, plain and with sd_memguard. Prompts name some traits of a person and leave the others open.",
        table,
        blocks,
        "Shown is the first image generated from each prompt, both models from the same noise. Framed in red: of all "
        "training images, that of the prompt is the nearest. The figures are over all generated images. "
        f"One run, seed {settings.seed}.",
    )


def columns(generated: Sequence[Generated], kind: str) -> list[Column]:
    """Return the first prompts of a kind, each with its original and the first image that each model generates."""
    first: dict[Path, dict[str, Generated]] = {}
    for one in generated:
        if one.kind == kind:
            first.setdefault(one.original, {}).setdefault(one.model, one)
    return [
        Column(
            next(iter(by_model.values())).prompt,
            [Image.open(original), *(by_model[model].image for model in MODELS)],
            [False, *(bool(by_model[model].is_own) for model in MODELS)],
        )
        for original, by_model in list(first.items())[:PROMPTS_SHOWN]
    ]


def report(
    trainings: Mapping[str, Training],
    found: Mapping[str, Mapping[str, Figures]],
    ceiling: float,
    settings: DemoSettings,
) -> str:
    """Return the figures as text, and where to look."""
    kinds = training_kinds(found)
    rows = [("", *MODELS)]
    for kind in kinds:
        for name, label in (("own", "own training image is the nearest"), ("copies", "verified copies")):
            rows.append((f"{label}, {kind}", *(f"{getattr(found[model][kind], name):.0%}" for model in MODELS)))
    for kind in kinds:
        texts = (
            f"{one.open_agreement:.0%} (chance {one.chance:.0%})" for one in (found[model][kind] for model in MODELS)
        )
        rows.append((f"traits shared beyond the prompt, {kind}", *texts))
    followed = (f"{found[model][HELDOUT].caption_accuracy:.0%}" for model in MODELS)
    rows.append((f"held-out prompts followed (real images: {ceiling:.0%})", *followed))
    for name, label in (("heldout_loss", "held-out loss"), ("train_loss", "training loss")):
        rows.append((label, *(f"{getattr(trainings[model], name):.4f}" for model in MODELS)))
    rows.append(("seconds of the fine-tune", *(f"{trainings[model].seconds:.0f}" for model in MODELS)))
    table = [f"{row[0]:55}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows]
    folder = settings.output_dir
    places = [f"  {folder / COMPARISON}", f"  {folder / RESULTS}", *(f"  {folder / model}{os.sep}" for model in MODELS)]
    closing = "One run with one seed on a tiny model: a demonstration, not a benchmark."
    return "\n".join(["", *table, "", closing, "", "Look at:", *places])

"""Fine-tune the bundled model twice with one budget, plain and guarded, and show what each replicates, side by side."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sd_memguard.assets import BUNDLED, demo_data_path, demo_heldout_path
from sd_memguard.audit.arguments import parse_arguments as parse_audit
from sd_memguard.audit.command import run_audit
from sd_memguard.audit.report import Audit, Kind, ModelReport, Report, read_audit
from sd_memguard.audit.reporting.sentences import tell
from sd_memguard.config import make_train_config
from sd_memguard.demo.figure import Block, Column, Table, comparison_image
from sd_memguard.errors import UserError
from sd_memguard.flags import parse_settings
from sd_memguard.settings import POSITIVE_COUNT, check_settings, setting
from sd_memguard.training.trainer import train

NUM_PROMPTS, NUM_PROBES = 64, 96
NUM_INFERENCE_STEPS, GUIDANCE_SCALE, SIZE = 20, 2.5, 64
PROMPTS_SHOWN = 8
MODELS = {"plain": "off", "guarded": "on"}
"""The folder of each fine-tune and its ``--memguard``."""
NAMES = {"plain": "Plain fine-tune", "guarded": "With sd_memguard"}
KINDS: tuple[Kind, ...] = ("duplicated", "unique", "heldout")

MARKER = "sd-memguard-demo.txt"
"""The file that tells a demonstration's folder from any other."""
COMPARISON, AUDIT, RESULTS = "compare.png", "audit", "results.json"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The flags of the demonstration."""

    output_dir: str = setting("runs/demo", "Demonstration", "where everything goes")
    max_train_steps: int = setting(
        900, "Demonstration", "optimizer steps of each of the two fine-tunes", POSITIVE_COUNT
    )
    seed: int = setting(0, "Demonstration", "seed of training and generation")
    num_images_per_prompt: int = setting(
        2, "Demonstration", "generated images of each prompt, each from noise of its own", POSITIVE_COUNT
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)

    @property
    def folder(self) -> Path:
        """``output_dir`` as a path."""
        return Path(self.output_dir)


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
    prepare_folder(settings.folder)
    trainings = {model: fine_tune(model, settings) for model in MODELS}
    audit(settings)
    audited = read_audit(settings.folder / AUDIT)
    compare(trainings, audited, settings).save(settings.folder / COMPARISON, optimize=True)
    record = {
        "settings": asdict(settings),
        "verdict": {model.name: model.verdict.level for model in audited.report.models},
        "models": {model.name: trainings[model.name]._asdict() | shares(model) for model in audited.report.models},
        "caption_accuracy_of_real_images": _ceiling(audited.report),
    }
    (settings.folder / RESULTS).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    print(report_text(trainings, audited.report, settings))
    print(f"The audit of both models, with every pair to look at: {settings.folder / AUDIT / 'report.html'}")


def parse_arguments(argv: Sequence[str] | None) -> DemoSettings:
    """Return the settings; ends the program with a message where a flag is unknown.

    Raises:
        ConfigError: A setting is out of range.
    """
    return parse_settings(
        DemoSettings, sys.argv[1:] if argv is None else argv, prog="sd-memguard demo", description=__doc__
    )


def shares(model: ModelReport) -> dict[str, dict[str, float | None]]:
    """Return what the demonstration shows of a model by kind of prompts: shares, None where they are not known."""
    found: dict[str, dict[str, float | None]] = {}
    for kind in KINDS:
        copies, attributes = model.copies[kind], (model.attributes or {})[kind]
        estimates = {
            "own_nearest": copies.own_nearest,
            "copies": copies.share,
            "caption_accuracy": attributes.caption_accuracy,
            "open_agreement": attributes.open_agreement,
            "chance_agreement": attributes.chance_agreement,
        }
        found[kind] = {name: None if one is None else one.value for name, one in estimates.items()}
    return found


def _ceiling(report: Report) -> float | None:
    return None if report.classifier is None else report.classifier.caption_accuracy


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
        output_dir=str(settings.folder / model),
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


def audit(settings: DemoSettings) -> None:
    """Audit both models as `sd-memguard audit` does, into the folder ``audit``."""
    flags = {
        "train_data_dir": BUNDLED,
        "reference_data_dir": BUNDLED,
        "num_prompts": NUM_PROMPTS,
        "num_images_per_prompt": settings.num_images_per_prompt,
        "num_probes": NUM_PROBES,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": settings.seed,
        "output_dir": str(settings.folder / AUDIT),
    }
    models = [f"{model}={settings.folder / model}" for model in MODELS]
    run_audit(
        parse_audit(["--model", *models, *(text for name, one in flags.items() for text in (f"--{name}", str(one)))])
    )


def compare(trainings: Mapping[str, Training], audited: Audit, settings: DemoSettings) -> Image.Image:
    """Return the image of the first prompts of each kind with what either model generates."""
    blocks = [
        Block("Prompts of duplicated images", "These images are 16 times in the training set.", "Training image", []),
        Block("Prompts of unique images", "These images are in the training set once.", "Training image", []),
        Block("Held-out prompts", "Neither model has seen these prompts and images.", "Held-out image", []),
    ]
    rows = audited.pairs.to_pylist()
    blocks = [
        block._replace(columns=columns(rows, kind, settings.folder / AUDIT))
        for block, kind in zip(blocks, KINDS, strict=True)
    ]
    found = {model.name: shares(model) for model in audited.report.models}
    table = Table(
        (
            "own training image is the nearest, duplicated",
            "own training image is the nearest, unique",
            "background: held-out prompts",
            "traits shared beyond the prompt, duplicated (chance)",
            "held-out prompts followed",
            "held-out loss",
        ),
        [
            (
                NAMES[model],
                (
                    *(_percent(found[model][kind]["own_nearest"]) for kind in KINDS),
                    f"{_percent(found[model]['duplicated']['open_agreement'])} "
                    f"({_percent(found[model]['duplicated']['chance_agreement'])})",
                    _percent(found[model]["heldout"]["caption_accuracy"]),
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


def columns(rows: Sequence[Mapping[str, Any]], kind: Kind, folder: Path) -> list[Column]:
    """Return the first prompts of a kind, each with its original and the first image that each model generates.

    Args:
        rows: Of the audit's ``pairs.parquet``.
        kind: Of the prompts.
        folder: Of the audit.
    """
    originals = demo_heldout_path() if kind == "heldout" else demo_data_path()
    first: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == kind:
            first.setdefault(row["own_file"], {}).setdefault(row["model"], row)
    return [
        Column(
            by_model["plain"]["caption"],
            [Image.open(originals / file), *(Image.open(folder / by_model[model]["file"]) for model in MODELS)],
            [False, *(kind != "heldout" and by_model[model]["is_own_nearest"] for model in MODELS)],
        )
        for file, by_model in list(first.items())[:PROMPTS_SHOWN]
    ]


def report_text(trainings: Mapping[str, Training], report: Report, settings: DemoSettings) -> str:
    """Return the verdict and the figures as text, and where to look."""
    told = tell(report)
    found = {model.name: shares(model) for model in report.models}
    rows = [("", *MODELS)]
    for name, label in (
        ("own_nearest", "own image is the nearest"),
        ("copies", "verified copies"),
        ("open_agreement", "traits shared beyond the prompt"),
        ("chance_agreement", "  by chance"),
        ("caption_accuracy", "prompt followed"),
    ):
        rows += [(f"{label}, {kind}", *(_percent(found[model][kind][name]) for model in MODELS)) for kind in KINDS]
    for name, label in (("heldout_loss", "held-out loss"), ("train_loss", "training loss")):
        rows.append((label, *(f"{getattr(trainings[model], name):.4f}" for model in MODELS)))
    rows.append(("seconds of the fine-tune", *(f"{trainings[model].seconds:.0f}" for model in MODELS)))
    table = [f"{row[0]:45}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
    folder = settings.folder
    places = [f"  {folder / COMPARISON}", f"  {folder / RESULTS}", *(f"  {folder / model}{os.sep}" for model in MODELS)]
    closing = [
        f"Real images follow {_percent(_ceiling(report))} of their captions by the same measure.",
        "One run with one seed on a tiny model: a demonstration, not a benchmark.",
    ]
    lines = [
        "",
        told.headline,
        *(f"  {line}" for line in told.found),
        "",
        *table,
        "",
        *closing,
        "",
        "Look at:",
        *places,
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"

"""`sd-memguard audit`: how much models copy of their training images, in numbers and images."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from diffusers import StableDiffusionPipeline

from sd_memguard import __version__
from sd_memguard.audit import AuditError, one_image
from sd_memguard.audit.arguments import MARKER, AuditSettings, parse_arguments
from sd_memguard.audit.attribute_probe import AttributeProbe, measure_attributes, prepare_attributes
from sd_memguard.audit.captions import ChosenCaptions
from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.features.extractors import Extractor
from sd_memguard.audit.generate import GenerationSettings, generate_into, load_pipeline
from sd_memguard.audit.inputs import Inputs, open_inputs
from sd_memguard.audit.metrics.background import (
    Gallery,
    Matched,
    Threshold,
    background_positions,
    candidates,
    choose_rows,
    choose_threshold,
)
from sd_memguard.audit.metrics.measures import (
    GeneratedSet,
    Probes,
    Probing,
    compare,
    copy_figures,
    detection_figures,
    membership_figures,
)
from sd_memguard.audit.metrics.quality import MAX_QUALITY_IMAGES, Quality, quality_features, quality_figures
from sd_memguard.audit.metrics.similarity import COPY_THRESHOLD
from sd_memguard.audit.metrics.statistics import summarize
from sd_memguard.audit.metrics.verified import CopyDistance, choose_distance
from sd_memguard.audit.models import ModelFiles, default_device, model_sha256, read_run_records
from sd_memguard.audit.reporting import write as records
from sd_memguard.audit.reporting.page import write_report
from sd_memguard.core.seeding import derive_seed, permutation

logger = logging.getLogger(__name__)

FORMAT = "sd-memguard-audit-1"

MAX_VERIFIED = 500
"""Most training images that are registered with others, for the background."""


class Background(NamedTuple):
    """What is alike without being copied, and what follows from it.

    Attributes:
        positions: Which distinct training images ``train`` is about.
        train: Their nearest others.
        reference: The nearest training images of the reference images, or None.
        threshold: From which similarity on images are alike; that of a copy where nothing is verified.
        copy_distance: Of a verified copy, None where nothing is verified.
        train_share: Share of ``train`` that would be copies.
        reference_share: Of ``reference``.
        chosen: Training rows whose captions are the prompts.
    """

    positions: torch.Tensor
    train: Matched
    reference: Matched | None
    threshold: Threshold
    copy_distance: CopyDistance | None
    train_share: float
    reference_share: float
    chosen: ChosenCaptions


class Setup(NamedTuple):
    """What every model is measured with; ``probes``, ``attributes``: the reason in words where they are not there."""

    settings: AuditSettings
    inputs: Inputs
    gallery: Gallery
    background: Background
    probes: Probes | str
    quality: Quality
    attributes: AttributeProbe | str


class Audited(NamedTuple):
    """A model's part of the report, and its rows."""

    figures: dict[str, Any]
    pairs: pa.Table


def main(argv: Sequence[str]) -> None:
    """Run the audit that the flags ask for and print its figures; with ``--image``, look at one image."""
    if any(argument == "--image" or argument.startswith("--image=") for argument in argv):
        raise SystemExit(one_image.main(argv))
    settings = parse_arguments(argv)
    report = run_audit(settings)
    print(records.summary_text(report, settings.output_dir))
    print(f"the page to look at: {settings.output_dir / 'report.html'}")


def run_audit(settings: AuditSettings) -> dict[str, Any]:
    """Measure everything, write ``report.json``, ``pairs.parquet`` and ``background.parquet``, return the report.

    Raises:
        AuditError: Before anything is generated, where the input cannot be used.
    """
    device = default_device()
    store = Store(settings.output_dir / "cache")
    inputs = open_inputs(settings, store, device)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    (settings.output_dir / MARKER).write_text("Made by `sd-memguard audit`, which replaces it when it runs again.\n")
    gallery = Gallery(inputs.train, inputs.extractor, store, device, settings.batch_size)
    background = measure_background(settings, inputs, gallery)
    setup = Setup(
        settings,
        inputs,
        gallery,
        background,
        choose_probes(settings, inputs),
        prepare_quality(inputs, gallery),
        prepare_attributes(gallery, inputs.reference, settings.attributes_dir, settings.seed)
        if settings.models
        else "images were given, whose captions are not known",
    )
    shutil.rmtree(settings.output_dir / "generated", ignore_errors=True)
    audited = [
        *(audit_model(name, files, setup) for name, files in settings.models.items()),
        *(audit_images(name, images, setup) for name, images in inputs.images.items()),
    ]
    report = describe(setup, [one.figures for one in audited])
    write(setup, audited, report)
    return report


def measure_background(settings: AuditSettings, inputs: Inputs, gallery: Gallery) -> Background:
    """Return how alike images are that nobody copied, the threshold, and the prompts."""
    train, distinct = inputs.train, inputs.train.distinct
    positions = background_positions(len(distinct), settings.seed)
    others = gallery.match_own(positions)
    reference = gallery.match(inputs.reference) if inputs.reference is not None else None
    threshold = choose_threshold(others.similarity, None if reference is None else reference.similarity)
    copy_distance = None
    if settings.copy_threshold is not None:
        threshold = Threshold(settings.copy_threshold, "given as --copy_threshold", "flag")
        shares = [_share_of(matched, threshold.similarity) for matched in (others, reference)]
    else:
        trained = gallery.verify_own(positions[:MAX_VERIFIED]).distance
        heldout = gallery.verify(inputs.reference).distance if inputs.reference is not None else None
        copy_distance = (
            choose_distance(trained, "training images, beside the others,")
            if heldout is None
            else choose_distance(heldout, "images not trained on")
        )
        limit = copy_distance.distance
        shares = [float("nan") if one is None else (one <= limit).float().mean().item() for one in (trained, heldout)]
    chosen = ChosenCaptions([], [])
    if settings.models:
        # Twice as many as are used, so that near-duplicates can be dropped without comparing all images of a large set.
        groups = gallery.groups()
        kinds = [rows[: 2 * settings.num_prompts] for rows in candidates(train, groups, settings.seed)]
        place = {row: position for position, row in enumerate(distinct)}
        asked = torch.tensor([place[row] for rows in kinds for row in rows], dtype=torch.int64)
        like = gallery.match_apart(asked, groups) >= threshold.similarity if len(asked) else torch.zeros(0)
        near_duplicates = {distinct[position] for position in asked[like.bool()].tolist()}
        chosen = choose_rows(ChosenCaptions(*kinds), near_duplicates, settings.num_prompts)
        if not any(chosen):
            raise AuditError(
                f"{train.place} has no caption to use as prompt: each belongs to several images, or its image has a "
                "near-duplicate; raise `--copy_threshold`, or generate images and give the images as `--images`"
            )
    return Background(positions, others, reference, threshold, copy_distance, shares[0], shares[1], chosen)


def _share_of(matched: Matched | None, threshold: float) -> float:
    return float("nan") if matched is None else (matched.similarity >= threshold).float().mean().item()


def choose_probes(settings: AuditSettings, inputs: Inputs) -> Probes | str:
    """Return the captions and images that models are probed with, or why there are none."""
    train, reference, count = inputs.train, inputs.reference, settings.num_probes
    if reference is None:
        return "no --reference_data_dir"
    if not count:
        return "--num_probes 0"
    trained = [row for row in train.distinct if train.captions[row]]
    known = set(train.captions)
    heldout = [row for row in reference.distinct if reference.captions[row] and reference.captions[row] not in known]
    if not trained or not heldout:
        return "the reference images have no captions that the training images have not"
    rows = [
        sorted(pool[number] for number in permutation(settings.seed, purpose, length=len(pool))[:count].tolist())
        for purpose, pool in (("trained probes", trained), ("heldout probes", heldout))
    ]
    return Probes(train, rows[0], reference, rows[1])


def prepare_quality(inputs: Inputs, gallery: Gallery) -> Quality:
    """Return the features that the generated images' distribution is compared with."""
    extractor = inputs.quality_extractor

    def features_of(images: Collection, rows: Sequence[int]) -> torch.Tensor:
        return quality_features(gallery.extract(extractor, images, rows), extractor)

    train = features_of(inputs.train, inputs.train.distinct[:MAX_QUALITY_IMAGES])
    reference = inputs.reference
    heldout = None if reference is None else features_of(reference, reference.distinct[:MAX_QUALITY_IMAGES])
    return Quality(extractor, features_of, train, heldout, inputs.clip)


def audit_model(name: str, files: ModelFiles, setup: Setup) -> Audited:
    """Generate with a model, and measure images and model."""
    settings, store = setup.settings, setup.gallery.store
    sha256 = model_sha256(files)
    load = cache(lambda: load_pipeline(files, setup.gallery.device))
    generated = generate_set(name, sha256, load, setup)
    run, samples = read_run_records(files.base if files.addition is None else files.addition.parent)
    source = {"name": name, "source": "model", "path": files.text, "sha256": sha256, "run": run}
    figures, pairs = _measure(source, generated, setup, samples)
    missing = {} if run else {"run": "no memguard/ with records of a run beside the model"}
    probe = setup.attributes
    attributes = probe if isinstance(probe, str) else measure_attributes(probe, generated, setup.gallery, settings.seed)
    missing |= {"attributes": attributes} if isinstance(attributes, str) else {}
    figures["attributes"] = None if isinstance(attributes, str) else attributes
    figures["detection"] = figures["membership"] = None
    if isinstance(setup.probes, str):
        missing |= {"detection": setup.probes, "membership": setup.probes}
    else:
        steps, scale = settings.num_inference_steps, settings.guidance_scale
        probing = Probing(store, load, sha256, settings.seed, steps, scale, settings.batch_size)
        figures["detection"] = detection_figures(setup.probes, probing)
        figures["membership"] = membership_figures(setup.probes, probing)
    return Audited({**figures, "why_missing": missing}, pairs)


def audit_images(name: str, images: Collection, setup: Setup) -> Audited:
    """Measure images that were generated elsewhere."""
    place = str(Path(images.place).resolve())
    generated = GeneratedSet(replace(images, place=place), ["given"] * len(images), 1, [], [])
    source = {"name": name, "source": "images", "path": images.place, "sha256": images.sha256, "run": None}
    figures, pairs = _measure(source, generated, setup, None)
    reason = "images were given, no model"
    unknown = ("detection", "membership", "attributes")
    missing = dict.fromkeys(("run", *unknown), reason)
    return Audited({**figures, **dict.fromkeys(unknown), "why_missing": missing}, pairs)


def _measure(
    source: dict[str, Any], generated: GeneratedSet, setup: Setup, samples: dict[str, list[Any]] | None
) -> tuple[dict[str, Any], pa.Table]:
    """Return what generated images alone tell, and their rows."""
    background, seed = setup.background, setup.settings.seed
    distance = None if background.copy_distance is None else background.copy_distance.distance
    compared = compare(generated, setup.gallery, background.threshold.similarity, distance)
    figures = {
        **source,
        "num_generated": len(generated.images),
        "copies": copy_figures(generated, compared, seed),
        "quality": quality_figures(generated, setup.quality, seed),
    }
    pairs = records.pair_table(source["name"], generated, compared, setup.inputs.train, samples)
    return figures, pairs


def generate_set(name: str, sha256: str, load: Callable[[], StableDiffusionPipeline], setup: Setup) -> GeneratedSet:
    """Generate the chosen prompts, every model from the same noise, and put the images below the output folder."""
    settings, train, chosen = setup.settings, setup.inputs.train, setup.background.chosen
    count = settings.num_images_per_prompt
    rows = [row for kind in chosen for row in kind for _ in range(count)]
    kinds = [kind for kind, members in chosen._asdict().items() for _ in range(count * len(members))]
    captions = [train.captions[row] for row in rows]
    seeds = [derive_seed(settings.seed, "audit generated image", row, index % count) for index, row in enumerate(rows)]
    generated_image = GenerationSettings(
        settings.num_inference_steps, settings.guidance_scale, settings.resolution, settings.batch_size
    )
    store = setup.gallery.store
    keys = generate_into(store, load, sha256, captions, seeds, generated_image, f"generated image with {name}")
    files = [f"generated/{name}/{index:05}.png" for index in range(len(keys))]
    for key, file in zip(keys, files, strict=True):
        store.place_file(key, settings.output_dir / file)
    images = Collection("", files, captions, lambda row: (settings.output_dir / files[row]).read_bytes(), True)
    return GeneratedSet(images, kinds, count, seeds, rows)


def describe(setup: Setup, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report."""
    settings, inputs, background = setup.settings, setup.inputs, setup.background
    extractor, threshold = inputs.extractor, background.threshold.similarity
    reference, distance = background.reference, background.copy_distance
    return {
        "format": FORMAT,
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": settings.command,
        "settings": settings.flags,
        "extractor": _describe_extractor(extractor),
        "quality_extractor": _describe_extractor(inputs.quality_extractor),
        "clip_sha256": None if inputs.clip is None else inputs.clip.sha256,
        "threshold": {
            "similarity": threshold,
            "l2_ratio": COPY_THRESHOLD,
            "distance": None if distance is None else distance.distance,
            "rule": background.threshold.rule if distance is None else distance.rule,
            "source": background.threshold.source,
        },
        "train": _describe_images(inputs.train),
        "reference": None if inputs.reference is None else _describe_images(inputs.reference),
        "background": {
            "train": replace(summarize(background.train.similarity, threshold), share_above=background.train_share),
            "reference": None
            if reference is None
            else replace(summarize(reference.similarity, threshold), share_above=background.reference_share),
        },
        "models": list(models),
    }


def _describe_extractor(extractor: Extractor) -> dict[str, Any]:
    names = ("name", "sha256", "preprocessing", "dimensions")
    return {name: getattr(extractor, name) for name in names}


def _describe_images(images: Collection) -> dict[str, Any]:
    duplicated = sum(count > 1 for count in Counter(images.hashes).values())
    return {
        "folder": images.place,
        "num_images": len(images),
        "num_distinct": len(images.distinct),
        "num_duplicated": duplicated,
        "sha256": images.sha256,
    }


def training_folder(settings: AuditSettings, train: Collection) -> Path:
    """Return where the training images that the rows name are found: their folder, or below the output folder."""
    return Path(train.place) if train.is_folder else settings.output_dir / "training"


def write(setup: Setup, audited: Sequence[Audited], report: dict[str, Any]) -> None:
    """Write the three files; the training images of a dataset that are named in them go to ``training/``."""
    folder, inputs, background = setup.settings.output_dir, setup.inputs, setup.background
    train, reference = inputs.train, inputs.reference
    rows = [train.distinct[position] for position in background.positions.tolist()]
    tables = [records.background_table("train", train, rows, background.train, train)]
    if reference is not None and background.reference is not None:
        matched = background.reference
        tables.append(records.background_table("reference", reference, range(len(reference)), matched, train))
    records.write_table(tables, folder / records.BACKGROUND)
    records.write_table([one.pairs for one in audited], folder / records.PAIRS)
    if not train.is_folder:
        target = training_folder(setup.settings, train)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        columns = [one.pairs[column].to_pylist() for one in audited for column in ("nearest_file", "own_file")]
        named = {file for column in columns for file in column}
        for row, file in enumerate(train.files):
            if file in named:
                train.image(row).save(target / file)
    records.write_report(report, folder / records.REPORT)
    write_report(folder, training_folder(setup.settings, train))

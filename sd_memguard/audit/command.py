"""`sd-memguard audit`: how much models copy of their training images, in numbers and images."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch

from sd_memguard import __version__
from sd_memguard.audit import AuditError, one_image
from sd_memguard.audit.arguments import MARKER, AuditSettings, parse_arguments
from sd_memguard.audit.attacks.figures import attack_figures
from sd_memguard.audit.attacks.registry import ATTACKS
from sd_memguard.audit.attribute_probe import AttributeProbe, attribute_shares, measure_attributes, prepare_attributes
from sd_memguard.audit.captions import ChosenCaptions
from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.cache import Store, digest
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
from sd_memguard.audit.metrics.evidence import Excess
from sd_memguard.audit.metrics.measures import (
    GeneratedSet,
    PartRule,
    Probes,
    Probing,
    compare,
    copy_figures,
    detection_figures,
    membership_figures,
)
from sd_memguard.audit.metrics.quality import MAX_QUALITY_IMAGES, Quality, quality_features, quality_figures
from sd_memguard.audit.metrics.shared_parts import SharedParts, choose_num_matches
from sd_memguard.audit.metrics.signals import NotMeasurableError
from sd_memguard.audit.metrics.similarity import COPY_THRESHOLD
from sd_memguard.audit.metrics.statistics import summarize
from sd_memguard.audit.metrics.verified import FALSE_POSITIVE_RATE, SAME, CopyDistance, choose_distance
from sd_memguard.audit.models import DTYPES, ModelFiles, default_device, model_sha256, read_run_records
from sd_memguard.audit.report import (
    FORMAT,
    AttackFigures,
    AttributeShares,
    Audit,
    Backgrounds,
    CopyFigures,
    Detection,
    Features,
    Images,
    Kind,
    Membership,
    ModelReport,
    Report,
    write_audit,
)
from sd_memguard.audit.report import Threshold as ReportedThreshold
from sd_memguard.audit.reporting.card import update_card
from sd_memguard.audit.reporting.page import write_page
from sd_memguard.audit.reporting.write import background_table, pair_table, summary_text
from sd_memguard.audit.verdict import (
    HELDOUT_IMAGES,
    TRAINING_IMAGES,
    CopyBackground,
    Measured,
    compare_models,
    judge,
)
from sd_memguard.core.seeding import derive_seed, permutation

logger = logging.getLogger(__name__)

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
        part_rule: Of a copied part, None where parts are not looked for.
        train_share: Share of ``train`` that would be copies.
        reference_share: Of ``reference``.
        chosen: Training rows whose captions are the prompts.
        heldout: Rows of held-out images whose captions are prompts as well, or why there are none.
    """

    positions: torch.Tensor
    train: Matched
    reference: Matched | None
    threshold: Threshold
    copy_distance: CopyDistance | None
    part_rule: PartRule | None
    train_share: float
    reference_share: float
    chosen: ChosenCaptions
    heldout: list[int] | str


class Setup(NamedTuple):
    """What every model is measured with; ``probes``, ``attributes``: the reason in words where they are not there."""

    settings: AuditSettings
    inputs: Inputs
    gallery: Gallery
    background: Background
    probes: Probes | str
    quality: Quality
    attributes: AttributeProbe | str


class Prompts(NamedTuple):
    """Rows of a collection whose captions are prompts of one kind."""

    kind: Kind
    own: Collection
    rows: Sequence[int]


class ModelSource(NamedTuple):
    """A model's part of the report that its generated images do not tell."""

    name: str
    source: Literal["model", "images"]
    path: str
    sha256: str
    run: dict[str, Any] | None
    detection: Detection | None
    membership: Membership | None
    attacks: dict[str, AttackFigures]


class Audited(NamedTuple):
    """A model's part of the report, its rows, and what its verdict rests on."""

    figures: ModelReport
    pairs: pa.Table
    measured: Measured


def main(argv: Sequence[str]) -> None:
    """Run the audit that the flags ask for and print its figures; with ``--image``, look at one image."""
    if any(argument == "--image" or argument.startswith("--image=") for argument in argv):
        raise SystemExit(one_image.main(argv))
    settings = parse_arguments(argv)
    report = run_audit(settings)
    print(summary_text(report, settings.output_folder))
    print(f"the page to look at: {settings.output_folder / 'report.html'}")


def run_audit(settings: AuditSettings) -> Report:
    """Measure everything, write the report, its tables and its page, and return the report.

    Raises:
        AuditError: Before anything is generated, where the input cannot be used.
    """
    device = default_device()
    store = Store(settings.output_folder / "cache")
    inputs = open_inputs(settings, store, device)
    settings.output_folder.mkdir(parents=True, exist_ok=True)
    (settings.output_folder / MARKER).write_text("Made by `sd-memguard audit`, which replaces it when it runs again.\n")
    gallery = Gallery(inputs.train, inputs.extractor, store, device, settings.batch_size)
    setup = Setup(
        settings,
        inputs,
        gallery,
        measure_background(settings, inputs, gallery),
        choose_probes(settings, inputs),
        prepare_quality(inputs, gallery),
        prepare_attributes(gallery, inputs.reference, settings.attributes_dir, settings.seed)
        if settings.models
        else "images were given, whose captions are not known",
    )
    shutil.rmtree(settings.output_folder / "generated", ignore_errors=True)
    audited = [
        *(audit_model(name, files, setup) for name, files in settings.models.items()),
        *(audit_images(name, images, setup) for name, images in inputs.images.items()),
    ]
    report = describe(setup, audited)
    tables = pa.concat_tables([one.pairs for one in audited])
    write_audit(Audit(report, tables, background_rows(setup)), settings.output_folder)
    train_folder = place_training_images(setup, tables)
    write_page(settings.output_folder, train_folder)
    if settings.model_card is not None:
        update_card(Path(settings.model_card), report)
    return report


def measure_background(settings: AuditSettings, inputs: Inputs, gallery: Gallery) -> Background:
    """Return how alike images are that nobody copied, the threshold, and the prompts."""
    train, distinct = inputs.train, inputs.train.distinct
    positions = background_positions(len(distinct), settings.seed)
    others = gallery.match_own(positions)
    reference = gallery.match(inputs.reference) if inputs.reference is not None else None
    threshold = choose_threshold(others.similarity, None if reference is None else reference.similarity)
    copy_distance = part_rule = None
    if settings.copy_threshold is not None:
        threshold = Threshold(settings.copy_threshold, "given as --copy_threshold", "flag")
        shares = [_share_of(matched, threshold.similarity) for matched in (others, reference)]
    else:
        copy_distance, part_rule, shares = _verified_background(settings, inputs, gallery, positions[:MAX_VERIFIED])
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
    prompts = choose_heldout(settings, inputs, reference, threshold.similarity) if settings.models else []
    found = copy_distance, part_rule, shares[0], shares[1]
    return Background(positions, others, reference, threshold, *found, chosen, prompts)


def _verified_background(
    settings: AuditSettings, inputs: Inputs, gallery: Gallery, positions: torch.Tensor
) -> tuple[CopyDistance, PartRule | None, list[float]]:
    """Return what a copy is, and which shares of the training and of the held-out images would be copies."""
    trained = gallery.verify_own(positions).distance
    heldout = gallery.verify(inputs.reference).distance if inputs.reference is not None else None
    background, of = (
        (trained, "training images, beside the others,") if heldout is None else (heldout, "images not trained on")
    )
    # Two rules share what is allowed to one.
    rate = FALSE_POSITIVE_RATE / 2 if settings.local_features else FALSE_POSITIVE_RATE
    decision = choose_distance(background, of, rate)
    copies = [None if one is None else one <= decision.distance for one in (trained, heldout)]
    part_rule = None
    if settings.local_features:
        parts = SharedParts(gallery)
        own = parts.find_own(positions).num_matches
        of_heldout = None if inputs.reference is None else parts.find(inputs.reference).num_matches
        counted = own if of_heldout is None else of_heldout
        # What is one image with a training image shares all of it.
        limit = choose_num_matches(counted[background >= SAME], rate)
        part_rule = PartRule(parts, limit.num_matches)
        decision = decision._replace(rule=f"{decision.rule}, {limit.rule}")
        copies = [
            None if one is None or other is None else one | (other >= limit.num_matches)
            for one, other in zip(copies, (own, of_heldout), strict=True)
        ]
    return decision, part_rule, [float("nan") if one is None else one.float().mean().item() for one in copies]


def choose_heldout(
    settings: AuditSettings, inputs: Inputs, matched: Matched | None, threshold: float
) -> list[int] | str:
    """Return the rows of the held-out images whose captions are prompts, ascending, or why there are none.

    They are chosen as those of training images are: a caption belongs to one image, and no training image is as
    similar as a copy.
    """
    reference, train = inputs.reference, inputs.train
    if reference is None or matched is None:
        return "no --reference_data_dir"
    known, counts = set(train.captions), Counter(reference.captions[row] for row in reference.distinct)
    clear = [
        row
        for row in reference.distinct
        if (caption := reference.captions[row]) and caption not in known and counts[caption] == 1
        if matched.similarity[row] < threshold
    ]
    order = permutation(settings.seed, "heldout captions", length=len(clear)).tolist()
    rows = sorted(clear[number] for number in order[: settings.num_prompts])
    return rows or "the reference images have no captions that the training images have not"


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
    settings, store, background = setup.settings, setup.gallery.store, setup.background
    dtype = DTYPES[settings.dtype]
    # What is computed in another precision is another result.
    sha256 = model_sha256(files) if dtype == torch.float32 else digest(model_sha256(files), settings.dtype)
    load = cache(lambda: load_pipeline(files, setup.gallery.device, dtype))
    train, reference = setup.inputs.train, setup.inputs.reference
    chosen = background.chosen
    prompts = [Prompts("duplicated", train, chosen.duplicated), Prompts("unique", train, chosen.unique)]
    sets = [generate_set(name, sha256, load, prompts, setup, 0)]
    run, samples = read_run_records(files.base if files.addition is None else files.addition.parent)
    missing = {} if run else {"run": "no memguard/ with records of a run beside the model"}
    if isinstance(background.heldout, str):
        missing["heldout"] = background.heldout
    elif reference is not None:
        heldout = [Prompts("heldout", reference, background.heldout)]
        sets.append(generate_set(name, sha256, load, heldout, setup, len(sets[0].images)))
    detection, membership, evidence = None, None, None
    attacks: dict[str, AttackFigures] = {}
    if isinstance(setup.probes, str):
        missing |= {"detection": setup.probes, "membership": setup.probes}
        missing |= {f"attacks.{attack}": setup.probes for attack in settings.attacks or ()}
    else:
        steps, scale = settings.num_inference_steps, settings.guidance_scale
        probing = Probing(store, load, sha256, settings.seed, steps, scale, settings.batch_size)
        try:
            detection = detection_figures(setup.probes, probing)
        except NotMeasurableError as error:
            missing["detection"] = str(error)
        try:
            membership, evidence = membership_figures(setup.probes, probing)
        except NotMeasurableError as error:
            missing["membership"] = str(error)
        for attack in settings.attacks or ():
            try:
                attacks[attack] = attack_figures(ATTACKS[attack], setup.probes, probing)
            except NotMeasurableError as error:
                missing[f"attacks.{attack}"] = str(error)
    source = ModelSource(name, "model", files.text, sha256, run, detection, membership, attacks)
    return _measure(source, sets, setup, samples, evidence, missing)


def audit_images(name: str, images: Collection, setup: Setup) -> Audited:
    """Measure images that were generated elsewhere."""
    place = str(Path(images.place).resolve())
    generated = GeneratedSet(replace(images, place=place), ["given"] * len(images), 1)
    missing = dict.fromkeys(("run", "detection", "membership", "heldout"), "images were given, no model")
    source = ModelSource(name, "images", images.place, images.sha256, None, None, None, {})
    return _measure(source, [generated], setup, None, None, missing)


def _measure(
    source: ModelSource,
    sets: Sequence[GeneratedSet],
    setup: Setup,
    samples: dict[str, list[Any]] | None,
    membership: Excess | None,
    missing: dict[str, str],
) -> Audited:
    """Return everything about generated images: of training captions, and of held-out ones where there are any."""
    background, seed, train = setup.background, setup.settings.seed, setup.inputs.train
    distance = None if background.copy_distance is None else background.copy_distance.distance
    copies: dict[str, CopyFigures] = {}
    attributes: dict[str, AttributeShares] = {}
    copied: dict[Kind, torch.Tensor] = {}
    nearest: dict[Kind, torch.Tensor] = {}
    agreement: dict[Kind, torch.Tensor] = {}
    chance: dict[Kind, torch.Tensor] = {}
    tables = []
    for generated in sets:
        compared = compare(generated, setup.gallery, background.threshold.similarity, distance, background.part_rule)
        figures = copy_figures(generated, compared, seed)
        found = (
            setup.attributes
            if isinstance(setup.attributes, str)
            else measure_attributes(setup.attributes, generated, setup.gallery)
        )
        if isinstance(found, str):
            missing |= {"attributes": found}
        for kind in dict.fromkeys(generated.kinds):
            hits = compared.is_copy if compared.is_own_copy is None else compared.is_own_copy
            copied[kind] = generated.by_caption(hits, kind).any(1)
            if compared.is_own_nearest is not None:
                nearest[kind] = generated.by_caption(compared.is_own_nearest, kind).double().mean(1)
            if not isinstance(found, str):
                both = torch.stack([generated.by_caption(one, kind).double().mean(1) for one in found[1:]])
                agreement[kind], chance[kind] = both[:, ~both.isnan().any(0)]
        for name in generated.kinds_and_all() if generated is sets[0] else dict.fromkeys(generated.kinds):
            copies[name] = figures[name]
            if not isinstance(found, str):
                attributes[name] = attribute_shares(found, generated, name, seed)
        tables.append(pair_table(source.name, generated, compared, train, samples))
    measured = Measured(source.name, sets[0].per_caption, copied, nearest, agreement, chance, membership)
    report = ModelReport(
        **source._asdict(),
        num_generated=sum(len(generated.images) for generated in sets),
        verdict=judge(measured, copy_background(setup), seed),
        copies=copies,
        attributes=attributes or None,
        quality=quality_figures(sets[0], setup.quality, seed),
        why_missing=missing,
    )
    return Audited(report, pa.concat_tables(tables), measured)


def copy_background(setup: Setup) -> CopyBackground:
    """Return how many images nobody copied would be copies: of the held-out images, else of the training images."""
    background = setup.background
    if background.reference is not None:
        count = len(background.reference.similarity)
        return CopyBackground(round(background.reference_share * count), count, HELDOUT_IMAGES)
    verified = background.copy_distance is not None
    count = min(len(background.positions), MAX_VERIFIED) if verified else len(background.positions)
    return CopyBackground(round(background.train_share * count), count, TRAINING_IMAGES)


def generate_set(
    name: str,
    sha256: str,
    load: Callable[[], Any],
    prompts: Sequence[Prompts],
    setup: Setup,
    first: int,
) -> GeneratedSet:
    """Generate prompts, every model from the same noise, and put the images below the output folder.

    Args:
        name: Of the model.
        sha256: Of the model.
        load: Gives the pipeline.
        prompts: By kind, of one collection.
        setup: Of the audit.
        first: Number of the first image's file.
    """
    settings, own = setup.settings, prompts[0].own
    count = settings.num_images_per_prompt
    rows = [row for part in prompts for row in part.rows for _ in range(count)]
    kinds = [part.kind for part in prompts for _ in range(count * len(part.rows))]
    captions = [own.captions[row] for row in rows]
    purpose = "audit held-out image" if prompts[0].kind == "heldout" else "audit generated image"
    seeds = [derive_seed(settings.seed, purpose, row, index % count) for index, row in enumerate(rows)]
    how = GenerationSettings(
        settings.num_inference_steps, settings.guidance_scale, settings.resolution, settings.batch_size
    )
    store, folder = setup.gallery.store, settings.output_folder
    keys = generate_into(store, load, sha256, captions, seeds, how, f"generating with {name}")
    files = [f"generated/{name}/{first + index:05}.png" for index in range(len(keys))]
    for key, file in zip(keys, files, strict=True):
        store.place_file(key, folder / file)
    images = Collection("", files, captions, lambda row: (folder / files[row]).read_bytes(), True)
    return GeneratedSet(images, kinds, count, seeds, own, rows)


def describe(setup: Setup, audited: Sequence[Audited]) -> Report:
    """Return the report."""
    settings, inputs, background = setup.settings, setup.inputs, setup.background
    similarity, distance = background.threshold.similarity, background.copy_distance
    train, reference = background.train, background.reference
    return Report(
        format=FORMAT,
        version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command,
        settings=settings.as_flags(),
        extractor=_describe_extractor(inputs.extractor),
        quality_extractor=_describe_extractor(inputs.quality_extractor),
        clip_sha256=None if inputs.clip is None else inputs.clip.sha256,
        classifier=None if isinstance(setup.attributes, str) else setup.attributes.describe(),
        threshold=ReportedThreshold(
            similarity,
            COPY_THRESHOLD,
            None if distance is None else distance.distance,
            background.threshold.rule if distance is None else distance.rule,
            background.threshold.source,
        ),
        train=_describe_images(inputs.train),
        reference=None if inputs.reference is None else _describe_images(inputs.reference),
        background=Backgrounds(
            replace(summarize(train.similarity, similarity), share_above=background.train_share),
            None
            if reference is None
            else replace(summarize(reference.similarity, similarity), share_above=background.reference_share),
        ),
        models=tuple(one.figures for one in audited),
        comparisons=compare_models([one.measured for one in audited], settings.seed),
    )


def _describe_extractor(extractor: Extractor) -> Features:
    return Features(extractor.name, extractor.sha256, extractor.preprocessing, extractor.dimensions)


def _describe_images(images: Collection) -> Images:
    duplicated = sum(count > 1 for count in Counter(images.hashes).values())
    return Images(images.place, len(images), len(images.distinct), duplicated, images.sha256)


def background_rows(setup: Setup) -> pa.Table:
    """Return a row for each image of the background."""
    inputs, background = setup.inputs, setup.background
    train, reference = inputs.train, inputs.reference
    rows = [train.distinct[position] for position in background.positions.tolist()]
    tables = [background_table("train", train, rows, background.train, train)]
    if reference is not None and background.reference is not None:
        tables.append(background_table("reference", reference, range(len(reference)), background.reference, train))
    return pa.concat_tables(tables)


def place_training_images(setup: Setup, pairs: pa.Table) -> Path:
    """Return where the training images are found that rows name; those of a dataset are put into ``training/``."""
    train = setup.inputs.train
    if train.is_folder:
        return Path(train.place)
    target = setup.settings.output_folder / "training"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    named = {file for column in ("nearest_file", "own_file") for file in pairs[column].to_pylist()}
    for row, file in enumerate(train.files):
        if file in named:
            train.image(row).save(target / file)
    return target

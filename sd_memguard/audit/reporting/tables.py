"""The report's numbers laid out: a card per model, the table of measures, settings and definitions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from sd_memguard.audit.reporting.charts import rounded
from sd_memguard.audit.reporting.read import Audit, Copies, Estimate, Model
from sd_memguard.audit.reporting.sentences import (
    KIND_WORDS,
    background_share,
    generated_by,
    interval_words,
    num_units,
    percent,
    share_interval,
)

GROUPS = {
    "duplicated": "Generated images of duplicated prompts",
    "unique": "Generated images of unique prompts",
    "given": "Given images",
    "all": "All generated images",
    "detection": "Detection, without generated image",
    "membership": "Membership, without generated image",
    "attributes": "Attributes of generated images",
    "quality": "Quality",
}

DEFINITIONS = {
    "Similarity": "Cosine of the features of a generated image and of its nearest training image; 1 is the same.",
    "Copy": "A generated image that is a training image but for crop, translation, scale, small rotation, flip and "
    "colour; with --copy_threshold, one whose similarity is at or above it.",
    "Distance": "What that leaves in the parts that differ most, over their contrast; 0 is the same.",
    "Background": "The same similarity among images that nobody copied: similar without copying.",
    "Captions extracted": "Share of training captions with at least one generated image that is a copy.",
    "L2 ratio": "Distance to the nearest training image over the mean one to the 50 nearest (Carlini et al. 2023).",
    "MQ": "The same ratio with squared distances, as the authors of IET-AGC compute it.",
    "Detection": "Size of the text-conditional noise prediction (Wen et al. 2024): captions trained on against others.",
    "Membership": "Denoising loss at fixed timesteps and noise: training images against others.",
    "AUC": "Chance that the signal ranks a training sample above another one; 0.5 tells nothing.",
    "TPR at 1% FPR": "Share of training samples that are told where 1% of the others are taken for one.",
    "Attributes": "Read by a classifier trained on real images: what captions name, and what they leave open.",
    "KID": "Kernel distance between generated images and images, mean and spread over subsets; lower is closer.",
    "FID": "Fréchet distance between generated images and images, where the sample is large enough; lower is closer.",
    "CLIP score": "How well a generated image fits its caption, by a CLIP model; higher is better.",
    "Skip ratio": "Share of the times a training image was seen at which the guard skipped or augmented it.",
    "Intervals": "95%, by bootstrap over captions; where none or all are copies, the exact binomial bound.",
}
"""Each word of the page in one line; docs/audit.md has formulas and sources."""

MEASURE_LABELS = {
    "detection.auc": ("AUC, captions", 3),
    "detection.tpr_at_1_fpr": ("TPR at 1% FPR, captions", None),
    "membership.auc": ("AUC, loss", 3),
    "membership.tpr_at_1_fpr": ("TPR at 1% FPR, loss", None),
    "membership.train_loss": ("Loss on training images", 4),
    "membership.reference_loss": ("Loss on images not trained on", 4),
    "attributes.caption_accuracy": ("Named by the caption and shown", None),
    "attributes.open_agreement": ("Left open, and as in the training image", None),
    "attributes.chance_agreement": ("The same by chance", None),
    "quality.kid_train": ("KID to training images", 4),
    "quality.kid_reference": ("KID to images not trained on", 4),
    "quality.fid_train": ("FID to training images", 1),
    "quality.fid_reference": ("FID to images not trained on", 1),
    "quality.clip_score": ("CLIP score", 3),
}
"""Label and decimals of each measure; None: a share, shown as a percentage."""


class KindRow(NamedTuple):
    """The share of copies of one kind of generated images, in words and as lengths of a bar in percent of its track."""

    kind: str
    label: str
    percent: str
    counted: str
    interval: str
    bar: float
    low: float
    high: float
    background: float | None


class Card(NamedTuple):
    """A model's key numbers."""

    name: str
    path: str
    run: str
    rows: tuple[KindRow, ...]


class Cell(NamedTuple):
    """A measured value and its interval, or instead of both the words for a value that is not known."""

    value: str
    interval: str = ""
    unknown: str = "not measured"


class MeasureRow(NamedTuple):
    """One measure over all models, in their order."""

    group: str
    label: str
    cells: tuple[Cell, ...]


def cards(audit: Audit) -> list[Card]:
    """Return the key numbers of each model."""
    background = background_share(audit)
    return [
        Card(
            model.name,
            model.path,
            _run_words(model),
            tuple(_kind_row(kind, model.copies[kind], background) for kind in audit.kinds() if kind in model.copies),
        )
        for model in audit.models
    ]


def _run_words(model: Model) -> str:
    if model.source == "images":
        return "images that were given"
    if not model.run:
        return "how it was trained is not known"
    run = model.run
    guarded = run.get("memguard") not in (False, "off", None)
    words = ["guard on" if guarded else "guard off"]
    if guarded and run.get("preset"):
        words.append(f"preset {run['preset']}")
    counts = (("num_shards", "shard"), ("num_rounds", "round"), ("global_step", "step"))
    words += [
        f"{run[key]:,} {unit}{'' if run[key] == 1 else 's'}" for key, unit in counts if isinstance(run.get(key), int)
    ]
    return ", ".join(words)


def _kind_row(kind: str, copies: Copies, background: float | None) -> KindRow:
    share = copies.copies / copies.count if copies.count else 0.0
    low, high = share_interval(share, copies.share, num_units(kind, copies))
    return KindRow(
        kind,
        KIND_WORDS[kind],
        percent(share) if copies.count else "none",
        f"{copies.copies:,} of {generated_by(kind, copies.count)}",
        f"{percent(low)} to {percent(high)}" if copies.count else "",
        rounded(share * 100),
        rounded(low * 100),
        rounded(high * 100),
        None if background is None else rounded(background * 100),
    )


def measure_rows(audit: Audit) -> list[MeasureRow]:
    """Return every measure over all models; the shares of copies come first."""
    rows = [row for kind in [*audit.kinds(), "all"] for row in _copy_rows(audit, kind)]
    for key, (label, digits) in MEASURE_LABELS.items():
        cells = tuple(_cell(model.measures[key], digits, _why(model, key)) for model in audit.models)
        rows.append(MeasureRow(key.split(".")[0], label, cells))
    return rows


def _copy_rows(audit: Audit, kind: str) -> Iterator[MeasureRow]:
    copies = [model.copies.get(kind) for model in audit.models]
    if not any(copies) or (kind == "all" and len(audit.kinds()) == 1):
        return

    def row(label: str, cell: Callable[[Copies], Cell]) -> MeasureRow:
        cells = (cell(part) if part and part.count else Cell("", unknown="no such generated images") for part in copies)
        return MeasureRow(kind, label, tuple(cells))

    def share_row(label: str, share: Callable[[Copies], Estimate | None]) -> MeasureRow:
        return row(label, lambda part: _share_cell(share(part), num_units(kind, part)))

    yield share_row("Copies", lambda part: (part.share or Estimate(0))._replace(value=part.copies / part.count))
    if kind != "given":
        yield share_row("Captions extracted", lambda part: part.extraction)
    yield row("Similarity, mean", lambda part: _cell(part.similarity_mean, 3, ""))
    yield row("Similarity, 95th percentile", lambda part: _cell(part.similarity_p95, 3, ""))
    yield share_row("L2 copies", lambda part: part.l2_copies)
    limits = sorted({limit for part in copies if part for limit in part.mq_below}, key=float)
    if limits:
        yield row(f"MQ below {', '.join(limits)}", partial(_mq_cell, limits))


def _share_cell(estimate: Estimate | None, num_units: int) -> Cell:
    if estimate is None:
        return Cell("")
    low, high = share_interval(estimate.value, estimate, num_units)
    return Cell(percent(estimate.value), f"{percent(low)} to {percent(high)}")


def _mq_cell(limits: Sequence[str], copies: Copies) -> Cell:
    counts = [f"{copies.mq_below[limit]:,}" if limit in copies.mq_below else "unknown" for limit in limits]
    return Cell(f"{', '.join(counts)} of {copies.count:,}")


def _cell(estimate: Estimate | None, digits: int | None, why: str) -> Cell:
    if estimate is None:
        return Cell("", unknown=f"not measured: {why}" if why else "not measured")
    value = percent(estimate.value) if digits is None else f"{estimate.value:.{digits}f}"
    return Cell(value, interval_words(estimate, digits))


def _why(model: Model, key: str) -> str:
    part, name = key.split(".")
    return next((model.why_missing[at] for at in (key, name, part) if at in model.why_missing), "")


def settings_tables(audit: Audit) -> dict[str, list[tuple[str, str]]]:
    """Return everything that was set, with hashes, by heading."""
    threshold = audit.threshold
    tables = {
        "Settings": list(_flat(audit.facts.get("settings", {}))),
        "Threshold": [
            ("distance of a copy", "not verified" if threshold.distance is None else f"{threshold.distance:g}"),
            ("similarity", f"{threshold.similarity:g}"),
            ("rule", threshold.rule),
            ("source", threshold.source),
            ("L2 ratio", f"{threshold.l2_ratio:g}"),
        ],
        "Features": list(_flat(audit.facts.get("extractor", {}))),
        "Features for KID and FID": list(_flat(audit.facts.get("quality_extractor", {}))),
        "Training images": list(_flat(audit.facts.get("train", {}))),
        "Images not trained on": list(_flat(audit.facts.get("reference", {}))),
    }
    for model in audit.models:
        rows = [("source", model.source), ("path", model.path), ("sha256", model.sha256 or "not known")]
        rows += [("generated", f"{model.num_generated:,}"), *(_flat(model.run or {}))]
        if model.timesteps:
            rows.append(("timesteps of the loss", ", ".join(f"{step:g}" for step in model.timesteps)))
        tables[f"Model {model.name}"] = rows
    return {heading: rows for heading, rows in tables.items() if rows}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", text) for name, text in _flat(value))
        else:
            yield key, _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value)) or "none"
    return "not given" if value is None else str(value)


def short_name(file: str) -> str:
    """Return the last part of a path, the rest of which is told once in the settings."""
    return PurePath(file).name or file

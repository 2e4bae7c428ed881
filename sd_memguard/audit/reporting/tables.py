"""The report's numbers laid out: a card per model, the table of measures, settings and definitions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from sd_memguard.audit.metrics.statistics import Estimate
from sd_memguard.audit.report import ALL, KINDS, MEASURES, AttackFigures, CopyFigures, Evidence, ModelReport, Report
from sd_memguard.audit.reporting.charts import rounded
from sd_memguard.audit.reporting.sentences import (
    KIND_WORDS,
    MEASURE_WORDS,
    background_share,
    interval_words,
    num_units,
    p_words,
    percent,
    share_interval,
    share_words,
)

GROUPS = {
    "duplicated": "Images of duplicated prompts",
    "unique": "Images of unique prompts",
    "given": "Given images",
    "heldout": "Images of held-out prompts",
    "all": "Images of all training prompts",
    "detection": "Detection, without generated images",
    "membership": "Membership, without generated images",
    "attacks": "Attacks",
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
    "Attacks": "What an adversary gets who asks more of the model than images of captions; for scale, audit the base "
    "model as well. A row of the UNet is one image at one step; with a gradient it counts three times.",
    "AUC": "Chance that the signal ranks a training sample above another one; 0.5 tells nothing.",
    "TPR at 1% FPR": "Share of training samples that are told where 1% of the others are taken for one.",
    "Attributes": "Read by a classifier trained on real images: what captions name, and what they leave open.",
    "KID": "Kernel distance between generated images and images, mean and spread over subsets; lower is closer.",
    "FID": "Fréchet distance between generated images and images, where the sample is large enough; lower is closer.",
    "CLIP score": "How well a generated image fits its caption, by a CLIP model; higher is better.",
    "Skip ratio": "Share of the times a training image was seen at which the guard skipped or augmented it.",
    "Own image is the nearest": "By pixels, no (other) training image is nearer to the generated one than the image "
    "whose caption the prompt is.",
    "Above the background": "More often than images of held-out prompts, by a permutation test over prompts; of "
    "several tests of a model, by Holm's correction at 5%.",
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
    "quality.kid_train": ("KID to training images", 4),
    "quality.kid_reference": ("KID to images not trained on", 4),
    "quality.fid_train": ("FID to training images", 1),
    "quality.fid_reference": ("FID to images not trained on", 1),
    "quality.clip_score": ("CLIP score", 3),
}
"""Label and decimals of each measure; None: a share, shown as a percentage."""


ATTRIBUTE_LABELS = {
    "caption_accuracy": "Named by the prompt and shown",
    "open_agreement": "Left open, and as in the prompt's own image",
    "chance_agreement": "The same by chance",
}


class KindRow(NamedTuple):
    """A share of one kind of generated images, in words and as lengths of a bar in percent of its track."""

    kind: str
    what: str
    label: str
    percent: str
    remark: str
    bar: float
    low: float
    high: float
    background: float | None
    is_alarming: bool


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


class EvidenceCell(NamedTuple):
    """What a measure says of one model, and whether that is above the background."""

    value: str
    background: str
    p_value: str
    is_significant: bool


class EvidenceRow(NamedTuple):
    """One measure of one kind of prompts over all models, None where it was not measured."""

    label: str
    kind: str
    cells: tuple[EvidenceCell | None, ...]


class MeasureRow(NamedTuple):
    """One measure over all models, in their order."""

    group: str
    label: str
    cells: tuple[Cell, ...]


def cards(report: Report) -> list[Card]:
    """Return the key numbers of each model."""
    background = background_share(report)
    return [
        Card(
            model.name,
            model.path,
            _run_words(model),
            tuple(_kind_row(model, kind, background) for kind in report.kinds() if kind in model.copies),
        )
        for model in report.models
    ]


def _run_words(model: ModelReport) -> str:
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


def _kind_row(model: ModelReport, kind: str, background: float) -> KindRow:
    """Return how often the own image is the nearest, or, where prompts are not known, the share of copies."""
    copies = model.copies[kind]
    copied = f"{copies.copies:,} of {copies.count:,} are copies"
    share, what, tick = copies.share, "copies", background if kind == "given" else None
    if copies.own_nearest is not None:
        share, what = copies.own_nearest, "nearest to own image"
        controls = model.copies.get("heldout")
        tick = controls.own_nearest.value if controls and controls.own_nearest and kind != "heldout" else None
    low, high = share_interval(share, num_units(kind, copies))
    significant = any(one.is_significant for one in model.verdict.evidence if one.kind == kind)
    return KindRow(
        kind,
        what,
        KIND_WORDS[kind],
        percent(share.value),
        f"{percent(low)} to {percent(high)}; {copied}",
        rounded(share.value * 100),
        rounded(low * 100),
        rounded(high * 100),
        None if tick is None else rounded(tick * 100),
        significant,
    )


def evidence_rows(report: Report) -> list[EvidenceRow]:
    """Return what the verdicts rest on, the strongest first, each measure over all models."""
    found = [{(one.measure, one.kind): one for one in model.verdict.evidence} for model in report.models]
    keys = sorted(
        dict.fromkeys(key for evidence in found for key in evidence),
        key=lambda key: (MEASURES.index(key[0]), KINDS.index(key[1]) if key[1] else 0),
    )
    return [
        EvidenceRow(
            MEASURE_WORDS[measure] if kind != "given" else "Verified copy of a training image",
            KIND_WORDS[kind] if kind else "",
            tuple(_evidence_cell(evidence.get((measure, kind))) for evidence in found),
        )
        for measure, kind in keys
    ]


def _evidence_cell(one: Evidence | None) -> EvidenceCell | None:
    if one is None:
        return None
    if one.measure == "membership":
        value, background = f"{one.value.value:.2f} ({interval_words(one.value, 2)})", "0.50"
    else:
        value, background = share_words(one.value), percent(min(max(one.background.value, 0), 1))
    return EvidenceCell(value, f"{background}, {one.control}", p_words(one.p_value), one.is_significant)


def measure_rows(report: Report) -> list[MeasureRow]:
    """Return every measure over all models; those of generated images come first."""
    rows = []
    for kind in [*report.kinds(), ALL]:
        if any(kind in model.copies for model in report.models) and (kind != ALL or len(report.kinds()) > 1):
            rows += [*_copy_rows(report, kind), *_attribute_rows(report, kind)]
    for key, (label, digits) in MEASURE_LABELS.items():
        part, name = key.split(".")
        cells = []
        for model in report.models:
            found = getattr(getattr(model, part), name, None)
            cells.append(_cell(found, digits, _why(model, part, name)))
        rows.append(MeasureRow(part, label, tuple(cells)))
    return [*rows, *_attack_rows(report)]


def _copy_rows(report: Report, kind: str) -> Iterator[MeasureRow]:
    copies = [model.copies.get(kind) for model in report.models]

    def row(label: str, cell: Callable[[CopyFigures], Cell]) -> MeasureRow:
        cells = (cell(part) if part else Cell("", unknown="no such generated images") for part in copies)
        return MeasureRow(kind, label, tuple(cells))

    def share_row(label: str, share: Callable[[CopyFigures], Estimate | None]) -> MeasureRow:
        return row(label, lambda part: _share_cell(share(part), num_units(kind, part)))

    yield share_row("Copies of any training image", lambda part: part.share)
    if any(part and part.extraction for part in copies):
        yield share_row("Captions extracted", lambda part: part.extraction)
    if any(part and part.own_nearest for part in copies):
        label = "Own held-out image is the nearest" if kind == "heldout" else "Own training image is the nearest"
        yield share_row(label, lambda part: part.own_nearest)
    yield row("Similarity, mean", lambda part: _cell(part.similarity_mean, 3, ""))
    yield row("Similarity, 95th percentile", lambda part: _cell(part.similarity_p95, 3, ""))
    yield share_row("L2 copies", lambda part: part.l2_copies)
    limits = sorted({limit for part in copies if part for limit in part.mq_below}, key=float)
    yield row(f"MQ below {', '.join(limits)}", partial(_mq_cell, limits))


def _attribute_rows(report: Report, kind: str) -> Iterator[MeasureRow]:
    shares = [(model.attributes or {}).get(kind) for model in report.models]
    if any(shares):
        for name, label in ATTRIBUTE_LABELS.items():
            yield MeasureRow(kind, label, tuple(_cell(getattr(one, name, None), None, "") for one in shares))


def _attack_rows(report: Report) -> Iterator[MeasureRow]:
    """Yield what attacks got, of each attack what, with what success, and at what cost."""
    titles = {name: attack.title for model in report.models for name, attack in model.attacks.items()}
    for name, title in titles.items():
        attacks = [model.attacks.get(name) for model in report.models]

        def row(label: str, cell: Callable[[AttackFigures], Cell], of: str = name, said: str = title) -> MeasureRow:
            cells = (
                _cell(None, None, model.why_missing.get(f"attacks.{of}", ""))
                if (one := model.attacks.get(of)) is None
                else cell(one)
                for model in report.models
            )
            return MeasureRow("attacks", f"{said}: {label}", tuple(cells))

        what = "came out" if any(one and one.is_share for one in attacks) else "mean score"
        yield row(f"{what}, images trained on", lambda one: _attacked_cell(one.train, one.train_before, one.is_share))
        yield row(
            f"{what}, held-out images", lambda one: _attacked_cell(one.reference, one.reference_before, one.is_share)
        )
        yield row("AUC", lambda one: _cell(one.auc, 3, ""))
        yield row("TPR at 1% FPR", lambda one: _cell(one.tpr_at_1_fpr, None, ""))
        yield row(
            "cost of an image",
            lambda one: Cell(f"{one.evaluations:,} rows of the UNet", f"{one.num_train} + {one.num_reference} images"),
        )


def _attacked_cell(found: Estimate, before: Estimate | None, is_share: bool) -> Cell:
    cell = _cell(found, None if is_share else 4, "")
    return cell if before is None else cell._replace(value=f"{cell.value}, before {percent(before.value)}")


def _share_cell(estimate: Estimate | None, num_units: int) -> Cell:
    if estimate is None:
        return Cell("")
    low, high = share_interval(estimate, num_units)
    return Cell(percent(estimate.value), f"{percent(low)} to {percent(high)}")


def _mq_cell(limits: Sequence[str], copies: CopyFigures) -> Cell:
    counts = [f"{copies.mq_below[limit]:,}" if limit in copies.mq_below else "unknown" for limit in limits]
    return Cell(f"{', '.join(counts)} of {copies.count:,}")


def _cell(found: Estimate | float | None, digits: int | None, why: str) -> Cell:
    if found is None:
        return Cell("", unknown=f"not measured: {why}" if why else "not measured")
    value = found.value if isinstance(found, Estimate) else found
    text = percent(value) if digits is None else f"{value:.{digits}f}"
    return Cell(text, interval_words(found, digits) if isinstance(found, Estimate) else "")


def _why(model: ModelReport, part: str, name: str) -> str:
    return model.quality.why_missing.get(name, "") if part == "quality" else model.why_missing.get(part, "")


def settings_tables(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Return everything that was set, with hashes, by heading."""
    parts = {
        "Settings": report.settings,
        "Threshold": asdict(report.threshold),
        "Features": asdict(report.extractor),
        "Features for KID and FID": asdict(report.quality_extractor),
        "Training images": asdict(report.train),
        "Held-out images": asdict(report.reference) if report.reference else {},
        "Attribute classifier, on real images": asdict(report.classifier) if report.classifier else {},
    }
    for model in report.models:
        parts[f"Model {model.name}"] = {
            "source": model.source,
            "path": model.path,
            "sha256": model.sha256,
            "generated": model.num_generated,
            **(model.run or {}),
            **({"timesteps of the loss": model.membership.timesteps} if model.membership else {}),
        }
    return {heading: list(_flat(values)) for heading, values in parts.items() if values}


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

"""The rows of an audit's two tables, and what it prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sd_memguard.audit.collection import Collection
from sd_memguard.audit.metrics.background import Matched
from sd_memguard.audit.metrics.measures import Compared, GeneratedSet
from sd_memguard.audit.metrics.statistics import Estimate
from sd_memguard.audit.report import (
    ALL,
    BACKGROUND_SCHEMA,
    PAIR_SCHEMA,
    PAIRS,
    REPORT,
    RUN_COLUMNS,
    ModelReport,
    Report,
)
from sd_memguard.audit.reporting.sentences import share_words, tell


def pair_table(
    name: str,
    generated: GeneratedSet,
    compared: Compared,
    train: Collection,
    samples: Mapping[str, Sequence[Any]] | None,
) -> pa.Table:
    """Return a row for each generated image of one model.

    Args:
        name: Of the model.
        generated: Its images.
        compared: What they have in common with the training images.
        train: The training images.
        samples: Columns of the run's ``samples.parquet``, or None.
    """
    images, count = generated.images, len(generated.images)
    nearest = compared.nearest.row.tolist()
    unknown = [None] * count
    columns = {
        "model": [name] * count,
        "kind": generated.kinds,
        "caption": images.captions,
        "seed": list(generated.seeds) or unknown,
        "file": [str(Path(images.place) / file) for file in images.files],
        "own_file": unknown if generated.own is None else [generated.own.files[row] for row in generated.own_rows],
        "nearest_file": [train.files[row] for row in nearest],
        "nearest_caption": [train.captions[row] for row in nearest],
        "nearest_sample_id": nearest,
        "similarity": compared.nearest.similarity.tolist(),
        "own_similarity": unknown if compared.own is None else compared.own.tolist(),
        "is_own_nearest": unknown if compared.is_own_nearest is None else compared.is_own_nearest.tolist(),
        "l2_ratio": compared.ratios.l2.tolist(),
        "mq_ratio": compared.ratios.squared.tolist(),
        "distance": unknown if compared.distance is None else compared.distance.tolist(),
        "num_matches": unknown if compared.num_matches is None else compared.num_matches.tolist(),
        "is_copy": compared.is_copy.tolist(),
        "is_l2_copy": compared.is_l2_copy().tolist(),
        **_histories(nearest, train, samples),
    }
    return pa.table(columns, schema=PAIR_SCHEMA)


def _histories(
    nearest: Sequence[int], train: Collection, samples: Mapping[str, Sequence[Any]] | None
) -> dict[str, list[Any]]:
    """Return what the run knows of these training images, None where it has another file under the sample id."""
    position: dict[int, int] = {}
    if samples is not None:
        for index, (sample_id, file) in enumerate(zip(samples["sample_id"], samples["file"], strict=True)):
            if sample_id < len(train) and (not train.is_folder or train.files[sample_id] == file):
                position[sample_id] = index
    known = [position.get(row) for row in nearest]
    return {
        column: [None if index is None or samples is None else samples[column][index] for index in known]
        for column in RUN_COLUMNS
    }


def background_table(
    kind: str, images: Collection, rows: Sequence[int], matched: Matched, train: Collection
) -> pa.Table:
    """Return a row for each image of a background: its nearest training image."""
    columns = {
        "kind": [kind] * len(rows),
        "similarity": matched.similarity.tolist(),
        "file": [images.files[row] for row in rows],
        "nearest_file": [train.files[row] for row in matched.row.tolist()],
    }
    return pa.table(columns, schema=BACKGROUND_SCHEMA)


def summary_text(report: Report, output_dir: Path) -> str:
    """Return what to print: the verdict, a line for each model and kind, and where the files are."""
    told = tell(report)
    lines = [told.headline, *(f"  {line}" for line in (*told.found, *told.sure)), ""]
    threshold = report.threshold
    lines.append(f"Copy: similarity of {threshold.similarity:.3f} or more ({threshold.rule}).")
    if threshold.distance is not None:
        lines[-1] = f"Copy: verified, at a distance of {threshold.distance:.3f} or less, {threshold.rule}."
    header = ("", "prompts", "generated", "copies", "extracted", "own nearest", "sim. mean", "L2 copies")
    rows = [
        (
            model.name,
            kind,
            str(figures.count),
            _share(figures.share),
            _share(figures.extraction),
            _share(figures.own_nearest),
            f"{figures.similarity_mean.value:.3f}",
            _share(figures.l2_copies),
        )
        for model in report.models
        for kind, figures in model.copies.items()
        if kind != ALL or len(model.copies) > 2
    ]
    lines += ["", *_aligned([header, *rows]), ""]
    lines += [line for model in report.models for line in _further(model)]
    places = [f"Figures: {output_dir / REPORT}", f"A row for each generated image: {output_dir / PAIRS}"]
    return "\n".join([*lines, "", *places])


def _further(model: ModelReport) -> list[str]:
    """Return what is known of a model besides copies."""
    found = []
    for part, words in ((model.detection, "caption signal"), (model.membership, "loss")):
        if part is not None:
            rate = f"{part.tpr_at_1_fpr.value:.0%} at 1% false alarms"
            found.append(f"{words} tells them from held out: AUC {part.auc.value:.3f}, {rate}")
    for attack in model.attacks.values():
        got = (
            f"{attack.train.value:.0%} come out, of held out {attack.reference.value:.0%}; " if attack.is_share else ""
        )
        found.append(
            f"{attack.title}: {got}AUC {attack.auc.value:.3f}, at {attack.evaluations:,} rows of the UNet each"
        )
    for kind, shares in (model.attributes or {}).items():
        named, opened, chance = (
            "unknown" if one is None else f"{one.value:.0%}"
            for one in (shares.caption_accuracy, shares.open_agreement, shares.chance_agreement)
        )
        found.append(
            f"attributes, {kind}: {named} of what prompts name is shown; {opened} of the rest agrees, "
            f"by chance {chance}"
        )
    quality = model.quality
    for one, words in (
        (quality.kid_train, "KID to training"),
        (quality.kid_reference, "KID to held out"),
        (quality.clip_score, "CLIP score"),
    ):
        if one is not None:
            found.append(f"{words} {one.value:.4g}")
    for distance, words in ((quality.fid_train, "FID to training"), (quality.fid_reference, "FID to held out")):
        if distance is not None:
            found.append(f"{words} {distance:.4g}")
    return [f"{model.name}: {'; '.join(found)}."] if found else []


def _share(estimate: Estimate | None) -> str:
    return "-" if estimate is None else share_words(estimate)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

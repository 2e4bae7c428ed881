"""The files that an audit leaves: report.json, pairs.parquet, background.parquet; and what it prints."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sd_memguard.audit.collection import Collection
from sd_memguard.audit.metrics.background import Matched
from sd_memguard.audit.metrics.measures import Compared, GeneratedSet
from sd_memguard.audit.metrics.statistics import Estimate, Summary

REPORT, PAIRS, BACKGROUND = "report.json", "pairs.parquet", "background.parquet"

RUN_COLUMNS = {
    "shard": pa.int16(),
    "seen": pa.int32(),
    "moves": pa.int32(),
    "skip_ratio": pa.float32(),
}
"""What is known of the nearest training image from the run that made the model."""

PAIR_SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "kind": pa.string(),
        "caption": pa.string(),
        "seed": pa.int64(),
        "file": pa.string(),
        "own_file": pa.string(),
        "nearest_file": pa.string(),
        "nearest_caption": pa.string(),
        "nearest_sample_id": pa.int64(),
        "similarity": pa.float32(),
        "own_similarity": pa.float32(),
        "l2_ratio": pa.float32(),
        "mq_ratio": pa.float32(),
        "distance": pa.float32(),
        "is_copy": pa.bool_(),
        "is_l2_copy": pa.bool_(),
        **RUN_COLUMNS,
    }
)
BACKGROUND_SCHEMA = pa.schema(
    {"kind": pa.string(), "similarity": pa.float32(), "file": pa.string(), "nearest_file": pa.string()}
)


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
        "seed": generated.seeds or unknown,
        "file": [str(Path(images.place) / file) for file in images.files],
        "own_file": [train.files[row] for row in generated.own_rows] or unknown,
        "nearest_file": [train.files[row] for row in nearest],
        "nearest_caption": [train.captions[row] for row in nearest],
        "nearest_sample_id": nearest,
        "similarity": compared.nearest.similarity.tolist(),
        "own_similarity": unknown if compared.own is None else compared.own.tolist(),
        "l2_ratio": compared.ratios.l2.tolist(),
        "mq_ratio": compared.ratios.squared.tolist(),
        "distance": unknown if compared.distance is None else compared.distance.tolist(),
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


def write_table(tables: Sequence[pa.Table], file: Path) -> None:
    """Write tables of one schema below each other."""
    pq.write_table(pa.concat_tables(tables), file)


def write_report(report: Mapping[str, Any], file: Path) -> None:
    """Write the report, numbers at six digits."""
    text = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """Return named tuples as mappings and floats at six significant digits: beyond them rounding speaks."""
    if isinstance(value, Estimate | Summary):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def summary_text(report: Mapping[str, Any], output_dir: Path) -> str:
    """Return the figures to print: the background, a line for each model and kind, and where the files are."""
    threshold, background = report["threshold"], report["background"]
    lines = [f"Copy: similarity of {threshold['similarity']:.3f} or more ({threshold['rule']})."]
    if threshold["distance"] is not None:
        lines = [f"Copy: verified, at a distance of {threshold['distance']:.3f} or less, {threshold['rule']}."]
    for kind, words in (
        ("train", "training images, nearest other"),
        ("reference", "images not trained on, nearest"),
    ):
        if (one := background[kind]) is not None:
            lines.append(
                f"Background, {words}: mean {one.mean:.3f}, 95% below {one.p95:.3f}, "
                f"{one.share_above:.1%} would be copies."
            )
    header = ("", "captions", "generated", "copies", "extracted", "sim. mean", "sim. 95%", "L2 copies")
    rows = [
        (
            model["name"],
            kind,
            str(figures["count"]),
            _share(figures["share"]),
            _share(figures["extraction"]),
            f"{figures['similarity_mean'].value:.3f}",
            f"{figures['similarity_p95'].value:.3f}",
            _share(figures["l2_copies"]),
        )
        for model in report["models"]
        for kind, figures in model["copies"].items()
        if kind != "all" or len(model["copies"]) > 2
    ]
    lines += ["", *_aligned([header, *rows]), ""]
    lines += [line for model in report["models"] for line in _further(model)]
    return "\n".join(
        [*lines, "", f"Figures: {output_dir / REPORT}", f"A row for each generated image: {output_dir / PAIRS}"]
    )


def _further(model: Mapping[str, Any]) -> list[str]:
    """Return what is known of a model besides copies."""
    found = []
    for key, words in (("detection", "caption signal"), ("membership", "loss")):
        if model[key] is not None:
            auc, rate = model[key]["auc"], model[key]["tpr_at_1_fpr"]
            found.append(f"{words} tells them from held out: AUC {auc.value:.3f}, {rate.value:.0%} at 1% false alarms")
    if attributes := model["attributes"]:
        figures = [attributes[key] for key in ("caption_accuracy", "open_agreement", "chance_agreement")]
        named, opened, chance = ("unknown" if one is None else f"{one.value:.0%}" for one in figures)
        found.append(
            f"{named} of what captions name is shown; what they leave open agrees in {opened}, by chance {chance}"
        )
    quality = model["quality"]
    for key, words in (
        ("kid_train", "KID to training"),
        ("kid_reference", "KID to held out"),
        ("clip_score", "CLIP score"),
    ):
        if quality[key] is not None:
            found.append(f"{words} {quality[key].value:.4g}")
    for key, words in (("fid_train", "FID to training"), ("fid_reference", "FID to held out")):
        if quality[key] is not None:
            found.append(f"{words} {quality[key]:.4g}")
    return [f"{model['name']}: {'; '.join(found)}."] if found else []


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.1%} ({estimate.low:.0%}-{estimate.high:.0%})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

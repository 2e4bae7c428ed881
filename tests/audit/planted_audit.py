"""Writes a folder as an audit leaves it, from images whose copies are known, for the tests of the report."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageFilter

from sd_memguard.assets import demo_data_path, demo_heldout_path
from sd_memguard.audit.metrics.statistics import Estimate, Summary
from sd_memguard.audit.report import (
    BACKGROUND_SCHEMA,
    FORMAT,
    PAIR_SCHEMA,
    Audit,
    Backgrounds,
    CopyFigures,
    Detection,
    Features,
    Images,
    Membership,
    ModelReport,
    QualityFigures,
    Report,
    Threshold,
    Verdict,
    write_audit,
)
from sd_memguard.audit.verdict import HELDOUT_IMAGES, CopyBackground, Measured, compare_models, judge

CREATED = "2026-01-02T03:04:05+00:00"


class Planted(NamedTuple):
    """A generated image: its model, its kind, and the training image whose caption it has (None: a given image)."""

    model: str
    kind: str
    caption: str
    own_file: str | None
    seed: int | None
    image: Image.Image


def demo_rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def planted_generated(num_captions: int = 6, per_caption: int = 2) -> list[Planted]:
    """Return generated images of two models: `plain` copies the duplicated prompts, `guarded` copies nothing."""
    train, heldout = demo_data_path(), demo_heldout_path()
    rows = demo_rows(train)
    counts = {row["text"]: [other["text"] for other in rows].count(row["text"]) for row in rows[:80]}
    often = list({row["text"]: row for row in rows[:80] if counts[row["text"]] > 1}.values())[:num_captions]
    once = [row for row in rows[:80] if counts[row["text"]] == 1][:num_captions]
    strangers = [Image.open(heldout / row["file_name"]).convert("RGB") for row in demo_rows(heldout)]
    generated = []
    for model in ("plain", "guarded"):
        for kind, chosen in (("duplicated", often), ("unique", once)):
            for row in chosen:
                for seed in range(per_caption):
                    own = Image.open(train / row["file_name"]).convert("RGB")
                    copied = model == "plain" and kind == "duplicated" and len(generated) % 4 != 3
                    blur = own.filter(ImageFilter.GaussianBlur(1 + seed))
                    image = blur if copied else strangers[len(generated)].filter(ImageFilter.GaussianBlur(2))
                    generated.append(Planted(model, kind, row["text"], row["file_name"], seed, image))
    return generated


class _Features:
    """Cosine of coarse pixels around their mean over the training images: crude, but a copy is a copy."""

    def __init__(self, train: Sequence[Image.Image]) -> None:
        rows = np.stack([self._row(image) for image in train])
        self.mean = rows.mean(0)

    @staticmethod
    def _row(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel() / 255

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        rows = np.stack([self._row(image) for image in images]) - self.mean
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@functools.cache
def _gallery() -> tuple[Any, ...]:
    """Return the demo's training images and what is measured on them alone, once for all tests."""
    folder, heldout = demo_data_path(), demo_heldout_path()
    rows = demo_rows(folder)
    train = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    contents = [image.tobytes() for image in train]
    distinct = sorted({content: index for index, content in reversed(list(enumerate(contents)))}.values())
    features = _Features(train)
    gallery = features([train[index] for index in distinct])
    among = gallery @ gallery.T - 2 * np.eye(len(gallery))
    reference = features([Image.open(heldout / row["file_name"]) for row in demo_rows(heldout)]) @ gallery.T
    return rows, contents, distinct, features, gallery, among, reference


def write_planted_audit(
    output_dir: Path, generated: Sequence[Planted] | None = None, change: Callable[[Report], Report] = lambda same: same
) -> Report:
    """Write report.json, pairs.parquet, background.parquet and the generated images, and return the report.

    `change` gets the report before it is written, and returns what is written instead.
    """
    generated = planted_generated() if generated is None else generated
    rows, contents, distinct, features, gallery, among, reference = _gallery()
    threshold = round(float(np.quantile(reference.max(1), 0.99)), 4)
    background = {"train": among.max(1), "reference": reference.max(1)}
    found = [
        {"kind": kind, "similarity": float(value), "file": "", "nearest_file": ""}
        for kind, values in background.items()
        for value in values
    ]
    output_dir.mkdir(parents=True, exist_ok=True)
    queries = features([one.image for one in generated]) @ gallery.T
    position = {row["file_name"]: index for index, row in enumerate(rows)}
    pairs = []
    for number, (one, similarities) in enumerate(zip(generated, queries, strict=True)):
        nearest = int(similarities.argmax())
        row = distinct[nearest]
        own = None
        if one.own_file:
            content = contents[position[one.own_file]]
            own = next(value for index, value in zip(distinct, similarities, strict=True) if contents[index] == content)
        distances = np.sqrt(np.maximum(2 - 2 * np.sort(similarities)[::-1][:50], 1e-9))
        ratio = distances[0] / distances.mean()
        file = f"generated/{one.model}/{number:05d}.png"
        (output_dir / file).parent.mkdir(parents=True, exist_ok=True)
        one.image.save(output_dir / file)
        guarded = one.model == "guarded"
        pairs.append(
            {
                "model": one.model,
                "kind": one.kind,
                "caption": one.caption,
                "seed": one.seed,
                "own_file": one.own_file,
                "file": file,
                "nearest_file": rows[row]["file_name"],
                "nearest_caption": rows[row]["text"],
                "nearest_sample_id": row,
                "similarity": float(similarities[nearest]),
                "own_similarity": None if own is None else float(own),
                "is_own_nearest": None if own is None else bool(own >= similarities[nearest]),
                "l2_ratio": float(ratio),
                "mq_ratio": float(distances[0] ** 2 / (distances**2).mean()),
                "distance": float(1 - similarities[nearest]),
                "is_copy": bool(similarities[nearest] >= threshold),
                "is_l2_copy": bool(ratio < 0.5),
                "shard": row % 4 if guarded else None,
                "seen": 20 + row % 7 if guarded else None,
                "moves": row % 3 if guarded else None,
                "skip_ratio": 15 / (20 + row % 7) if guarded else None,
            }
        )
    shares = {kind: float((values >= threshold).mean()) for kind, values in background.items()}
    measured = [measure(name, pairs) for name in dict.fromkeys(one.model for one in generated)]
    copies = CopyBackground(round(shares["reference"] * len(reference)), len(reference), HELDOUT_IMAGES)
    pixels = Features("coarse pixels", None, "16 x 16, mean off", 768)
    report = Report(
        format=FORMAT,
        version="0.0",
        created=CREATED,
        command="sd-memguard audit --model plain=runs/plain --model guarded=runs/guarded --train_data_dir bundled "
        "--reference_data_dir bundled --output_dir runs/audit",
        settings={"num_prompts": 16, "guidance_scale": 2.5, "seed": 0, "reference_data_dir": "bundled"},
        extractor=pixels,
        quality_extractor=pixels,
        clip_sha256=None,
        classifier=None,
        threshold=Threshold(
            threshold, 0.5, None, f"99% of the images not trained on are below {threshold:.3f}", "background"
        ),
        train=Images("bundled", len(rows), len(distinct), 32, "1" * 64),
        reference=Images("bundled", len(reference), len(reference), 0, "2" * 64),
        background=Backgrounds(
            *(
                Summary(
                    len(values), *map(float, (values.mean(), np.quantile(values, 0.95), values.max())), shares[kind]
                )
                for kind, values in background.items()
            )
        ),
        models=tuple(model_report(one, pairs, judge(one, copies, 0)) for one in measured),
        comparisons=compare_models(measured, 0),
    )
    schema = {"pairs": PAIR_SCHEMA, "found": BACKGROUND_SCHEMA}
    tables = [pa.Table.from_pylist(rows, schema[name]) for name, rows in (("pairs", pairs), ("found", found))]
    report = change(report)
    write_audit(Audit(report, *tables), output_dir)
    return report


def by_caption(rows: Sequence[dict[str, Any]], column: str) -> list[list[Any]]:
    """Return the values of a column by caption."""
    captions = dict.fromkeys(row["caption"] for row in rows)
    return [[row[column] for row in rows if row["caption"] == caption] for caption in captions]


def measure(name: str, pairs: Sequence[dict[str, Any]]) -> Measured:
    """Return what the verdict rests on."""
    own = [pair for pair in pairs if pair["model"] == name]
    kinds = dict.fromkeys(pair["kind"] for pair in own)
    rows = {kind: [pair for pair in own if pair["kind"] == kind] for kind in kinds}
    copied = {kind: torch.tensor([any(one) for one in by_caption(rows[kind], "is_copy")]) for kind in kinds}
    nearest = {
        kind: torch.tensor([np.mean(one) for one in by_caption(rows[kind], "is_own_nearest")])
        for kind in kinds
        if rows[kind][0]["own_file"]
    }
    return Measured(name, 2, copied, nearest, {}, {}, None)


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    means = np.random.default_rng(0).choice(array, (500, len(array))).mean(1)
    return Estimate(float(array.mean()), *map(float, np.quantile(means, [0.025, 0.975])), len(array))


def model_report(measured: Measured, pairs: Sequence[dict[str, Any]], verdict: Verdict) -> ModelReport:
    name = measured.name
    own = [pair for pair in pairs if pair["model"] == name]
    copies = {}
    for kind in [*dict.fromkeys(pair["kind"] for pair in own), "all"]:
        rows = [row for row in own if kind in (row["kind"], "all")]
        copied = by_caption(rows, "is_copy")
        similarity = estimate([row["similarity"] for row in rows])
        is_own = [row["is_own_nearest"] for row in rows]
        copies[kind] = CopyFigures(
            count=len(rows),
            copies=sum(row["is_copy"] for row in rows),
            share=estimate([np.mean(one) for one in copied]),
            captions=len(copied),
            captions_copied=sum(map(any, copied)),
            extraction=estimate([any(one) for one in copied]),
            own_nearest=None if None in is_own else estimate(is_own),
            similarity_mean=similarity,
            similarity_p95=similarity,
            l2_copies=estimate([row["is_l2_copy"] for row in rows]),
            mq_below={limit: sum(row["mq_ratio"] < float(limit) for row in rows) for limit in ("0.4", "0.5")},
        )
    guarded = name == "guarded"
    run = {"num_shards": 4 if guarded else 1, "num_rounds": 3, "global_step": 600, "preset": "default"}
    kid = Estimate(0.0213, 0.0196, 0.0231, 10)
    missing = {"fid_train": "64 images are too few", "clip_score": "no --clip_model"}
    return ModelReport(
        name=name,
        source="model",
        path=f"runs/{name}",
        sha256="3" * 64,
        run=run | {"memguard": "on" if guarded else "off"},
        num_generated=len(own),
        verdict=verdict,
        copies=copies,
        attributes=None,
        detection=Detection(Estimate(0.6 if guarded else 0.9, 0.52, 0.95, 64), Estimate(0.25, 0.1, 0.4, 64), 32, 32),
        membership=Membership(
            Estimate(0.71, 0.66, 0.76, 512),
            Estimate(0.08, 0.05, 0.11, 512),
            Estimate(0.0429, 0.0411, 0.0447, 256),
            Estimate(0.0712, 0.0691, 0.0733, 256),
            (0.1, 0.5, 0.9),
        ),
        attacks={},
        quality=QualityFigures(kid, kid, None, None, None, missing),
        why_missing={},
    )

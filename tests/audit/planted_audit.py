"""Writes a folder as an audit leaves it, from images whose copies are known, for the tests of the report."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from sd_memguard.assets import demo_data_path, demo_heldout_path

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


def write_planted_audit(output_dir: Path, generated: Sequence[Planted] | None = None, **changes: Any) -> dict[str, Any]:
    """Write report.json, pairs.parquet, background.parquet and the generated images, and return what report.json holds.

    `changes` replace parts of report.json by name.
    """
    generated = planted_generated() if generated is None else generated
    rows, contents, distinct, features, gallery, among, reference = _gallery()
    threshold = round(float(np.quantile(reference.max(1), 0.99)), 4)
    background = {"train": among.max(1), "reference": reference.max(1)}
    found = [
        {"kind": kind, "similarity": np.float32(value), "file": "", "nearest_file": ""}
        for kind, values in background.items()
        for value in values
    ]
    output_dir.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), output_dir / "background.parquet")

    queries = features([generated_image.image for generated_image in generated]) @ gallery.T
    position = {row["file_name"]: index for index, row in enumerate(rows)}
    pairs = []
    for number, (generated_image, similarities) in enumerate(zip(generated, queries, strict=True)):
        nearest = int(similarities.argmax())
        row = distinct[nearest]
        own = None
        if generated_image.own_file:
            content = contents[position[generated_image.own_file]]
            own = next(value for index, value in zip(distinct, similarities, strict=True) if contents[index] == content)
        distances = np.sqrt(np.maximum(2 - 2 * np.sort(similarities)[::-1][:50], 1e-9))
        ratio = distances[0] / distances.mean()
        file = f"generated/{generated_image.model}/{number:05d}.png"
        (output_dir / file).parent.mkdir(parents=True, exist_ok=True)
        generated_image.image.save(output_dir / file)
        guarded = generated_image.model == "guarded"
        pairs.append(
            {
                **generated_image._replace(image=None)._asdict(),
                "file": file,
                "nearest_file": rows[row]["file_name"],
                "nearest_caption": rows[row]["text"],
                "nearest_sample_id": row,
                "similarity": np.float32(similarities[nearest]),
                "own_similarity": None if own is None else np.float32(own),
                "l2_ratio": np.float32(ratio),
                "mq_ratio": np.float32(distances[0] ** 2 / (distances**2).mean()),
                "distance": np.float32(1 - similarities[nearest]),
                "is_copy": bool(similarities[nearest] >= threshold),
                "is_l2_copy": bool(ratio < 0.5),
                "shard": row % 4 if guarded else None,
                "seen": 20 + row % 7 if guarded else None,
                "moves": row % 3 if guarded else None,
                "skip_ratio": np.float32(15 / (20 + row % 7)) if guarded else None,
            }
        )
    for pair in pairs:
        del pair["image"]
    schema = {"seed": pa.int64(), "own_file": pa.string(), "own_similarity": pa.float32(), "shard": pa.int16()}
    schema |= {name: pa.int32() for name in ("seen", "moves")} | {"skip_ratio": pa.float32()}
    table = pa.Table.from_pylist(pairs)
    for name, kind in schema.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table, output_dir / "pairs.parquet")

    report = {
        "format": "sd-memguard-audit-1",
        "version": "0.0",
        "created": CREATED,
        "command": "sd-memguard audit --model plain=runs/plain --model guarded=runs/guarded --train_data_dir bundled "
        "--reference_data_dir bundled --output_dir runs/audit",
        "settings": {"num_prompts": 16, "guidance_scale": 2.5, "seed": 0, "reference_data_dir": "bundled"},
        "extractor": {"name": "coarse pixels", "sha256": None, "preprocessing": "16 x 16, mean off", "dimensions": 768},
        "threshold": {
            "similarity": threshold,
            "l2_ratio": 0.5,
            "distance": None,
            "rule": f"99% of the images not trained on are below {threshold:.3f}",
            "source": "background",
        },
        "train": {
            "folder": "bundled",
            "num_images": len(rows),
            "num_distinct": len(distinct),
            "num_duplicated": 32,
            "sha256": "1" * 64,
        },
        "reference": {
            "folder": "bundled",
            "num_images": len(reference),
            "num_distinct": len(reference),
            "num_duplicated": 0,
            "sha256": "2" * 64,
        },
        "background": {
            kind: {
                "count": len(values),
                "mean": float(values.mean()),
                "p95": float(np.quantile(values, 0.95)),
                "max": float(values.max()),
                "share_above": float((values >= threshold).mean()),
            }
            for kind, values in background.items()
        },
        "models": [
            model_entry(name, pairs) for name in dict.fromkeys(generated_image.model for generated_image in generated)
        ],
    }
    report |= changes
    (output_dir / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def estimate(values: Sequence[float]) -> dict[str, float]:
    """Return mean and bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    means = np.random.default_rng(0).choice(array, (500, len(array))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(array.mean()), "low": float(low), "high": float(high), "n": len(array)}


def model_entry(name: str, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [pair for pair in pairs if pair["model"] == name]
    kinds = [*dict.fromkeys(pair["kind"] for pair in own), "all"]
    copies = {}
    for kind in kinds:
        rows = [pair for pair in own if kind in (pair["kind"], "all")]
        captions = {
            caption: [row for row in rows if row["caption"] == caption]
            for caption in dict.fromkeys(row["caption"] for row in rows)
        }
        extracted = [any(row["is_copy"] for row in group) for group in captions.values()]
        copies[kind] = {
            "count": len(rows),
            "copies": sum(row["is_copy"] for row in rows),
            "share": estimate([np.mean([row["is_copy"] for row in group]) for group in captions.values()]),
            "captions": len(captions),
            "captions_copied": sum(extracted),
            "extraction": estimate(extracted),
            "similarity_mean": estimate([row["similarity"] for row in rows]),
            "similarity_p95": None,
            "l2_copies": estimate([row["is_l2_copy"] for row in rows]),
            "mq_below": {limit: sum(float(row["mq_ratio"]) < float(limit) for row in rows) for limit in ("0.4", "0.5")},
        }
    guarded = name == "guarded"
    run = {"num_shards": 4 if guarded else 1, "num_rounds": 3, "global_step": 600, "preset": "default"}
    return {
        "name": name,
        "source": "model",
        "path": f"runs/{name}",
        "sha256": "3" * 64,
        "num_generated": len(own),
        "run": run | {"memguard": "on" if guarded else "off"},
        "copies": copies,
        "detection": {
            "auc": {"value": 0.6 if guarded else 0.9, "low": 0.52, "high": 0.95, "n": 64},
            "tpr_at_1_fpr": {"value": 0.25, "low": 0.1, "high": 0.4, "n": 64},
            "num_train": 32,
            "num_reference": 32,
        },
        "membership": {
            "auc": {"value": 0.71, "low": 0.66, "high": 0.76, "n": 512},
            "tpr_at_1_fpr": 0.08,
            "train_loss": {"value": 0.0429, "low": 0.0411, "high": 0.0447, "n": 256},
            "reference_loss": {"value": 0.0712, "low": 0.0691, "high": 0.0733, "n": 256},
            "timesteps": [0.1, 0.5, 0.9],
        },
        "quality": {
            "kid_train": {"value": 0.0213, "low": 0.0196, "high": 0.0231, "n": 10},
            "kid_reference": {"value": 0.0254, "low": 0.0238, "high": 0.0270, "n": 10},
            "fid_train": None,
            "fid_reference": None,
            "clip_score": None,
            "why_missing": {"fid_train": "64 generated are too few", "clip_score": "no --clip_model"},
        },
        "why_missing": {},
    }

"""Reading what an audit left in its folder, checked, so that the report is made from typed values."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sd_memguard.audit import AuditError

FORMAT = "sd-memguard-audit-1"
KINDS = ("duplicated", "unique", "given")
"""Kinds of generated images, in the order they are told of: the most exposed captions first."""

FACTS = ("settings", "extractor", "quality_extractor", "train", "reference")
"""The parts of report.json that are shown as they stand."""

PAIR_COLUMNS = {
    "model": pa.string(),
    "kind": pa.string(),
    "caption": pa.string(),
    "seed": pa.int64(),
    "file": pa.string(),
    "own_file": pa.string(),
    "nearest_file": pa.string(),
    "nearest_caption": pa.string(),
    "similarity": pa.float32(),
    "own_similarity": pa.float32(),
    "l2_ratio": pa.float32(),
    "distance": pa.float32(),
    "is_copy": pa.bool_(),
    "is_l2_copy": pa.bool_(),
    "shard": pa.int16(),
    "seen": pa.int32(),
    "moves": pa.int32(),
    "skip_ratio": pa.float32(),
}
NEVER_NULL = ("model", "kind", "file", "similarity", "is_copy")
BACKGROUND_COLUMNS = {"kind": pa.string(), "similarity": pa.float32()}

MEASURES = {
    "detection": ("auc", "tpr_at_1_fpr"),
    "membership": ("auc", "tpr_at_1_fpr", "train_loss", "reference_loss"),
    "attributes": ("caption_accuracy", "open_agreement", "chance_agreement"),
    "quality": ("kid_train", "kid_reference", "fid_train", "fid_reference", "clip_score"),
}
"""The measures of a model as a whole, by the part of report.json that holds them."""


class Estimate(NamedTuple):
    """A value with its 95% interval and the number of units behind it; None where it has no interval."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Copies:
    """What was counted on one kind of generated images of a model."""

    count: int
    copies: int
    share: Estimate | None
    captions: int
    captions_copied: int
    extraction: Estimate | None
    similarity_mean: Estimate | None
    similarity_p95: Estimate | None
    l2_copies: Estimate | None
    mq_below: Mapping[str, int]


class Model(NamedTuple):
    """One audited model, or folder of images: ``measures`` are keyed as in ``MEASURES``, with a dot between."""

    name: str
    source: str
    path: str
    sha256: str | None
    num_generated: int
    run: Mapping[str, Any] | None
    copies: Mapping[str, Copies]
    measures: Mapping[str, Estimate | None]
    timesteps: tuple[float, ...]
    why_missing: Mapping[str, str]


@dataclass(frozen=True)
class Background:
    """How similar images are that nobody copied; ``share_above`` is the share that would count as copies."""

    count: int
    mean: float
    p95: float
    max: float
    share_above: float


class Threshold(NamedTuple):
    """What counts as a copy, and how that was found: ``distance`` after registration, None: by similarity alone."""

    similarity: float
    l2_ratio: float
    rule: str
    source: str
    distance: float | None


class Audit(NamedTuple):
    """Everything an audit found: ``facts`` are the descriptive parts of report.json as they stand there."""

    version: str
    created: str
    command: str
    threshold: Threshold
    background: Mapping[str, Background]
    models: tuple[Model, ...]
    facts: Mapping[str, Mapping[str, Any]]
    pairs: pa.Table
    background_rows: pa.Table

    def kinds(self) -> list[str]:
        """Return the kinds that any model has generated images of, the most exposed first."""
        return [kind for kind in KINDS if any(kind in model.copies for model in self.models)]


class _Node:
    """A value of report.json that knows where it stands, so that a complaint can name it."""

    def __init__(self, value: Any, file: Path, where: str = "") -> None:
        self.value, self.file, self.where = value, file, where

    def __getitem__(self, key: str) -> "_Node":
        if not isinstance(self.value, dict):
            raise self.complaint(f"`{self.where or 'the file'}` must be an object")
        if key not in self.value:
            raise self.complaint(f"`{self.below(key)}` is missing")
        return _Node(self.value[key], self.file, self.below(key))

    def below(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def get(self, key: str) -> "_Node | None":
        """Return what stands there; None where it is absent or null, which both mean unknown."""
        node = self[key] if isinstance(self.value, dict) and key in self.value else None
        return None if node is None or node.value is None else node

    def items(self) -> Iterator[tuple[str, "_Node"]]:
        if not isinstance(self.value, dict):
            raise self.complaint(f"`{self.where}` must be an object")
        return ((key, self[key]) for key in self.value)

    def elements(self) -> Iterator["_Node"]:
        if not isinstance(self.value, list):
            raise self.complaint(f"`{self.where}` must be a list")
        return (_Node(value, self.file, f"{self.where}[{index}]") for index, value in enumerate(self.value))

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.complaint(f"`{self.where}` must be text")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.complaint(f"`{self.where}` must be a number")
        return float(self.value)

    def whole(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self.complaint(f"`{self.where}` must be a whole number")
        return self.value

    def complaint(self, what: str) -> AuditError:
        return AuditError(f"{self.file} cannot be shown: {what}; run `sd-memguard audit` again into this folder")


def read_audit(output_dir: Path) -> Audit:
    """Return what the audit left in its folder.

    Args:
        output_dir: Holds report.json, pairs.parquet and background.parquet.

    Raises:
        AuditError: Where one of them is missing, broken or of another format.
    """
    root = _read_json(output_dir / "report.json")
    threshold = root["threshold"]
    summaries = {kind: root["background"].get(kind) for kind in ("train", "reference")}
    models = tuple(_read_model(node) for node in root["models"].elements())
    if not models:
        raise root.complaint("`models` must name at least one model")
    facts = {key: node.value for key in FACTS if (node := root.get(key))}
    for key, value in facts.items():
        if not isinstance(value, dict):
            raise root.complaint(f"`{key}` must be an object")
    return Audit(
        version=root["version"].text(),
        created=root["created"].text(),
        command=root["command"].text(),
        threshold=Threshold(
            threshold["similarity"].number(),
            threshold["l2_ratio"].number(),
            threshold["rule"].text(),
            threshold["source"].text(),
            distance.number() if (distance := threshold.get("distance")) else None,
        ),
        background={kind: _read_background(node) for kind, node in summaries.items() if node is not None},
        models=models,
        facts=facts,
        pairs=_read_table(output_dir / "pairs.parquet", PAIR_COLUMNS),
        background_rows=_read_table(output_dir / "background.parquet", BACKGROUND_COLUMNS),
    )


def _read_json(file: Path) -> _Node:
    try:
        root = _Node(json.loads(file.read_text(encoding="utf-8")), file)
    except FileNotFoundError:
        raise AuditError(
            f"{file.parent} must hold an audit, it has no {file.name}; run `sd-memguard audit` into it, or name another"
        ) from None
    except ValueError as error:
        raise _Node(None, file).complaint(f"it is not JSON ({error})") from None
    found = root["format"].text()
    if found != FORMAT:
        raise root.complaint(f"`format` must be {FORMAT}, got {found}")
    return root


def _read_model(node: _Node) -> Model:
    parts = {part: node.get(part) for part in MEASURES}
    measures = {f"{part}.{name}": _estimate(parts[part], name) for part, names in MEASURES.items() for name in names}
    reasons = {key: reason.text() for key, reason in _optional_items(node.get("why_missing"))}
    if quality := parts["quality"]:
        reasons |= {f"quality.{key}": reason.text() for key, reason in _optional_items(quality.get("why_missing"))}
    membership, run, sha256 = parts["membership"], node.get("run"), node.get("sha256")
    timesteps = membership.get("timesteps") if membership else None
    return Model(
        name=node["name"].text(),
        source=node["source"].text(),
        path=node["path"].text(),
        sha256=sha256.text() if sha256 else None,
        num_generated=node["num_generated"].whole(),
        run={key: value.value for key, value in run.items()} if run else None,
        copies={kind: _read_copies(copies) for kind, copies in node["copies"].items() if copies.value is not None},
        measures=measures,
        timesteps=tuple(step.number() for step in timesteps.elements()) if timesteps else (),
        why_missing=reasons,
    )


def _optional_items(node: _Node | None) -> Iterator[tuple[str, _Node]]:
    return node.items() if node else iter(())


def _read_copies(node: _Node) -> Copies:
    for limit, _ in _optional_items(node.get("mq_below")):
        if not limit.replace(".", "", 1).isdecimal():
            raise node.complaint(f"`{node.where}.mq_below` must be keyed by numbers, got {limit}")
    return Copies(
        count=node["count"].whole(),
        copies=node["copies"].whole(),
        share=_estimate(node, "share"),
        captions=node["captions"].whole() if node.get("captions") else 0,
        captions_copied=node["captions_copied"].whole() if node.get("captions_copied") else 0,
        extraction=_estimate(node, "extraction"),
        similarity_mean=_estimate(node, "similarity_mean"),
        similarity_p95=_estimate(node, "similarity_p95"),
        l2_copies=_estimate(node, "l2_copies"),
        mq_below={key: value.whole() for key, value in _optional_items(node.get("mq_below"))},
    )


def _read_background(node: _Node) -> Background:
    return Background(node["count"].whole(), *(node[name].number() for name in ("mean", "p95", "max", "share_above")))


def _estimate(parent: _Node | None, name: str) -> Estimate | None:
    """Return an estimate, or a bare number as one without an interval; None where it is unknown or not finite."""
    node = parent.get(name) if parent else None
    if node is None:
        return None
    if not isinstance(node.value, dict):
        return Estimate(node.number()) if math.isfinite(node.number()) else None
    value, low, high, n = (node.get(key) for key in ("value", "low", "high", "n"))
    if value is None or not math.isfinite(value.number()):
        return None
    return Estimate(
        value.number(), low.number() if low else None, high.number() if high else None, n.whole() if n else None
    )


def _read_table(file: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Return the columns of a parquet file in the types asked for."""
    complain = _Node(None, file).complaint
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise complain("it is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise complain(f"it is not a parquet file ({error})") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise complain(f"it lacks the columns {', '.join(missing)}")
    unknown = [name for name in columns if name in NEVER_NULL and table[name].null_count]
    if unknown:
        raise complain(f"it has rows without {', '.join(unknown)}")
    try:
        return table.select(list(columns)).cast(pa.schema(list(columns.items())))
    except (pa.ArrowException, ValueError) as error:
        raise complain(f"its columns have other types ({error})") from None

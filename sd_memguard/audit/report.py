"""What an audit leaves behind, declared once: report.json and two tables, written and read by the same types."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from sd_memguard.audit import AuditError
from sd_memguard.audit.metrics.statistics import Estimate, Summary

FORMAT: Literal["sd-memguard-audit-2"] = "sd-memguard-audit-2"
REPORT, PAIRS, BACKGROUND = "report.json", "pairs.parquet", "background.parquet"

Kind = Literal["duplicated", "unique", "given", "heldout"]
KINDS: tuple[Kind, ...] = ("duplicated", "unique", "given", "heldout")
"""Kinds of generated images, in the order they are told of: the most exposed captions first."""

ALL = "all"
"""The key of figures over the images of all training captions, or all given images."""

Measure = Literal["copies", "nearest", "attributes", "membership"]
MEASURES: tuple[Measure, ...] = ("copies", "nearest", "attributes", "membership")
"""What a verdict rests on, the strongest evidence first."""

Level = Literal["copies", "replicates", "trained", "none", "unknown"]
"""A verdict: verified copies, replicas, traces of training alone, nothing above the background, nothing measured."""

RUN_COLUMNS = {"shard": pa.int16(), "seen": pa.int32(), "moves": pa.int32(), "skip_ratio": pa.float32()}
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
        "is_own_nearest": pa.bool_(),
        "l2_ratio": pa.float32(),
        "mq_ratio": pa.float32(),
        "distance": pa.float32(),
        "num_matches": pa.int32(),
        "is_copy": pa.bool_(),
        "is_l2_copy": pa.bool_(),
        **RUN_COLUMNS,
    }
)
"""A row for each generated image."""

BACKGROUND_SCHEMA = pa.schema(
    {"kind": pa.string(), "similarity": pa.float32(), "file": pa.string(), "nearest_file": pa.string()}
)
"""A row for each training and held-out image."""


@dataclass(frozen=True)
class CopyFigures:
    """What was counted on the generated images of one kind.

    Attributes:
        count: Generated images.
        copies: Of them, copies of a training image.
        share: Of copies.
        captions: Number of prompts, 0 where they are not known.
        captions_copied: Of them, those with a copy of their own training image.
        extraction: Their share.
        own_nearest: Share of the images to which, by pixels, the prompt's own image is nearer than any (other) training
            image.
        similarity_mean: To the nearest training image.
        similarity_p95: Its 95th percentile.
        l2_copies: Share of copies by Carlini's rule.
        mq_below: Number of images whose ratio of squared distances is below a limit.
    """

    count: int
    copies: int
    share: Estimate
    captions: int
    captions_copied: int
    extraction: Estimate | None
    own_nearest: Estimate | None
    similarity_mean: Estimate
    similarity_p95: Estimate
    l2_copies: Estimate
    mq_below: dict[str, int]


@dataclass(frozen=True)
class AttributeShares:
    """What the attributes of the generated images of one kind tell; None where unknown."""

    caption_accuracy: Estimate | None
    open_agreement: Estimate | None
    chance_agreement: Estimate | None


@dataclass(frozen=True)
class Detection:
    """How well the text signal tells captions trained on from others."""

    auc: Estimate
    tpr_at_1_fpr: Estimate
    num_train: int
    num_reference: int


@dataclass(frozen=True)
class Membership:
    """How well the loss tells images trained on from others."""

    auc: Estimate
    tpr_at_1_fpr: Estimate
    train_loss: Estimate
    reference_loss: Estimate
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class AttackFigures:
    """What an attack gets of a model.

    Attributes:
        title: The attack in words.
        train: Mean score of the images trained on; for attacks that generate, the share of attacked images that came
            out: by pixels, of all probed images the attacked one is the nearest to what was generated.
        reference: The same of held-out images.
        train_before: The share before the attack, from the caption alone; None where that is not generated.
        reference_before: The same of held-out images.
        is_share: Whether these are shares.
        auc: How often an image trained on scores higher than a held-out one. Where images are generated, the score is
            the distance to the nearest other probed image minus that to the attacked one.
        tpr_at_1_fpr: Share of the images trained on above a threshold that at most 1% of the held-out ones are above.
        num_train: Images trained on that were attacked.
        num_reference: Held-out images.
        evaluations: Rows that the denoiser was given for each; one with a gradient counts three times.
    """

    title: str
    train: Estimate
    reference: Estimate
    train_before: Estimate | None
    reference_before: Estimate | None
    is_share: bool
    auc: Estimate
    tpr_at_1_fpr: Estimate
    num_train: int
    num_reference: int
    evaluations: int


@dataclass(frozen=True)
class QualityFigures:
    """Distances to real images, and the fit to captions; None where ``why_missing`` has the reason."""

    kid_train: Estimate | None
    kid_reference: Estimate | None
    fid_train: float | None
    fid_reference: float | None
    clip_score: Estimate | None
    why_missing: dict[str, str]


@dataclass(frozen=True)
class Evidence:
    """One thing that speaks for replication, or does not.

    Attributes:
        measure: What was measured.
        kind: Of which generated images; None: without generated images.
        value: The share; the AUC of membership.
        background: The same where nothing was replicated.
        control: What that was measured on, in words.
        excess: Of the value over the background.
        p_value: How often the background alone gives such an excess or a larger one.
        is_significant: Whether that is rare enough among all that was asked of the model (Holm).
    """

    measure: Measure
    kind: Kind | None
    value: Estimate
    background: Estimate
    control: str
    excess: Estimate
    p_value: float
    is_significant: bool


@dataclass(frozen=True)
class Verdict:
    """What the evidence on a model amounts to."""

    level: Level
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Comparison:
    """Whether two models differ, on the same prompts and noise.

    Attributes:
        models: Names; ``excess`` is that of the first over the second.
        measure: What was measured.
        kind: Of which generated images.
        excess: Mean difference over prompts.
        p_value: How often models that do not differ give such a difference or a larger one, in either direction.
        is_significant: Among all that was asked of the two (Holm).
    """

    models: tuple[str, str]
    measure: Measure
    kind: Kind
    excess: Estimate
    p_value: float
    is_significant: bool


@dataclass(frozen=True)
class ModelReport:
    """Everything found of one model, or folder of images; what is None has its reason in ``why_missing``."""

    name: str
    source: Literal["model", "images"]
    path: str
    sha256: str
    run: dict[str, Any] | None
    num_generated: int
    verdict: Verdict
    copies: dict[str, CopyFigures]
    attributes: dict[str, AttributeShares] | None
    detection: Detection | None
    membership: Membership | None
    attacks: dict[str, AttackFigures]
    quality: QualityFigures
    why_missing: dict[str, str]


@dataclass(frozen=True)
class Features:
    """Which network made the features, see ``Extractor``."""

    name: str
    sha256: str | None
    preprocessing: str
    dimensions: int


@dataclass(frozen=True)
class Classifier:
    """How well the attribute classifier reads real images.

    Attributes:
        accuracy: Of each attribute, on images kept back from its training; None: none were.
        caption_accuracy: On the held-out images with their captions, the most that generated images can reach; None
            without them.
    """

    accuracy: dict[str, float | None]
    caption_accuracy: float | None


@dataclass(frozen=True)
class Images:
    """A set of real images."""

    folder: str
    num_images: int
    num_distinct: int
    num_duplicated: int
    sha256: str


@dataclass(frozen=True)
class Threshold:
    """What counts as a copy, and how that was found.

    Attributes:
        similarity: From which on images are alike; that of a copy where nothing is verified.
        l2_ratio: Below which an image is a copy by Carlini's rule.
        distance: Of a copy after registration; None: by similarity alone.
        rule: Where it comes from, in words.
        source: ``flag`` or ``background``.
    """

    similarity: float
    l2_ratio: float
    distance: float | None
    rule: str
    source: str


@dataclass(frozen=True)
class Backgrounds:
    """How similar images are that nobody copied: training images among themselves, and held-out ones to them."""

    train: Summary
    reference: Summary | None


@dataclass(frozen=True)
class Report:
    """Everything in ``report.json``."""

    format: Literal["sd-memguard-audit-2"]
    version: str
    created: str
    command: str
    settings: dict[str, Any]
    extractor: Features
    quality_extractor: Features
    clip_sha256: str | None
    classifier: Classifier | None
    threshold: Threshold
    train: Images
    reference: Images | None
    background: Backgrounds
    models: tuple[ModelReport, ...]
    comparisons: tuple[Comparison, ...]

    def kinds(self) -> list[Kind]:
        """Return the kinds that any model has generated images of, the most exposed first."""
        return [kind for kind in KINDS if any(kind in model.copies for model in self.models)]


class Audit(NamedTuple):
    """A report with its tables, by ``PAIR_SCHEMA`` and ``BACKGROUND_SCHEMA``."""

    report: Report
    pairs: pa.Table
    background: pa.Table


_ADAPTER = TypeAdapter(Report)


def write_audit(audit: Audit, folder: Path) -> None:
    """Write report.json, numbers at six digits, pairs.parquet and background.parquet."""
    pq.write_table(audit.pairs.cast(PAIR_SCHEMA), folder / PAIRS)
    pq.write_table(audit.background.cast(BACKGROUND_SCHEMA), folder / BACKGROUND)
    text = json.dumps(_plain(audit.report), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_audit(folder: Path) -> Audit:
    """Return what ``write_audit`` has written.

    Raises:
        AuditError: A file is missing, broken or of another format.
    """
    file = folder / REPORT
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise AuditError(
            f"{folder} must hold an audit, it has no {REPORT}; run `sd-memguard audit` into it, or name another"
        ) from None
    try:
        report = _ADAPTER.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _unusable(file, f"`{place or 'the file'}`: {first['msg']}, got {str(first['input'])[:80]!r}") from None
    return Audit(report, _read_table(folder / PAIRS, PAIR_SCHEMA), _read_table(folder / BACKGROUND, BACKGROUND_SCHEMA))


def _read_table(file: Path, schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(file).select(schema.names).cast(schema)
    except FileNotFoundError:
        raise _unusable(file, "it is missing") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unusable(file, f"it is no table of an audit ({error})") from None


def _unusable(file: Path, fault: str) -> AuditError:
    return AuditError(f"{file} cannot be used: {fault}; run `sd-memguard audit` again into this folder")


def _plain(value: Any) -> Any:
    """Return dataclasses as mappings, and floats at six significant digits: beyond them rounding speaks."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

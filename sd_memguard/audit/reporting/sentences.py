"""The report's sentences and number formats, worded from the numbers alone and claiming no more than they carry."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sd_memguard.audit.metrics.statistics import CONFIDENCE, Estimate
from sd_memguard.audit.report import ALL, Comparison, CopyFigures, Evidence, ModelReport, Report

KIND_WORDS = {
    "duplicated": "duplicated prompts",
    "unique": "unique prompts",
    "given": "given images",
    "heldout": "held-out prompts",
}
MEASURE_WORDS = {
    "copies": "Verified copy of the prompt's own image",
    "nearest": "Own training image is the nearest",
    "attributes": "Traits shared beyond the prompt",
    "membership": "Loss tells training images (AUC)",
}
MOST_MODELS_IN_A_SENTENCE = 3

REPLICATING = ("copies", "replicates")

CLAUSES = {
    "copies": "{} returns its training images",
    "replicates": "{} replicates its training images",
    "trained": "{} shows no replication above the background, only traces of training",
    "none": "{} shows no replication above the background",
    "unknown": "of {} nothing was measured that would tell replication",
}

MEANINGS = {
    "copies": "Whoever has {} and the caption of a training image can get that image back. Giving the model away, or "
    "selling what it generates, may give away the images themselves.",
    "replicates": "From the caption of a training image, {} brings back what makes that image recognizable (this face, "
    "this composition), though not pixel by pixel. Of people, that can be the very person; of art, the very work.",
    "trained": "With these prompts {} does not bring training images back. But whoever already has an image can tell, "
    "better than by guessing, whether the model was trained on it.",
    "none": "With these prompts, images of {} are no nearer to its training images than those of a model that has "
    "learned the style alone. That is no proof: other prompts, seeds or attacks may still bring an image out.",
    "unknown": "This audit cannot say whether {} replicates: it needs held-out images, or generated images to compare.",
}

REMEDIES = {
    "replicating": (
        "Look at the pairs below: they name the training images that come back.",
        "Do not publish or share the model before you know that these images may be shown, by right and by consent.",
        "Remove those images, or train again: with duplicates removed (`sd-memguard check DIR` finds them), with the "
        "guard (`sd-memguard train`), and for fewer epochs. Then audit the new model with the same command.",
    ),
    "clean": (
        "Look at the nearest pairs below all the same; a person sees more than a measure.",
        "Before you publish the model, audit it once more with more prompts and images (`--num_prompts`, "
        "`--num_images_per_prompt`).",
        "Keep the held-out images out of any later training: without them an audit says less.",
    ),
}


class Told(NamedTuple):
    """The verdict in plain words: a headline, and what was found, how sure that is, what it means, what to do."""

    headline: str
    found: tuple[str, ...]
    sure: tuple[str, ...]
    means: tuple[str, ...]
    remedies: tuple[str, ...]


def percent(share: float) -> str:
    """Return a share as a percentage that says 0 or 100 only where that is exact.

    Halves are rounded up, which the page's script can do alike.

    >>> [percent(share) for share in (0, 1 / 3000, 1 / 64, 0.765625, 0.996, 1)]
    ['0%', 'under 0.1%', '2%', '77%', '99.6%', '100%']
    """
    if share in (0, 1):
        return f"{share:.0%}"
    if not 0.001 <= share <= 0.999:
        return "under 0.1%" if share < 0.001 else "over 99.9%"
    if 0.01 <= share <= 0.99:
        return f"{math.floor(share * 100 + 0.5)}%"
    tenths = math.floor(share * 1000 + 0.5)
    return f"{tenths // 10}.{tenths % 10}%"


def share_interval(estimate: Estimate, num_units: int) -> tuple[float, float]:
    """Return the 95% interval of a share.

    That is the audit's own. Where it has no width, since none or all were counted, a bootstrap knows no better; then
    the open end is the exact binomial bound: with none in n, ``1 - 0.05^(1/n)`` (the "rule of three", about 3/n).

    Args:
        estimate: The audit's, in 0..1.
        num_units: n, see the function of this name: generated images of one caption are no independent trials.
    """
    share, low, high = estimate.value, estimate.low, estimate.high
    if low == high:
        reach = 1 - (1 - CONFIDENCE) ** (1 / max(num_units, 1))
        low = 1 - reach if share == 1 else low
        high = reach if share == 0 else high
    return low, high


def num_units(kind: str, copies: CopyFigures) -> int:
    """Return how many independent units a share was counted over: captions, or images where no caption is known."""
    return copies.count if kind == "given" or not copies.captions else copies.captions


def interval_words(estimate: Estimate, digits: int | None = None) -> str:
    """Return the interval in words; as percentages without ``digits``."""
    low, high = ((percent(end) if digits is None else f"{end:.{digits}f}") for end in (estimate.low, estimate.high))
    return f"{low} to {high}"


def share_words(estimate: Estimate) -> str:
    """Return a share and its interval: ``56% (43% to 69%)``."""
    low, high = share_interval(estimate, estimate.n)
    return f"{percent(estimate.value)} ({percent(low)} to {percent(high)})"


def p_words(p_value: float) -> str:
    """Return a p-value to read.

    >>> p_words(0.0002), p_words(0.0312)
    ('p < 0.001', 'p = 0.031')
    """
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points."""
    return f"{100 * difference:.0f}"


def generated_by(kind: str, count: int | None = None) -> str:
    """Return what a kind counts: ``images of duplicated prompts``, or ``given images``."""
    words = KIND_WORDS.get(kind, kind) if kind in ("given", ALL) else f"images of {KIND_WORDS[kind]}"
    return words if count is None else f"{count:,} {words}"


def tell(report: Report) -> Told:
    """Return the verdict on the audited models."""
    models = report.models
    found = [line for model in models for line in _found(model, alone=len(models) == 1)]
    found += [_difference(one) for one in report.comparisons if one.is_significant and len(models) <= 2]
    levels = list(dict.fromkeys(model.verdict.level for model in models))
    means = [MEANINGS[level].format(_listed([m.name for m in models if m.verdict.level == level])) for level in levels]
    replicating = any(level in REPLICATING for level in levels)
    return Told(
        _headline(report),
        tuple(found),
        tuple(_sure(report)),
        tuple(means),
        REMEDIES["replicating" if replicating else "clean"],
    )


def _headline(report: Report) -> str:
    models = report.models
    if len(models) > MOST_MODELS_IN_A_SENTENCE:
        named = [model.name for model in models if model.verdict.level in REPLICATING]
        if not named:
            return f"None of the {len(models)} models shows replication above the background."
        return f"{len(named)} of {len(models)} models replicate their training images: {_listed(named)}."
    clauses = [CLAUSES[model.verdict.level].format(model.name) for model in models]
    if len(models) == 2 and all(model.verdict.level in REPLICATING for model in models):
        weaker = _weaker(report.comparisons)
        if weaker is not None:
            stronger = next(model for model in models if model.name != weaker)
            clauses = [CLAUSES[stronger.verdict.level].format(stronger.name), f"{weaker} replicates fewer of them"]
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper() if sentence.startswith('of ') else sentence[0]}{sentence[1:]}."


def _weaker(comparisons: Sequence[Comparison]) -> str | None:
    """Return which of two models replicates less by the strongest measure that tells them apart."""
    for one in comparisons:
        if one.is_significant:
            return one.models[1] if one.excess.value > 0 else one.models[0]
    return None


def _found(model: ModelReport, *, alone: bool) -> list[str]:
    """Return what speaks for replication; without that, the strongest measure beside its background."""
    evidence = model.verdict.evidence
    shown = [one for one in evidence if one.is_significant]
    lines = [f"{model.name}: {_evidence(one)} ({p_words(one.p_value)})." for one in shown]
    if not shown and evidence:
        nearest = next((one for one in evidence if one.measure != "copies"), evidence[0])
        lines.append(f"{model.name}: {_evidence(nearest)}; no more than chance allows ({p_words(nearest.p_value)}).")
    if not any(one.measure == "copies" for one in shown) and ALL in model.copies and (alone or shown):
        copies = model.copies[ALL]
        verified = "No image was" if not copies.copies else f"{copies.copies} of {copies.count} images were"
        more = ", no more than look-alikes make" if copies.copies else ""
        lines.append(f"{model.name}: {verified} verified as a copy of a training image{more}.")
    return lines


def _evidence(one: Evidence) -> str:
    value, background = share_words(one.value), percent(max(one.background.value, 0))
    if one.measure == "copies" and one.kind == "given":
        return f"{value} of the given images are copies of training images; of {one.control}, {background} would be"
    if one.measure == "copies":
        return (
            f"{value} of the {KIND_WORDS[one.kind or 'given']} gave a copy of their own training image; "
            f"of {one.control}, {background} would be copies"
        )
    if one.measure == "nearest":
        return (
            f"{value} of its images of {KIND_WORDS[one.kind or 'given']} are nearest to the prompt's own training "
            f"image; the background, {one.control}, is {background}"
        )
    if one.measure == "attributes":
        return (
            f"of the traits that {KIND_WORDS[one.kind or 'given']} leave open, {value} are as in the training image; "
            f"the background, {one.control}, is {background}"
        )
    low, high = one.value.low, one.value.high
    return (
        "its loss tells training images from held-out ones, with an AUC of "
        f"{one.value.value:.2f} ({low:.2f} to {high:.2f}), where 0.5 is guessing"
    )


def _difference(one: Comparison) -> str:
    first, second = one.models if one.excess.value > 0 else one.models[::-1]
    excess = one.excess
    low, high = sorted((abs(excess.low), abs(excess.high)))
    return (
        f"From the same {KIND_WORDS[one.kind]} and noise, {first} is above {second} by {points(abs(excess.value))} "
        f"percentage points ({points(low)} to {points(high)}; {p_words(one.p_value)}): "
        f"{MEASURE_WORDS[one.measure].lower()}."
    )


def _sure(report: Report) -> list[str]:
    lines = []
    if any(model.verdict.evidence for model in report.models):
        lines.append(
            "Every measure is set against its background. A model that replicates nothing is called a replicating one "
            "in at most 5 of 100 audits, all its measures together."
        )
    for model in report.models:
        if model.verdict.level in REPLICATING:
            continue
        tested = [one for one in model.verdict.evidence if one.measure == "nearest"]
        if tested:
            one = tested[0]
            lines.append(
                f"{model.name}: not excluded is that up to {percent(min(max(one.excess.high, 0), 1))} of its images of "
                f"{KIND_WORDS[one.kind or 'given']} replicate (upper end of the {CONFIDENCE:.0%} interval, "
                f"{one.value.n} prompts)."
            )
    if any("heldout" in model.why_missing and model.source == "model" for model in report.models):
        lines.append(
            "No images of held-out prompts were generated (give `--reference_data_dir` with captions): replication "
            "is told less surely without them."
        )
    lines.append("Intervals tell how far other prompts would move a figure, not another training run.")
    return lines


def background_share(report: Report) -> float:
    """Return the share of images nobody copied that would count as copies; of held-out ones, if known."""
    return (report.background.reference or report.background.train).share_above


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

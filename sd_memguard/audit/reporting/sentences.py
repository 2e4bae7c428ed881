"""The report's sentences and number formats, worded from the numbers alone and claiming no more than they carry."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sd_memguard.audit.reporting.read import KINDS, Audit, Copies, Estimate, Model

CONFIDENCE = 0.95
KIND_WORDS = {"duplicated": "duplicated prompts", "unique": "unique prompts", "given": "given images"}
MOST_MODELS_IN_A_SENTENCE = 3


class Verdict(NamedTuple):
    """The verdict in one sentence, and the sentences that put it into scale, for the lines below it."""

    sentence: str
    scale: tuple[str, ...]


class _Clause(NamedTuple):
    """What the sentence says of one model: its most exposed kind of generated."""

    name: str
    kind: str
    copies: Copies
    share: float
    low: float
    high: float


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


def share_interval(share: float, estimate: Estimate | None, num_units: int) -> tuple[float, float]:
    """Return the 95% interval of a share.

    That is the audit's own. Where it has no width, since none or all were counted, a bootstrap knows no better; then
    the open end is the exact binomial bound: with none in n, ``1 - 0.05^(1/n)`` (the "rule of three", about 3/n).

    Args:
        share: In 0..1.
        estimate: The audit's, with or without an interval.
        num_units: n, see the function of this name: generated images of one caption are no independent trials.
    """
    low = estimate.low if estimate and estimate.low is not None else share
    high = estimate.high if estimate and estimate.high is not None else share
    if low == high:
        reach = 1 - (1 - CONFIDENCE) ** (1 / max(num_units, 1))
        low = 1 - reach if share == 1 else low
        high = reach if share == 0 else high
    return low, high


def num_units(kind: str, copies: Copies) -> int:
    """Return how many independent units a share was counted over: captions, or images where no caption is known."""
    return copies.count if kind == "given" or not copies.captions else copies.captions


def interval_words(estimate: Estimate, digits: int | None = None) -> str:
    """Return the interval in words, empty where there is none; as percentages without ``digits``."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = ((percent(end) if digits is None else f"{end:.{digits}f}") for end in (estimate.low, estimate.high))
    return f"{low} to {high}"


def generated_by(kind: str, count: int | None = None) -> str:
    """Return what a kind counts: ``generated images of duplicated prompts``, or ``given images``."""
    words = KIND_WORDS[kind] if kind == "given" else f"generated images of {KIND_WORDS[kind]}"
    return words if count is None else f"{count:,} {words}"


def verdict(audit: Audit) -> Verdict:
    """Return the verdict on the audited models, of each by its most exposed kind of generated."""
    clauses = [clause for model in audit.models if (clause := _clause(model))]
    if not clauses:
        return Verdict("Nothing was generated, so nothing can be said about copies.", ())
    if len(clauses) == 1:
        sentence = _one(clauses[0])
    elif len(clauses) <= MOST_MODELS_IN_A_SENTENCE:
        parts = [_first(clauses[0])]
        parts += [_next(clause, same_kind=clause.kind == clauses[0].kind) for clause in clauses[1:]]
        sentence = "; ".join(parts) + "."
    else:
        sentence = _range(clauses)
    scale = [_background(audit), *_other_kinds(audit, clauses), *_doubts(audit, clauses), _caution(clauses)]
    return Verdict(sentence, tuple(line for line in scale if line))


def _clause(model: Model) -> _Clause | None:
    kind = next((kind for kind in KINDS if kind in model.copies and model.copies[kind].count), None)
    return _make_clause(model, kind) if kind else None


def _make_clause(model: Model, kind: str) -> _Clause:
    copies = model.copies[kind]
    share = copies.copies / copies.count
    interval = share_interval(share, copies.share, num_units(kind, copies))
    return _Clause(model.name, kind, copies, share, *interval)


def _one(clause: _Clause) -> str:
    low, high = percent(clause.low), percent(clause.high)
    if not clause.copies.copies:
        return (
            f"No copy was found among the {generated_by(clause.kind, clause.copies.count)} of {clause.name} "
            f"(at {CONFIDENCE:.0%} confidence, at most {high} are copies)."
        )
    return f"{_first(clause, f'; {CONFIDENCE:.0%} interval {low} to {high}')}."


def _first(clause: _Clause, more: str = "") -> str:
    copies, count = clause.copies.copies, clause.copies.count
    if not copies:
        return f"{clause.name} copies in none of its {generated_by(clause.kind, count)}{_at_most(clause)}"
    generated = generated_by(clause.kind)
    return f"{clause.name} copies in {percent(clause.share)} of its {generated} ({copies} of {count}{more})"


def _next(clause: _Clause, same_kind: bool) -> str:
    if not same_kind:
        return _first(clause)
    copies, count = clause.copies.copies, clause.copies.count
    if not copies:
        return f"{clause.name} in none of {count}{_at_most(clause)}"
    return f"{clause.name} in {percent(clause.share)} ({copies} of {count})"


def _at_most(clause: _Clause) -> str:
    return f" (at most {percent(clause.high)} at {CONFIDENCE:.0%} confidence)"


def _range(clauses: Sequence[_Clause]) -> str:
    kinds = {clause.kind for clause in clauses}
    least, most = min(clauses, key=lambda clause: clause.share), max(clauses, key=lambda clause: clause.share)
    what = generated_by(kinds.pop()) if len(kinds) == 1 else "images"
    if least.share == most.share:
        return f"All {len(clauses)} models copy in {percent(most.share)} of their {what}."
    return (
        f"{len(clauses)} models copy in between {percent(least.share)} ({least.name}) "
        f"and {percent(most.share)} ({most.name}) of their {what}."
    )


def background_share(audit: Audit) -> float | None:
    """Return the share of images nobody copied that would count as copies; of those not trained on, if known."""
    found = audit.background.get("reference") or audit.background.get("train")
    return found.share_above if found else None


def _background(audit: Audit) -> str:
    reference, train = audit.background.get("reference"), audit.background.get("train")
    parts = []
    if reference:
        parts.append(
            f"of {reference.count:,} images that were not trained on, {percent(reference.share_above)} "
            "are as similar to a training image"
        )
    if train:
        parts.append(
            f"of the {train.count:,} distinct training images, {percent(train.share_above)} "
            "are as similar to another one"
        )
    return f"For scale: {', and '.join(parts)}." if parts else "No background was measured to set this against."


def _other_kinds(audit: Audit, clauses: Sequence[_Clause]) -> list[str]:
    """Return a sentence per kind that the verdict does not name, where few enough models are compared."""
    told = {clause.kind for clause in clauses}
    lines = []
    for kind in audit.kinds() if len(audit.models) <= MOST_MODELS_IN_A_SENTENCE else []:
        models = [model for model in audit.models if kind in model.copies and model.copies[kind].count]
        if kind in told or not models:
            continue
        first, *others = (_make_clause(model, kind) for model in models)
        lines.append("; ".join([_first(first), *(_next(other, same_kind=True) for other in others)]) + ".")
    return lines


def _doubts(audit: Audit, clauses: Sequence[_Clause]) -> list[str]:
    """Return what the intervals do not allow to say: that a model copies at all, that two models differ."""
    lines = []
    background = background_share(audit)
    if background is not None:
        alike = [clause.name for clause in clauses if clause.copies.copies and clause.low <= background]
        if alike:
            lines.append(
                f"The copies of {_listed(alike)} are not clearly more than near-duplicates make in that background."
            )
    if 2 <= len(clauses) <= MOST_MODELS_IN_A_SENTENCE:
        first, *others = clauses
        unclear = [
            other.name
            for other in others
            if other.kind == first.kind and first.low <= other.high and other.low <= first.high
        ]
        if unclear:
            lines.append(
                f"The intervals of {first.name} and {_listed(unclear)} overlap: "
                "by these generated images alone they are not told apart."
            )
    return lines


def _caution(clauses: Sequence[_Clause]) -> str:
    if all(clause.copies.copies for clause in clauses):
        return "A copy is what this threshold and these features call one; look at the pairs."
    return "No copy found does not mean that there is none: other captions, seeds or settings may bring one out."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

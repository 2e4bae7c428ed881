"""The verdict on each model, and whether two of them differ, from everything that was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from sd_memguard.audit.metrics.evidence import Excess, above_controls, above_paired, above_rate, significant
from sd_memguard.audit.metrics.statistics import Estimate, bootstrap, mean
from sd_memguard.audit.report import KINDS, MEASURES, Comparison, Evidence, Kind, Level, Measure, Verdict
from sd_memguard.core.seeding import generator_for

HELDOUT_PROMPTS, HELDOUT_IMAGES = "images of held-out prompts", "held-out images"
TRAINING_IMAGES, UNIQUE_PROMPTS = "training images, beside the others", "images of unique prompts"
CHANCE, GUESSING = "chance, by held-out images", "guessing"


class CopyBackground(NamedTuple):
    """How many of a background's images would be copies, of how many, and what they are."""

    hits: int
    total: int
    control: str


class Measured(NamedTuple):
    """What the verdict on a model rests on.

    Attributes:
        name: Of the model.
        per_prompt: Images of each prompt.
        copied: Of each kind, whether any image of a prompt is a copy (of the prompt's own image, where that is known),
            (C,) bool.
        nearest: Of each kind, the share of a prompt's images that are nearest to its own image, (C,).
        agreement: Of each kind, the agreement of a prompt's images with its own image beyond the prompt, (C,).
        chance: The same of held-out images that share most of the caption, (C,).
        membership: Of the training images' losses over held-out ones, None where unknown.
    """

    name: str
    per_prompt: int
    copied: Mapping[Kind, Tensor]
    nearest: Mapping[Kind, Tensor]
    agreement: Mapping[Kind, Tensor]
    chance: Mapping[Kind, Tensor]
    membership: Excess | None


class _Tested(NamedTuple):
    measure: Measure
    kind: Kind | None
    control: str
    found: Excess


def judge(model: Measured, copies: CopyBackground, seed: int) -> Verdict:
    """Return the verdict: the level is that of the strongest evidence that is significant."""
    tested = [*_copies(model, copies, seed), *_nearest(model, seed), *_attributes(model, seed)]
    if model.membership is not None:
        tested.append(_Tested("membership", None, GUESSING, model.membership))
    flags = significant([one.found.p_value for one in tested])
    evidence = tuple(
        Evidence(
            one.measure,
            one.kind,
            one.found.value,
            one.found.background,
            one.control,
            one.found.excess,
            one.found.p_value,
            flag,
        )
        for one, flag in zip(tested, flags, strict=True)
    )
    return Verdict(_level(evidence), evidence)


def _level(evidence: Sequence[Evidence]) -> Level:
    levels: dict[Measure, Level] = {
        "copies": "copies",
        "nearest": "replicates",
        "attributes": "replicates",
        "membership": "trained",
    }
    shown = {one.measure for one in evidence if one.is_significant}
    strongest = next((measure for measure in MEASURES if measure in shown), None)
    if strongest is not None:
        return levels[strongest]
    return "none" if evidence else "unknown"


def _copies(model: Measured, copies: CopyBackground, seed: int) -> Iterator[_Tested]:
    for kind, hits in model.copied.items():
        if kind != "heldout":
            found = above_rate(hits, copies.hits, copies.total, model.per_prompt, seed, f"copies {kind}")
            yield _Tested("copies", kind, copies.control, found)


def _nearest(model: Measured, seed: int) -> Iterator[_Tested]:
    for kind, values in model.nearest.items():
        controls, control = model.nearest.get("heldout"), HELDOUT_PROMPTS
        if controls is None and kind == "duplicated":
            controls, control = model.nearest.get("unique"), UNIQUE_PROMPTS
        if kind != "heldout" and controls is not None and len(values):
            yield _Tested("nearest", kind, control, above_controls(values, controls, seed, f"nearest {kind}"))


def _attributes(model: Measured, seed: int) -> Iterator[_Tested]:
    """Yield agreement over chance, less what images of held-out prompts have over chance, where there are such."""
    for kind, values in model.agreement.items():
        if kind == "heldout" or not len(values):
            continue
        chance, what = model.chance[kind], f"attributes {kind}"
        if "heldout" not in model.agreement or not len(model.agreement["heldout"]):
            yield _Tested("attributes", kind, CHANCE, above_paired(values, chance, seed, what))
            continue
        controls = model.agreement["heldout"] - model.chance["heldout"]
        found = above_controls(values - chance, controls, seed, what)
        value = bootstrap(values[:, None], mean, generator_for(seed, f"evidence {what} value"))
        excess = found.excess
        background = Estimate(
            value.value - excess.value, value.value - excess.high, value.value - excess.low, len(controls)
        )
        yield _Tested("attributes", kind, HELDOUT_PROMPTS, found._replace(value=value, background=background))


def compare_models(models: Sequence[Measured], seed: int) -> tuple[Comparison, ...]:
    """Return how every two models differ that generated the same prompts, by their most exposed kind of prompts."""
    return tuple(
        comparison
        for index, first in enumerate(models)
        for second in models[index + 1 :]
        for comparison in _compare(first, second, seed)
    )


def _compare(first: Measured, second: Measured, seed: int) -> list[Comparison]:
    found: list[tuple[Measure, Kind, Excess]] = []
    pairs: list[tuple[Measure, Mapping[Kind, Tensor], Mapping[Kind, Tensor]]] = [
        ("copies", first.copied, second.copied),
        ("nearest", first.nearest, second.nearest),
        ("attributes", first.agreement, second.agreement),
    ]
    for measure, one, other in pairs:
        for kind in KINDS[:2]:
            if kind in one and kind in other and len(one[kind]) == len(other[kind]) > 0:
                pair = (one[kind].double(), other[kind].double())
                what = f"{measure} {kind} of two"
                found.append((measure, kind, above_paired(*pair, seed, what, two_sided=True)))
                break
    flags = significant([excess.p_value for *_, excess in found])
    return [
        Comparison((first.name, second.name), measure, kind, excess.excess, excess.p_value, flag)
        for (measure, kind, excess), flag in zip(found, flags, strict=True)
    ]

"""Copies at equal quality: every arm beside the point of plain training that is as good.

Plain training passes every quality on its way from the untouched model, with few copies early and many late: stopping
it early is the simplest guard of all. So an arm is set beside the first place where plain training's loss on unseen
images (or its KID) has come down to the arm's own, found by linear interpolation between the points judged. An arm
better than every point of plain training is set beside plain training's best point, marked by an asterisk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Cell = dict[str, Any]
NUM_RESAMPLES = 2000


class Place(NamedTuple):
    """A place along a training: a share ``between`` of the way from one point to the next; whether it is as good."""

    point: int
    between: float
    reached: bool


class Fall(NamedTuple):
    """By how much an arm copies less than plain training of the same quality: 1 is no copies, 0 as many, all shares.

    Attributes:
        value: over the generated images of all seeds.
        low: 2.5th percentile of resampled captions.
        high: 97.5th.
        by_seed: of each seed by itself.
        share: of copies of plain training at that place.
        reached: whether plain training gets there in every seed.
    """

    value: float
    low: float
    high: float
    by_seed: list[float]
    share: float
    reached: bool


def find_place(values: Sequence[float], wanted: float) -> Place:
    """Return the first place along a training whose value has come down to the wanted one, else that of the lowest.

    >>> find_place([5.0, 3.0, 1.0, 2.0], 2.0)
    Place(point=1, between=0.5, reached=True)
    >>> find_place([5.0, 3.0, 4.0], 2.0)
    Place(point=1, between=0.0, reached=False)
    """
    for point, value in enumerate(values):
        if value <= wanted:
            if point == 0:
                return Place(0, 0.0, reached=True)
            before = values[point - 1]
            return Place(point - 1, (before - wanted) / (before - value), reached=True)
    return Place(min(range(len(values)), key=values.__getitem__), 0.0, reached=False)


def quality(cell: Cell, measure: str) -> float:
    """Return a cell's loss on held-out images ("loss") or a KID by its name; the lower, the better."""
    return float((cell["losses"]["heldout"] if measure == "loss" else cell[measure])["mean"])


def shares_by_caption(cell: Cell, kind: str) -> Tensor:
    """Return the share of copies among the generated images of each caption, (captions,) float64."""
    one = cell["copies"][kind]
    return torch.tensor([int(digit) for digit in one["copies_by_caption"]]).double() / (
        one["generated"] / one["captions"]
    )


def shares_at(curve: Sequence[Cell], place: Place, kind: str) -> Tensor:
    """Return the shares of copies by caption at a place along a training, (captions,) float64."""
    here = shares_by_caption(curve[place.point], kind)
    if place.between == 0:
        return here
    return torch.lerp(here, shares_by_caption(curve[place.point + 1], kind), place.between)


def fall(arm: Sequence[Cell], plain: Sequence[Sequence[Cell]], measure: str, kind: str = "repeated") -> Fall | None:
    """Compare an arm with plain training at equal quality.

    Args:
        arm: a cell for each seed.
        plain: for each of those seeds the cells along plain training, in order, the untouched model first.
        measure: "loss", "kid" or "kid_latents".
        kind: of captions.

    Returns:
        None where plain training does not copy at that place.
    """
    places = [
        find_place([quality(cell, measure) for cell in curve], quality(cell, measure))
        for cell, curve in zip(arm, plain, strict=True)
    ]
    ours = torch.stack([shares_by_caption(cell, kind) for cell in arm])
    theirs = torch.stack([shares_at(curve, place, kind) for curve, place in zip(plain, places, strict=True)])
    if float(theirs.mean()) == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(ours.shape[1], (NUM_RESAMPLES, ours.shape[1]), generator=generator)
    # The captions are the same on both sides: what is resampled are pairs.
    resampled = 1 - ours.mean(0)[chosen].mean(1) / theirs.mean(0)[chosen].mean(1)
    low, high = resampled.nan_to_num(0.0).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Fall(
        float(1 - ours.mean() / theirs.mean()),
        low,
        high,
        [float(1 - our.mean() / their.mean()) for our, their in zip(ours, theirs, strict=True) if their.any()],
        float(theirs.mean()),
        all(place.reached for place in places),
    )

"""The report's histograms, and the similarities that its script counts on."""

import base64
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from sd_memguard.audit.report import Audit, Kind
from sd_memguard.audit.reporting.sentences import KIND_WORDS, percent

NUM_BINS = 50
PLOT_HEIGHT = 100
LEAST_BAR = 1.5
"""Height of the lowest bar, of 100: a bin that holds anything is seen."""


class Panel(NamedTuple):
    """A model's histogram: bars as (kind, x, y, width, height), and the counts beside it."""

    name: str
    bars: tuple[tuple[str, float, float, float, float], ...]
    counts: tuple[tuple[str, str, int, int, str], ...]


class Histograms(NamedTuple):
    """All histograms on one scale, the outlines of the background, and where the threshold stands, in percent."""

    panels: tuple[Panel, ...]
    outlines: Mapping[str, str]
    low: float
    high: float
    line: float
    ticks: tuple[tuple[float, str], ...]


def histograms(audit: Audit) -> Histograms:
    """Return a histogram of similarities per model, all on one scale, in shares of each model's images."""
    groups = similarities(audit)
    background = background_similarities(audit)
    threshold = audit.report.threshold.similarity
    everything = np.concatenate([*groups.values(), *background.values(), np.array([threshold, 1.0])])
    low = float(np.floor(everything.min() * 20) / 20)
    high = float(np.ceil(np.round(everything.max(), 4) * 20) / 20)
    low = min(low, high - 0.05)
    edges = np.linspace(low, high, NUM_BINS + 1)
    shares: dict[tuple[int, Kind], np.ndarray] = {}
    for (index, kind), values in groups.items():
        total = sum(len(others) for (other, _), others in groups.items() if other == index)
        shares[index, kind] = _binned(values, edges) / max(total, 1)
    outlines = {kind: _binned(values, edges) / max(len(values), 1) for kind, values in background.items()}
    stacks = [
        sum(share for (other, _), share in shares.items() if other == index)
        for index in range(len(audit.report.models))
    ]
    tallest = max(float(np.max(heights)) for heights in [*stacks, *outlines.values(), np.array([1e-9])])
    panels = tuple(
        Panel(
            model.name,
            tuple(
                _bars({kind: shares[index, kind] / tallest for kind in audit.report.kinds() if (index, kind) in shares})
            ),
            tuple(
                (kind, KIND_WORDS[kind], copies.copies, copies.count, percent(copies.copies / max(copies.count, 1)))
                for kind in audit.report.kinds()
                if (copies := model.copies.get(kind))
            ),
        )
        for index, model in enumerate(audit.report.models)
    )
    step = 0.1 if high - low <= 1.2 else 0.5
    ticks = [round(tick * step, 1) for tick in range(round(np.ceil(low / step - 1e-6)), int(high / step + 1e-6) + 1)]
    return Histograms(
        panels,
        {kind: _outline(heights / tallest) for kind, heights in outlines.items()},
        low,
        high,
        _position(threshold, low, high),
        tuple((_position(tick, low, high), f"{tick:.1f}") for tick in ticks),
    )


def similarities(audit: Audit) -> dict[tuple[int, Kind], np.ndarray]:
    """Return the similarities of each model (by index) and kind, ascending float32, in the order of both."""
    found = {}
    for index, model in enumerate(audit.report.models):
        for kind in audit.report.kinds():
            mask = pc.and_(pc.equal(audit.pairs["model"], model.name), pc.equal(audit.pairs["kind"], kind))
            values = audit.pairs.filter(mask)["similarity"]
            if len(values):
                found[index, kind] = _ascending(values)
    return found


def background_similarities(audit: Audit) -> dict[str, np.ndarray]:
    """Return the background's similarities by kind, ascending float32."""
    rows = audit.background
    kinds = ("reference", "train") if audit.report.background.reference else ("train",)
    return {kind: _ascending(rows.filter(pc.equal(rows["kind"], kind))["similarity"]) for kind in kinds}


def _ascending(column: Any) -> np.ndarray:
    values = np.asarray(column.drop_null().to_numpy(), dtype=np.float32)
    return np.sort(values[np.isfinite(values)])


def packed(values: np.ndarray) -> str:
    """Return float32 values as base64 of their bytes, little-endian, so that the page has them exactly."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _binned(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _bars(heights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float, float, float, float]]:
    """Return stacked bars in a plot NUM_BINS wide and PLOT_HEIGHT high, y downwards."""
    top = np.full(NUM_BINS, float(PLOT_HEIGHT))
    for kind, values in heights.items():
        tall = np.where(values > 0, np.maximum(values * PLOT_HEIGHT, LEAST_BAR), 0)
        top = top - tall
        for index in np.flatnonzero(tall):
            yield kind, rounded(index + 0.06), rounded(top[index]), 0.88, rounded(tall[index])


def _outline(heights: np.ndarray) -> str:
    """Return the path of a stepped outline in the same plot."""
    levels = [rounded(PLOT_HEIGHT * (1 - height)) for height in heights]
    return (
        f"M0 {PLOT_HEIGHT}" + "".join(f"V{level}H{index + 1}" for index, level in enumerate(levels)) + f"V{PLOT_HEIGHT}"
    )


def _position(value: float, low: float, high: float) -> float:
    return rounded(min(max((value - low) / (high - low), 0), 1) * 100)


def rounded(value: float) -> float | int:
    """Return a coordinate with as many digits as the eye needs."""
    short = round(float(value), 2)
    return int(short) if short == int(short) else short

"""The essentials made again, beside the published cells."""

from collections.abc import Iterable, Sequence

import torch

from benchmarks.memorization.compare import Cell, quality, shares_by_caption
from benchmarks.memorization.table import Points, last_points, share, title

QUICK_ARMS = ("plain", "plain_distinct", "paper", "shard", "agc", "agc_balance_affine")
SMALLEST_MARGIN = 0.0005
"""Of a loss: where the seeds published agree by chance, another machine's rounding still moves it by about this."""


def report(made: Points, published: Points) -> Iterable[str]:
    """Yield a line for each arm made: whether its copies of repeated captions and its loss are as published.

    A share is inside where it lies within the 95 % interval over captions, widened to the shares of each seed; a loss
    where it is within two standard deviations over the published seeds, or 0.0005, of their mean.
    """
    for (arm, step), cells in last_points(made).items():
        theirs = published.get((arm, step))
        if theirs is None:
            yield f"{title(arm)}, {step} steps: nothing is published to compare with"
            continue
        value = share([cell["copies"]["repeated"] for cell in cells])[0]
        loss = sum(quality(cell, "loss") for cell in cells) / len(cells)
        yield f"{title(arm)}, {step} steps: " + "; ".join(
            (
                _verdict("copies of repeated captions", value, share_interval(theirs), "{:.0%}"),
                _verdict("loss on held-out images", loss, loss_interval(theirs), "{:.4f}"),
            )
        )


def share_interval(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return between what the share of copies of repeated captions is expected, from the cells of several seeds."""
    _, low, high = share([cell["copies"]["repeated"] for cell in cells])
    by_seed = [float(shares_by_caption(cell, "repeated").mean()) for cell in cells]
    return min(low, *by_seed), max(high, *by_seed)


def loss_interval(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return between what the loss on held-out images is expected, from the cells of several seeds."""
    losses = torch.tensor([quality(cell, "loss") for cell in cells], dtype=torch.float64)
    margin = max(SMALLEST_MARGIN, 2 * float(losses.std()) if len(losses) > 1 else 0.0)
    return float(losses.mean()) - margin, float(losses.mean()) + margin


def _verdict(what: str, value: float, interval: tuple[float, float], style: str) -> str:
    low, high = interval
    word = "inside" if low <= value <= high else "OUTSIDE"
    return f"{what} {style.format(value)}, {word} {style.format(low)} to {style.format(high)}"

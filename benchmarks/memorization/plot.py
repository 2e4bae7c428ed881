"""The plot of the cells: copies against quality, a line along each training."""

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.memorization.compare import quality
from benchmarks.memorization.table import Points, is_judged, share, title

SHOWN = (
    "plain",
    "plain_distinct",
    "plain_distinct_moved",
    "iet",
    "iet_agc",
    "paper",
    "agc",
    "agc_balance",
    "agc_balance_affine",
)
"""Arms of full weights; more would hide each other."""


class Panel(NamedTuple):
    """Copies of which captions are drawn against which measure, and the words below."""

    kind: str
    measure: str
    words: str


LOSS, KID = (
    "denoising loss on held-out images",
    "distance of the generated images of single captions to held-out images (KID)",
)
PANELS = (Panel("repeated", "loss", LOSS), Panel("single", "loss", LOSS), Panel("repeated", "kid", KID))


def plot(points: Points, file: Path) -> None:
    """Draw the shares of copies of repeated and of single captions against the loss on held-out images, and the KID."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(19, 6), layout="constrained")
    for axis, panel in zip(axes, PANELS, strict=True):
        for number, arm in enumerate(SHOWN):
            draw_arm(axis, points, arm, panel, f"C{number}")
        axis.set_xlabel(panel.words)
        axis.set_ylabel(f"near copies, % of the generated images of {panel.kind} captions")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("lower and further left is better", loc="left")
    axes[-1].set_title("large: the end, mean of the seeds; line: seed 0 along its training", loc="right", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()  # the last panel lacks arms that were judged before KID was
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def draw_arm(axis: Any, points: Points, arm: str, panel: Panel, color: str) -> None:
    """Draw the way of the first seed, and the mean of all seeds at the end with its interval over captions."""
    trained = [cells for (name, _), cells in points.items() if name == arm]
    way = [cells[0] for cells in trained if cells[0]["seed"] == 0 and is_judged(cells[0], panel.measure)]
    shares = [100 * share([cell["copies"][panel.kind]])[0] for cell in way]
    axis.plot(
        [quality(cell, panel.measure) for cell in way], shares, marker="o", markersize=3, linewidth=1, color=color
    )
    end = [cell for cell in trained[-1] if is_judged(cell, panel.measure)] if trained else []
    if not end:
        return
    value, low, high = (100 * one for one in share([cell["copies"][panel.kind] for cell in end]))
    axis.errorbar(
        sum(quality(cell, panel.measure) for cell in end) / len(end),
        value,
        [[value - low], [high - value]],
        marker="o",
        markersize=9,
        color=color,
        capsize=3,
        label=f"{title(arm).replace('`', '')} ({len(end)} seed{'s' if len(end) > 1 else ''})",
    )

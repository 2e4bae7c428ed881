"""The plot of the cells: copies against quality, a line along each training."""

from pathlib import Path

from benchmarks.memorization.compare import quality
from benchmarks.memorization.table import Points, is_judged, share, title

SHOWN = ("plain", "plain_distinct", "iet", "iet_agc", "paper", "shard", "agc", "agc_balance")
"""Arms of full weights; more would hide each other."""
PANELS = {
    "loss": "denoising loss on unseen pictures",
    "kid": "distance of the drawings of single captions to unseen pictures (KID)",
}


def plot(points: Points, file: Path) -> None:
    """Draw the share of copies of repeated captions against the loss on unseen pictures, and against the KID."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.8), sharey=True, layout="constrained")
    for axis, (measure, words) in zip(axes, PANELS.items(), strict=True):
        for number, arm in enumerate(SHOWN):
            # Only points that every seed of the arm's last point has: a line must not jump between sets of seeds.
            along = [cells for (name, _), cells in points.items() if name == arm]
            along = [
                cells for cells in along if len(cells) == len(along[-1]) and all(is_judged(c, measure) for c in cells)
            ]
            if not along:
                continue
            values = [sum(quality(cell, measure) for cell in cells) / len(cells) for cells in along]
            shares, lows, highs = zip(
                *(share([cell["copies"]["repeated"] for cell in cells]) for cells in along), strict=True
            )
            color = f"C{number}"
            label = f"{title(arm).replace('`', '')} ({len(along[-1])} seed{'s'[: len(along[-1]) != 1]})"
            axis.plot(values, [100 * one for one in shares], marker="o", markersize=4, color=color, label=label)
            axis.errorbar(
                values[-1],
                100 * shares[-1],
                [[100 * (shares[-1] - lows[-1])], [100 * (highs[-1] - shares[-1])]],
                marker="o",
                markersize=9,
                color=color,
                capsize=3,
            )
        axis.set_xlabel(words)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("lower and further left is better; the large dot is the end of the training", loc="left")
    axes[0].set_ylabel("near copies, % of the drawings of repeated captions")
    handles, labels = axes[0].get_legend_handles_labels()  # the right panel lacks arms that were judged before KID was
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)

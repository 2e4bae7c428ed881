"""The plot of the results: replication against quality, a panel for each dataset."""

from pathlib import Path

from benchmarks.memorization.table import Groups, share
from benchmarks.memorization.variants import VARIANTS

KINDS = {"duplicated": "o", "unique": "s"}
"""Kinds of prompts and their markers."""


def plot(groups: Groups, file: Path) -> None:
    """Plot how often the own training image is the nearest, by kind of prompts, against the held-out loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(5.2 * len(groups), 4.8), layout="constrained", squeeze=False
    )
    for axis, (group, points) in zip(axes[0], groups.items(), strict=True):
        shown = {variant: results for (variant, _), results in points.items() if results and variant != "base"}
        for variant, results in shown.items():
            color = f"C{list(VARIANTS).index(variant)}"
            loss = sum(one["losses"]["heldout"]["mean"] for one in results) / len(results)
            for kind, marker in KINDS.items():
                value, low, high = (100 * one for one in share(results, kind, "own"))
                label = VARIANTS[variant].title.replace("`", "").replace("*", "") if kind == "duplicated" else None
                axis.errorbar(
                    loss, value, [[value - low], [high - value]], marker=marker, color=color, capsize=3, label=label
                )
        everyone = [one for results in shown.values() for one in results]
        axis.axhline(100 * share(everyone, "heldout", "own")[0], color="gray", linestyle=":", linewidth=1)
        axis.set(
            title=f"{group[0]}, duplicates: {group[1]}", xlabel="held-out loss", ylabel="own training image nearest, %"
        )
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(
        "circles: duplicated prompts, squares: unique prompts, dotted: held-out prompts; lower left is better"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)

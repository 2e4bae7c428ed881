"""The plot of the results: replication against quality, a panel for each dataset."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memorization.table import Groups, Result, share
from benchmarks.memorization.variants import TITLES

KINDS = {"duplicated": "o", "unique": "s"}
"""Kinds of prompts and their markers."""

NUM_COLUMNS = 2
OFF_SCALE = {"base", "lora_dp"}
"""Variants that are not drawn: they have learned so little that all others would lie on one line."""


def plot(groups: Groups, file: Path) -> None:
    """Plot how often the own training image is the nearest, by kind of prompts, against the held-out loss.

    The checkpoints of a variant are joined by a line; of the last one the interval is shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_rows = -(-len(groups) // NUM_COLUMNS)
    figure, axes = pyplot.subplots(
        num_rows, NUM_COLUMNS, figsize=(8 * NUM_COLUMNS, 4.4 * num_rows), layout="constrained", squeeze=False
    )
    drawn = {variant for points in groups.values() for variant, _ in points} - OFF_SCALE
    names = [variant for variant in TITLES if variant in drawn]
    colors = {variant: pyplot.get_cmap("tab20")(number % 20) for number, variant in enumerate(names)}
    for axis, (group, points) in zip(axes.flat, groups.items(), strict=False):
        shown: dict[str, list[list[Result]]] = defaultdict(list)
        for (variant, _), results in points.items():
            if results and variant not in OFF_SCALE:
                shown[variant].append(results)
        for variant, steps in shown.items():
            for kind, marker in KINDS.items():
                if kind == "unique" or group[1] in ("exact", "near"):
                    label = TITLES[variant].replace("`", "").replace("*", "") if kind == "unique" else None
                    _draw(axis, steps, kind, marker, colors[variant], label)
        everyone = [one for steps in shown.values() for results in steps for one in results]
        axis.axhline(100 * share(everyone, "heldout", "own")[0], color="gray", linestyle=":", linewidth=1)
        axis.set(
            title=f"{group[0]}, duplicates: {group[1]}", xlabel="held-out loss", ylabel="own training image nearest, %"
        )
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    figure.suptitle(
        "circles: duplicated prompts, squares: unique prompts, dotted: held-out prompts; lower left is better"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


def _draw(axis: Any, steps: Sequence[Sequence[Result]], kind: str, marker: str, color: Any, label: str | None) -> None:
    """Draw the checkpoints of a variant (each: the results of its seeds) for one kind of prompts."""
    losses = [sum(one["losses"]["heldout"]["mean"] for one in results) / len(results) for results in steps]
    shares = [[100 * one for one in share(results, kind, "own")] for results in steps]
    axis.plot(losses, [value for value, *_ in shares], marker=marker, color=color, linewidth=1, label=label)
    value, low, high = shares[-1]
    axis.errorbar(losses[-1], value, [[value - low], [high - value]], color=color, capsize=3)

"""The table and the plot of the cells that `python -m benchmarks.memorization` has made.

    python -m benchmarks.memorization.table --plot docs/images/memorization.png

Shares of copies are over all drawings of all seeds; intervals are 95 % bootstrap intervals over captions. Losses are
means at fixed timesteps and noise, the same for every model.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memorization.arms import ARMS

CELLS = Path(__file__).parent / "cells"
KINDS = ("repeated", "single")
NUM_RESAMPLES = 2000

Cell = dict[str, Any]


def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=CELLS, help="where the cells are")
    parser.add_argument("--plot", type=Path, help="also draw copies against the loss on unseen pictures into this PNG")
    options = parser.parse_args()
    points = read_cells(options.cells)
    print("\n".join(table(points)))
    if options.plot:
        plot(points, options.plot)


def read_cells(folder: Path) -> dict[tuple[str, int], list[Cell]]:
    """Return the cells of each arm and step, a cell per seed, in the order of the arms."""
    points: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    order = list(ARMS)
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for cell in sorted(cells, key=lambda cell: (order.index(cell["arm"]), cell["step"], cell["seed"])):
        points[cell["arm"], cell["step"]].append(cell)
    return dict(points)


def table(points: dict[tuple[str, int], list[Cell]]) -> Iterable[str]:
    """Yield the lines of a table with a row for each arm and step."""
    columns = ["arm", "steps", "seeds", *(f"copies, {kind}" for kind in KINDS), "loss unseen", "loss single"]
    yield _line([*columns, "extra steps", "picture-forwards"])
    yield "|---" * (len(columns) + 2) + "|"
    for (arm, step), cells in points.items():
        shares = [_share_text([cell["copies"][kind] for cell in cells]) for kind in KINDS]
        losses = [f"{mean_loss(cells, name):.4f}" for name in ("heldout", "single")]
        costs = [sum(cell[name] for cell in cells) / len(cells) for name in ("extra_steps", "picture_forwards")]
        yield _line([ARMS[arm].title, step, len(cells), *shares, *losses, *(f"{cost:,.0f}" for cost in costs)])


def _line(values: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def mean_loss(cells: Sequence[Cell], name: str) -> float:
    """Return the mean over the seeds of a set's mean loss."""
    return sum(cell["losses"][name]["mean"] for cell in cells) / len(cells)


def share(copies: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the share of copies among the drawings of several seeds, and its interval over captions."""
    by_caption = torch.tensor([[int(digit) for digit in one["copies_by_caption"]] for one in copies]).double().sum(0)
    drawings = sum(one["drawings"] for one in copies) / len(by_caption)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(by_caption), (NUM_RESAMPLES, len(by_caption)), generator=generator)
    resampled = by_caption[chosen].mean(1) / drawings
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(by_caption.mean() / drawings), low, high


def _share_text(copies: Sequence[dict[str, Any]]) -> str:
    value, low, high = share(copies)
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


def plot(points: dict[tuple[str, int], list[Cell]], file: Path) -> None:
    """Draw the share of copies of repeated captions against the loss on unseen pictures, a line along each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    arms = list(dict.fromkeys(arm for arm, _ in points))
    panels = {"all weights": [arm for arm in arms if "lora" not in arm], "LoRA": [arm for arm in arms if "lora" in arm]}
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        for arm in shown:
            along = [cells for (name, _), cells in points.items() if name == arm]
            losses = [mean_loss(cells, "heldout") for cells in along]
            shares = [100 * share([cell["copies"]["repeated"] for cell in cells])[0] for cells in along]
            (line,) = axis.plot(losses, shares, marker="o", markersize=4, label=ARMS[arm].title.replace("`", ""))
            axis.plot(losses[-1], shares[-1], "o", color=line.get_color(), markersize=9)
        axis.set_title(f"{title}: lower and further left is better", loc="left")
        axis.set_xlabel("denoising loss on unseen pictures")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    axes[0].set_ylabel("near copies, % of the drawings of repeated captions")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()

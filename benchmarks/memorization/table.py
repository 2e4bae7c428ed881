"""The tables and the plot of the cells that `python -m benchmarks.memorization` has made.

    python -m benchmarks.memorization.table --plot docs/images/memorization.png

Shares of copies are over all generated images of all seeds; intervals are 95 % bootstrap intervals over captions. Losses are
means at fixed timesteps and noise, the same for every model. The second table compares at equal quality, see
`compare.py`.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memorization.arms import ARMS
from benchmarks.memorization.compare import NUM_RESAMPLES, Cell, Fall, fall, quality, shares_by_caption

CELLS = Path(__file__).parent / "cells"
KINDS = ("repeated", "single")
MEASURES = {"loss": "loss unseen", "kid": "KID"}
"""What is held equal. Not the KID of latents: it rises along every training from the untouched model's."""

Points = dict[tuple[str, int], list[Cell]]


def main() -> None:
    """Print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=CELLS, help="where the cells are")
    parser.add_argument("--all_points", action="store_true", help="a row for each point, not only for the last")
    parser.add_argument("--plot", type=Path, help="also draw copies against loss and KID into this PNG")
    options = parser.parse_args()
    points = read_cells(options.cells)
    print("\n".join(table(points if options.all_points else last_points(points))))
    print("\n" + "\n".join(equal_quality_table(points)))
    if options.plot:
        from benchmarks.memorization.plot import plot

        plot(points, options.plot)


def read_cells(folder: Path) -> Points:
    """Return the cells of each arm and step, a cell per seed, in the order of the arms."""
    points: Points = defaultdict(list)
    order = {arm: number for number, arm in enumerate(ARMS)}
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for cell in sorted(
        cells, key=lambda cell: (order.get(cell["arm"], len(order)), cell["arm"], cell["step"], cell["seed"])
    ):
        points[cell["arm"], cell["step"]].append(cell)
    return dict(points)


def last_points(points: Points) -> Points:
    """Return the last point of each arm."""
    last = {arm: step for arm, step in points}
    return {(arm, step): points[arm, step] for arm, step in last.items()}


def along(points: Points, arm: str, seed: int) -> list[Cell]:
    """Return the cells of an arm and a seed along its training, the untouched model first."""
    start = [cell for (name, _), cells in points.items() for cell in cells if name == "base"]
    return start + [
        cell for (name, _), cells in points.items() for cell in cells if name == arm != "base" and cell["seed"] == seed
    ]


def table(points: Points) -> Iterable[str]:
    """Yield the lines of a table with a row for each arm and step."""
    columns = [
        "arm",
        "steps",
        "seeds",
        *(f"copies, {kind}" for kind in KINDS),
        *(f"recognized, {kind}" for kind in KINDS),
        "loss unseen",
        "loss single",
        "KID",
        "KID of latents",
    ]
    columns += ["image-forwards", "CPU seconds"]
    yield _line(columns)
    yield "|---" * len(columns) + "|"
    for (arm, step), cells in points.items():
        shares = [share_text(cells, measure, kind) for measure in ("copies", "recognized") for kind in KINDS]
        losses = [f"{mean_loss(cells, name):.4f}" for name in ("heldout", "single")]
        kids = [kid_text(cells, name) for name in ("kid", "kid_latents")]
        forwards = f"{sum(cell['image_forwards'] for cell in cells) / len(cells):,.0f}"
        yield _line([title(arm), step, len(cells), *shares, *losses, *kids, forwards, seconds_text(cells)])


def equal_quality_table(points: Points) -> Iterable[str]:
    """Yield the lines of a table that sets the last point of each arm beside plain training of the same quality."""
    yield _line(
        [
            "arm",
            "seeds",
            *(
                text
                for name in MEASURES.values()
                for text in (f"plain's copies at its {name}", "the arm copies less by")
            ),
        ]
    )
    yield "|---" * (2 + 2 * len(MEASURES)) + "|"
    for (arm, _), cells in last_points(points).items():
        reference = "lora_plain" if arm.startswith("lora") else "plain"
        curves = {cell["seed"]: along(points, reference, cell["seed"]) for cell in cells}
        cells = [cell for cell in cells if len(curves[cell["seed"]]) > 2 and arm not in ("base", reference)]
        if not cells:
            continue
        columns: list[str] = []
        for measure in MEASURES:
            curve = [[cell for cell in curves[ours["seed"]] if is_judged(cell, measure)] for ours in cells]
            ready = all(is_judged(cell, measure) for cell in cells) and all(len(one) > 2 for one in curve)
            columns += fall_texts(fall(cells, curve, measure)) if ready else ["-", "-"]
        yield _line([title(arm), len(cells), *columns])


def is_judged(cell: Cell, measure: str) -> bool:
    """Return whether a cell has a measure; the oldest ones have no KID."""
    return measure == "loss" or measure in cell


def fall_texts(found: Fall | None) -> list[str]:
    """Return plain training's share of copies and the fall, as text."""
    if found is None:
        return ["0%", "-"]
    text = f"{percent(found.value)} ({percent(found.low)} to {percent(found.high)})"
    if len(found.by_seed) > 1:
        text += f", by seed {', '.join(map(percent, found.by_seed))}"
    return [f"{found.share:.0%}{'' if found.reached else '*'}", text]


def percent(value: float) -> str:
    """Return a fall as text; one far below zero, beside next to no copies of plain training, says no more than that."""
    return f"{value:.0%}" if value > -10 else "under -1000%"


def _line(values: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def title(arm: str) -> str:
    """Return the words for an arm; its name where it was tried and taken out again (`cells/removed`)."""
    return ARMS[arm].title if arm in ARMS else arm


def mean_loss(cells: Sequence[Cell], name: str) -> float:
    """Return the mean over the seeds of a set's mean loss."""
    return sum(cell["losses"][name]["mean"] for cell in cells) / len(cells)


def kid_text(cells: Sequence[Cell], name: str) -> str:
    """Return the mean over the seeds of a KID."""
    found = [quality(cell, name) for cell in cells if is_judged(cell, name)]
    return f"{sum(found) / len(found):.3f}" if found else "-"


def seconds_text(cells: Sequence[Cell]) -> str:
    """Return the mean processor seconds of a run."""
    found = [seconds for cell in cells if (seconds := cell.get("cpu_seconds_of_run")) is not None]
    return f"{sum(found) / len(found):,.0f}" if found else "-"


def share(copies: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the share of copies among the generated images of several seeds, and its interval over captions."""
    by_caption = torch.stack([shares_by_caption({"copies": {"all": one}}, "all") for one in copies]).mean(0)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(by_caption), (NUM_RESAMPLES, len(by_caption)), generator=generator)
    low, high = by_caption[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(by_caption.mean()), low, high


def share_text(cells: Sequence[Cell], measure: str, kind: str) -> str:
    """Return the share of copies by pixels ("copies") or by descriptor ("recognized") with its interval, as text."""
    found = [cell[measure][kind] for cell in cells if measure in cell]
    if not found:
        return "-"
    value, low, high = share(found)
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()

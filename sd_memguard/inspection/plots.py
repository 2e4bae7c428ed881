"""The plots of a run: memory bank, share of samples that met each action, held-out gap, moves between shards."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sd_memguard.core.schedule import round_mean
from sd_memguard.inspection.summary import NO_GAP, is_agc
from sd_memguard.inspection.text_table import one_line
from sd_memguard.runs.folder import RunFolder

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/)."""
LINES = ("-", "--", ":", "-.")
INK, MUTED, GRID = "#23262b", "#60656c", "#dfdfdf"
MAX_ROUNDS_NUMBERED = 16


class NothingToPlotError(ValueError):
    """There are no numbers for this plot; the message says why and how to get them."""


def bank_figure(run: RunFolder) -> Figure:
    """Return the memory bank over the timesteps, a line for each proxy.

    Raises:
        NothingToPlotError: the run kept no banks, or nothing was seen yet.
    """
    if not any(np.isfinite(bank.mean).any() for bank in run.banks):
        raise NothingToPlotError("bank.png, since there is no memory bank on disk")
    figure, (axes,) = _figure(1, f"What loss is usual at each timestep, after round {len(run.rounds)}", _bank_note(run))
    for k, bank in enumerate(run.banks):
        # A timestep that nothing came near is a gap in the line; zeros cannot be shown on a logarithmic scale.
        axes.plot(np.where(bank.mean > 0, bank.mean, np.nan), label=f"proxy {k}", **_style(k))
    axes.set(xlabel="timestep (more noise to the right)", ylabel="memory bank: mean loss", yscale="log")
    axes.set_xlim(0, max(len(bank.mean) for bank in run.banks) - 1)
    _legend(axes, len(run.banks))
    return figure


def _bank_note(run: RunFolder) -> str:
    if not run.is_guarded:
        return "The guard was off: the bank decided nothing."
    if not is_agc(run):
        return f"Kept by the sample rule {one_line(str(run.config.get('sample_rule')), 60, keep='end')}."
    skip, augment = run.config.get("skip_threshold") or 0, run.config.get("augment_threshold") or 0
    note = f"A sample below {skip} of its proxy's line is skipped" if skip else "Nothing is skipped"
    note += f", below {augment} augmented" if augment > skip > 0 else ""
    covered = [shard.get("bank_coverage") for row in run.rounds[-1:] for shard in row["shards"]]
    known = [value for value in covered if value is not None]
    return f"{note}; the bank decides at {min(known):.0%} of the timesteps." if known else f"{note}."


def fractions_figure(run: RunFolder) -> Figure:
    """Return the share of the samples that met each action over the rounds, a line for each shard.

    Raises:
        NothingToPlotError: the guard was off, its rule has no actions, or no round has ended.
    """
    if not run.is_guarded:
        raise NothingToPlotError("fractions.png, since the guard was off")
    if not run.actions:
        raise NothingToPlotError("fractions.png, since the sample rule has no actions")
    if not run.rounds:
        raise NothingToPlotError("fractions.png, since no round has ended yet")
    last = run.rounds[-1]
    shares = (f"{round_mean(last, f'{column}_fraction') or 0:.0%} {column}" for column in run.columns)
    title = f"In round {last['round']}, of the samples: {', '.join(shares)}"
    figure, panels = _figure(
        len(run.columns), title, "Shares of each shard's samples; the others were trained on as they are."
    )
    rounds = [row["round"] for row in run.rounds]
    for axes, kind in zip(panels, run.columns, strict=True):
        for k in range(run.num_shards):
            axes.plot(rounds, _over_rounds(run, k, f"{kind}_fraction"), label=f"shard {k}", marker="o", **_style(k))
        axes.set(xlabel="round", ylim=(0, 1))
        axes.set_title(kind, loc="left", fontsize=11, color=INK)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set_ylabel("share of samples")
    _legend(panels[-1], run.num_shards)
    return figure


def _over_rounds(run: RunFolder, shard_index: int, name: str) -> list[float]:
    """Return a number of a shard in each round, NaN where it took no step."""
    values = [row["shards"][shard_index][name] for row in run.rounds]
    return [float("nan") if value is None else value for value in values]


def gap_figure(run: RunFolder) -> Figure:
    """Return the loss on images trained on and on held-out ones over the rounds, and what lies between.

    Raises:
        NothingToPlotError: it was not measured.
    """
    probed = [row for row in run.rounds if None not in (row.get("train_loss"), row.get("heldout_loss"))]
    if not probed:
        raise NothingToPlotError(f"heldout_gap.png: the held-out gap was {NO_GAP}")
    last = probed[-1]
    gap = last["heldout_loss"] - last["train_loss"]
    figure, (axes,) = _figure(
        1,
        f"Held-out gap after round {last['round']}: {gap:+.4f}",
        "Loss on held-out images minus loss on images trained on, with the same timesteps and noise in every round. "
        "Bars: standard error.",
    )
    rounds = [row["round"] for row in probed]
    curves = {name: np.array([row[name] for row in probed]) for name in ("heldout_loss", "train_loss")}
    axes.fill_between(rounds, curves["train_loss"], curves["heldout_loss"], color=GRID, linewidth=0)
    for (name, values), label, index in zip(curves.items(), ("held out", "trained on"), (1, 0), strict=True):
        errors = [row.get(f"{name}_error") or 0.0 for row in probed]
        style: dict[str, Any] = {**_style(index), "marker": "o", "capsize": 3, "elinewidth": 0.7}
        axes.errorbar(rounds, values, yerr=errors, label=label, **style)
        axes.annotate(
            f"{label} {values[-1]:.4f}",
            (rounds[-1], values[-1]),
            xytext=(10, 7 if (gap >= 0) == (index == 1) else -7),
            textcoords="offset points",
            va="center",
            color=COLOURS[index],
            annotation_clip=False,
        )
    axes.set(xlabel="round", ylabel="denoising loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def moves_figure(run: RunFolder) -> Figure:
    """Return the moves between shards in each redistribution, and how often the samples have moved.

    Raises:
        NothingToPlotError: no redistribution has taken place.
    """
    rounds = [row for row in run.rounds if row["kind"] == "redistribute"]
    if not rounds:
        raise NothingToPlotError(f"moves.png, since {_no_moves(run)}")
    counts = {(move["source"], move["target"], row["round"]): move["count"] for row in rounds for move in row["moves"]}
    pairs = sorted({(source, target) for source, target, _ in counts}) or [(0, 1)]
    matrix = np.array([[counts.get((*pair, row["round"]), 0) for row in rounds] for pair in pairs])
    title = f"{matrix.sum():,} moves between shards in {len(rounds)} redistribution{'s' * (len(rounds) != 1)}"
    figure, (left, right) = _figure(2, title, "The most memory-prone samples of each shard go on to the next one.")
    _matrix(left, matrix, [f"{source} to {target}" for source, target in pairs], [row["round"] for row in rounds])
    _moved_samples(right, run)
    return figure


def _no_moves(run: RunFolder) -> str:
    if not run.is_guarded:
        return "the guard was off and nothing moves"
    if run.num_shards == 1:
        return "there is one shard and nowhere to move"
    return "no redistribution has taken place" if run.config.get("redistribute_fraction") else "redistribution was off"


def _matrix(axes: Axes, matrix: np.ndarray, names: list[str], rounds: list[int]) -> None:
    """Show counts as shades, with the numbers on them while there is room."""
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=max(int(matrix.max()), 1) * 1.25, aspect="auto")
    axes.set_title("samples moved, from shard to shard", loc="left", fontsize=11, color=INK)
    axes.set(xlabel="after round", yticks=range(len(names)), yticklabels=names)
    shown = range(0, len(rounds), -(-len(rounds) // MAX_ROUNDS_NUMBERED))
    axes.set_xticks(shown, [str(rounds[index]) for index in shown])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for edge in range(1, len(rounds)):
        axes.axvline(edge - 0.5, color="white")
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color="white")
    axes.tick_params(length=0)
    if len(rounds) > MAX_ROUNDS_NUMBERED:
        return
    dark = matrix.max() * 0.7
    for (row, column), count in np.ndenumerate(matrix):
        axes.text(column, row, str(count), ha="center", va="center", color="white" if count > dark else INK)


def _moved_samples(axes: Axes, run: RunFolder) -> None:
    """Show how many samples have moved how often."""
    moves = run.samples["moves"].to_numpy() if run.samples is not None else np.zeros(0, dtype=np.int64)
    heights = np.bincount(moves) if len(moves) else np.zeros(1, dtype=np.int64)
    bars = axes.bar(range(len(heights)), heights, color=COLOURS[0], width=0.7)
    if len(heights) <= MAX_ROUNDS_NUMBERED:
        axes.bar_label(bars, [f"{height:,}" for height in heights], color=MUTED, padding=2)
    axes.set_title("samples by their number of moves", loc="left", fontsize=11, color=INK)
    axes.set(xlabel="moves of a sample", yticks=[])
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines["left"].set_visible(False)


def _figure(num_panels: int, title: str, note: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with its title, a note under it, and panels side by side."""
    engine = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.84), wspace=0.08)
    figure = Figure(figsize=(9.5, 5), dpi=120, facecolor="white", layout=engine)
    panels = [figure.add_subplot(1, num_panels, number + 1) for number in range(num_panels)]
    figure.text(0.02, 0.965, title, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 0.905, note, fontsize=10, color=MUTED, va="top")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(colors=MUTED)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def _style(index: int) -> dict[str, Any]:
    """Return colour and dashes of a line, no two alike among the first 28."""
    dashes = LINES[index // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes, "linewidth": 1.5, "markersize": 4}


def _legend(axes: Axes, num_lines: int) -> None:
    if num_lines > 1:
        axes.legend(frameon=False, labelcolor=INK, ncols=-(-num_lines // 10), fontsize=9)

"""What the plots show against the files: the data handed to matplotlib, not its pixels."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from sd_memguard.inspection.plots import (
    COLOURS,
    NothingToPlotError,
    bank_figure,
    fractions_figure,
    gap_figure,
    moves_figure,
)
from sd_memguard.runs.folder import Bank, read_run


@pytest.fixture
def inspected(finished_run):
    return read_run(finished_run.output_dir)


@pytest.fixture
def rows(finished_run):
    return [json.loads(line) for line in (finished_run.output_dir / "memguard/rounds.jsonl").read_text().splitlines()]


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_bank(inspected, finished_run, rows):
    (axes,) = bank_figure(inspected).axes
    tensors = load_file(finished_run.output_dir / "memguard/banks.safetensors")
    assert len(axes.lines) == 3
    for k, line in enumerate(axes.lines):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(50))
        np.testing.assert_array_equal(line.get_ydata(), tensors[f"shard_{k}.mean"])
        assert np.isfinite(line.get_ydata()).any()
        assert line.get_label() == f"proxy {k}"
    assert sum(int(tensors[f"shard_{k}.times_seen"].sum()) for k in range(3)) == 96
    coverage = min(shard["bank_coverage"] for shard in rows[-1]["shards"])
    assert f"the bank decides at {coverage:.0%} of the timesteps" in texts(bank_figure(inspected))


def test_zeros_and_gaps_of_a_bank_are_not_drawn(inspected):
    bank = Bank(np.array([0.5, 0.0, np.nan, 0.25], dtype=np.float32), np.ones(4, dtype=np.int64))
    (axes,) = bank_figure(replace(inspected, banks=[bank])).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.array([0.5, np.nan, np.nan, 0.25], dtype=np.float32))


def test_fractions(inspected, rows):
    figure = fractions_figure(inspected)
    for axes, name in zip(figure.axes, ("skipped_fraction", "augmented_fraction"), strict=True):
        assert len(axes.lines) == 3
        for k, line in enumerate(axes.lines):
            assert list(line.get_xdata()) == [1, 2, 3, 4]
            assert list(line.get_ydata()) == [row["shards"][k][name] for row in rows]
    assert texts(figure).startswith("In round 4, ")


def test_a_shard_without_steps_is_a_gap(inspected, rows):
    empty = {**rows[1]["shards"][2], "steps": 0, "loss": None, "skipped_fraction": None, "augmented_fraction": None}
    rows[1] = {**rows[1], "shards": [*rows[1]["shards"][:2], empty]}
    figure = fractions_figure(replace(inspected, rounds=rows))
    assert np.isnan(figure.axes[0].lines[2].get_ydata()[1])


def test_gap(inspected, rows):
    figure = gap_figure(inspected)
    (axes,) = figure.axes
    unseen, trained = (container[0].get_ydata() for container in axes.containers)
    assert list(unseen) == [row["heldout_loss"] for row in rows]
    assert list(trained) == [row["train_loss"] for row in rows]
    bars = axes.containers[0][2][0].get_segments()
    for segment, row in zip(bars, rows, strict=True):
        half = row["heldout_loss_error"]
        np.testing.assert_allclose(segment[:, 1], [row["heldout_loss"] - half, row["heldout_loss"] + half])
    gap = rows[-1]["heldout_loss"] - rows[-1]["train_loss"]
    assert texts(figure).startswith(f"Held-out gap after round 4: {gap:+.4f}")


def test_moves(inspected, rows, finished_run):
    left, right = moves_figure(inspected).axes
    matrix = np.asarray(left.images[0].get_array())
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "3"]
    found = {(label, number): matrix[i, j] for i, label in enumerate(labels) for j, number in enumerate((1, 3))}
    expected = {
        (f"{move['source']} to {move['target']}", row["round"]): move["count"] for row in rows for move in row["moves"]
    }
    assert {place: count for place, count in found.items() if count} == expected
    moves = pq.read_table(finished_run.output_dir / "memguard/samples.parquet")["moves"].to_pylist()
    assert [bar.get_height() for bar in right.patches] == [moves.count(n) for n in range(max(moves) + 1)]
    assert matrix.sum() == sum(moves) > 0


def test_many_shards_have_lines_of_their_own(inspected, rows):
    shards = [{**rows[0]["shards"][0], "shard": k} for k in range(20)]
    config = {**inspected.config, "num_shards": 20}
    figure = fractions_figure(replace(inspected, config=config, rounds=[{**rows[0], "shards": shards}]))
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == 20 > len(COLOURS)


@pytest.mark.parametrize("make", [bank_figure, fractions_figure, gap_figure, moves_figure])
def test_nothing_to_draw_before_the_first_round(inspected, make):
    with pytest.raises(NothingToPlotError):
        make(replace(inspected, rounds=[], banks=[], samples=None))


def test_the_reasons_name_the_setting(inspected, rows):
    without = [{name: value for name, value in row.items() if "loss" not in name} for row in rows]
    with pytest.raises(NothingToPlotError, match="--validation_data_dir"):
        gap_figure(replace(inspected, rounds=without))
    plain = {**inspected.config, "memguard": "off", "num_shards": 1}
    averages = [{**row, "kind": "average", "moves": []} for row in rows]
    for make in (fractions_figure, moves_figure):
        with pytest.raises(NothingToPlotError, match="guard was off"):
            make(replace(inspected, config=plain, rounds=averages))
    with pytest.raises(NothingToPlotError, match="one shard"):
        moves_figure(replace(inspected, config={**inspected.config, "num_shards": 1}, rounds=averages))

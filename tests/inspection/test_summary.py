"""The numbers of the story against an independent reading of the files, and nasty words in it."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_memguard.inspection.summary import MAX_ROUNDS_LISTED, format_summary, memory_prone_rows, ranking_sentences
from sd_memguard.inspection.text_table import display_width
from sd_memguard.runs.folder import read_run

NASTY = [
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "<b>html</b> [bold]markup[/bold] $x^2$ %s {brace}",
    "x" * 1_000_000,
    "back\u202ewards\u2028line",
    "猫" * 300,
]


def table_below(story: str, title: str) -> list[list[str]]:
    """The cells of the rows below a title and a header, up to the first line that is no row."""
    lines = story.split(title, 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        cells = line.split()
        if not cells or not cells[0].isdecimal():
            break
        rows.append(cells)
    return rows


def read_rounds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "memguard/rounds.jsonl").read_text().splitlines()]


def test_rounds_against_the_file(finished_run):
    cells = table_below(format_summary(read_run(finished_run.output_dir), 3, 120), "Round by round")
    rows = read_rounds(finished_run.output_dir)
    assert len(cells) == len(rows) == 4
    for line, row in zip(cells, rows, strict=True):
        shards = [shard for shard in row["shards"] if shard["steps"]]
        steps = sum(shard["steps"] for shard in shards)
        loss = sum(shard["loss"] * shard["steps"] for shard in shards) / steps
        fractions = [
            sum(shard[name] * shard["steps"] for shard in shards) / steps
            for name in ("skipped_fraction", "augmented_fraction")
        ]
        moves = sum(move["count"] for move in row["moves"])
        gap = row["heldout_loss"] - row["train_loss"]
        assert line == [
            *(str(row["round"]), row["kind"], str(steps), f"{loss:.4f}"),
            *(f"{fraction:.0%}" for fraction in fractions),
            *(str(row["extra_steps"]), str(moves)),
            *(f"{value:.4f}" for value in (row["train_loss"], row["heldout_loss"], gap)),
        ]


def test_the_ending_against_the_summary(finished_run):
    story, summary = format_summary(read_run(finished_run.output_dir), 3, 120), finished_run.summary
    assert story.startswith(f"{finished_run.output_dir}: finished")
    assert f"samples  96: {summary['skipped_fraction']:.1%} skipped, {summary['augmented_fraction']:.1%} aug" in story
    assert f"({summary['extra_steps']} extra steps on the copies, {summary['augment_queue_left']} left" in story
    assert f"steps    {summary['empty_steps']} without a clean sample, {summary['nonfinite_steps']} not finite" in story
    assert f"loss {summary['train_loss']:.4f} on images trained on, {summary['heldout_loss']:.4f} on held-out" in story
    rows = read_rounds(finished_run.output_dir)
    assert sum(row["empty_steps"] for row in rows) == summary["empty_steps"]
    assert sum(row["nonfinite_steps"] for row in rows) == summary["nonfinite_steps"]
    assert "24 steps of 4 images over all shards, 4 rounds of 2 steps per proxy" in story
    assert "24 images at 32 px" in story
    assert "skips below 0.95 of the usual loss, augments below 1.2, moves up to 25% of a shard" in story


def test_memory_prone_images_against_the_table(finished_run):
    table = pq.read_table(finished_run.output_dir / "memguard/samples.parquet").drop("duplicate_group").to_pylist()
    unclean = {row["file"]: row["skipped"] + row["augmented"] for row in table}
    expected = sorted(
        (row for row in table if unclean[row["file"]]),
        key=lambda row: (-Fraction(unclean[row["file"]], row["seen"] + 1), row["sample_id"]),
    )[:10]
    run = read_run(finished_run.output_dir)
    assert memory_prone_rows(run, 10) == expected
    names = [row["file"] for row in expected]
    assert [row["file"] for row in finished_run.summary["memory_prone"]] == names
    cells = table_below(format_summary(run, 10, 160), "Most memory-prone images")
    for number, (line, row) in enumerate(zip(cells, expected, strict=True), start=1):
        counts = [str(row[name]) for name in ("seen", "skipped", "augmented", "moves", "shard")]
        assert line == [str(number), f"{row['skip_ratio']:.0%}", *counts, row["file"], *row["caption"].split()]


def test_the_ranking_says_how_much_it_is_worth(finished_run):
    run = read_run(finished_run.output_dir)

    def sentences(skipped: list[int], num_listed: int) -> list[str]:
        """What is said of images that were seen twenty times each."""
        size = len(skipped)
        columns = {"sample_id": list(range(size)), "file": ["a"] * size, "caption": ["a"] * size, "shard": [0] * size}
        columns |= {"seen": [20] * size, "skipped": skipped, "augmented": [0] * size, "moves": [0] * size}
        columns |= {"skip_ratio": [number / 20 for number in skipped]}
        return ranking_sentences(replace(run, samples=pa.table(columns)), num_listed)

    clear = sentences([19] * 4 + [1] * 36, 4)
    assert "4 of 40 images rank as high" in clear[1]
    assert clear[1].endswith("chance would put 0.0 there")
    assert len(clear) == 2
    # All are left out half of the time: chance alone would spread them further.
    assert "says nothing yet: an image was seen 20 times" in sentences([11] * 4 + [10] * 36, 4)[-1]
    # Chance puts somewhat more than half of 40 images at 10 or more of 20; here are 30.
    assert "more than half of this list may be chance" in sentences([10] * 30 + [9] * 10, 30)[-1]


def test_an_older_run_has_no_count_of_empty_steps(finished_run):
    run = read_run(finished_run.output_dir)
    rows = [{name: value for name, value in row.items() if name != "empty_steps"} for row in run.rounds]
    assert "steps    an unknown number without a clean sample, 0 not finite" in format_summary(
        replace(run, rounds=rows), 3, 120
    )


def change_samples(folder: Path, name: str, values: list) -> None:
    file = folder / "memguard/samples.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), file)


@pytest.fixture
def copied(finished_run, tmp_path):
    """Return a copy of the run folder."""
    return Path(shutil.copytree(finished_run.output_dir, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["caption", "file"])
def test_nasty_words_stay_words(copied, name):
    num_samples = pq.read_table(copied / "memguard/samples.parquet").num_rows
    change_samples(copied, name, [NASTY[number % len(NASTY)] for number in range(num_samples)])
    width = 100
    story = format_summary(read_run(copied), 24, width)
    assert "\x1b" not in story
    assert "\u202e" not in story
    assert len(table_below(story, "Most memory-prone images")) == len(memory_prone_rows(read_run(copied), 24)) > 6
    listed = story.split("Most memory-prone images")[1]
    assert max(map(display_width, listed.splitlines())) <= width
    assert "<b>html</b>" in story or name == "file"


def test_a_run_under_way(copied):
    (copied / "model_index.json").unlink()
    (copied / "memguard/summary.json").unlink()
    rounds = (copied / "memguard/rounds.jsonl").read_text().splitlines(keepends=True)
    (copied / "memguard/rounds.jsonl").write_text("".join(rounds[:2]))
    story = format_summary(read_run(copied), 3, 120)
    assert "under way or interrupted, 2 of 4 rounds have ended" in story
    assert "newest checkpoint: checkpoint-24" in story  # the one before the export
    assert "Where it stands" in story
    assert len(table_below(story, "Round by round")) == 2


def test_a_run_before_its_first_round(copied):
    for name in ("rounds.jsonl", "samples.parquet", "banks.safetensors", "summary.json"):
        (copied / "memguard" / name).unlink()
    story = format_summary(read_run(copied), 3, 120)
    assert "0 of 4 rounds have ended" in story
    assert "Note: There is no memguard/rounds.jsonl: the first round has not ended yet." in story
    assert "Round by round" not in story


def test_a_plain_run_and_a_missing_gap(run):
    story = format_summary(read_run(run(memguard="off", max_train_steps=6).output_dir), 3, 120)
    assert "there is nothing skipped, augmented or moved" in story
    assert "Memory-prone images: none" in story
    assert "gap      not measured: it needs images that are not trained on, `--validation_data_dir DIR`" in story
    assert "skipped  augmented" not in story


def test_a_lora_run(run):
    result = run(proxy="lora", rank=2, max_train_steps=6)
    story = format_summary(read_run(result.output_dir), 3, 120)
    assert "LoRA adapters of rank 2" in story
    expected = f"file of rank {result.summary['lora_rank']}, relative error {result.summary['lora_relative_error']:.2e}"
    assert expected in story


def test_many_rounds_are_shown_in_part(finished_run):
    run = read_run(finished_run.output_dir)
    many = [{**run.rounds[0], "round": number} for number in range(1, 101)]
    story = format_summary(replace(run, rounds=many), 3, 120)
    assert len(table_below(story, "Round by round")) == MAX_ROUNDS_LISTED // 2
    assert "(60 rounds between are in memguard/rounds.jsonl)" in story
    assert "\n    100  redistribute" in story


def test_the_lowest_heldout_loss_is_named_when_it_is_past(finished_run):
    run = read_run(finished_run.output_dir)
    rising = [{**row, "heldout_loss": 0.5 + number, "train_loss": 0.5} for number, row in enumerate(run.rounds)]
    story = format_summary(replace(run, rounds=rising), 3, 120)
    assert "gap      +3.0000: loss 0.5000 on images trained on, 3.5000 on held-out ones" in story
    assert "(lowest after round 1: 0.5000)" in story

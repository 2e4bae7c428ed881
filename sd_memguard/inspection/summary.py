"""The summary of a run in words: what was trained on what, round by round, how it ended, its memory-prone images."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sd_memguard.core.rules import AUGMENT, shares_text
from sd_memguard.core.schedule import round_mean
from sd_memguard.inspection.text_table import display_width, one_line, table
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.runs.folder import RunFolder
from sd_memguard.runs.ranking import Counts, expected_by_chance, memory_prone_order, memory_prone_score

MAX_ROUNDS_LISTED = 40
NAME_WIDTH, MAX_FILE_WIDTH, MIN_WIDTH = 60, 36, 14
MISSING, INDENT = "-", " " * 11


def format_summary(run: RunFolder, num_images: int, width: int) -> str:
    """Return the summary of a run.

    Args:
        run: what it has written down.
        num_images: how many memory-prone images to list.
        width: columns that a line may take; tables of numbers take what they need.
    """
    parts = [
        _heading(run),
        _settings(run, width),
        _rounds(run),
        _ending(run),
        memory_prone_table(run, num_images, width),
        [line for notice in run.notices for line in textwrap.wrap(f"Note: {one_line(notice, 400)}", width)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _heading(run: RunFolder) -> list[str]:
    name = one_line(str(run.path), 200)
    if run.is_finished:
        by_script = "script" in run.config
        what = "the script has written what it trained" if by_script else "the fine-tuned pipeline is there"
        return [f"{name}: finished, {what}"]
    lines = [f"{name}: under way or interrupted, {len(run.rounds)} of {run.num_rounds} rounds have ended"]
    checkpoints = list_checkpoints(run.path)
    if checkpoints:
        lines.append(f"newest checkpoint: {checkpoints[-1].name}; `--resume_from_checkpoint latest` goes on from it")
    return lines


def _resolution(config: Mapping[str, Any]) -> str:
    sides = config.get("resolution")
    text = ", ".join(map(str, sides)) if isinstance(sides, list) else str(sides)
    return f"{text} (buckets)" if config.get("enable_bucket") else text


def _settings(run: RunFolder, width: int) -> list[str]:
    """Return what was trained on what, a line for each part; of a script only what its flags say."""
    config = run.config
    get = config.get
    batch = (get("train_batch_size") or 0) * (get("gradient_accumulation_steps") or 1)
    source = get("dataset_name") or get("train_data_dir")
    data = [_name(source)] if source else []
    data.append(f"{run.samples.num_rows:,} images" if run.samples is not None else "images")
    sizes = [shard["size"] for shard in run.rounds[-1]["shards"]] if run.rounds else []
    kind = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}.get(str(get("adapter")), "LoRA")
    rank = f" of rank {get('rank')}" if get("rank") else ""
    trained = [f"{kind} adapters{rank}" if get("proxy") == "lora" else "all UNet weights"]
    if get("learning_rate") is not None:
        trained.append(f"learning rate {get('learning_rate')} ({get('lr_scheduler')})")
    trained.append(f"seed {get('seed')}")
    rows = [
        ("model", _name(get("pretrained_model_name_or_path"))),
        ("data", ", ".join(data) + (f" at {_resolution(config)} px" if get("resolution") else "")),
        ("trained", ", ".join(trained)),
        (
            "budget",
            f"{config['max_train_steps']:,} steps{f' of {batch} images' if batch else ''} over all shards, "
            f"{_rounds_planned(run)}",
        ),
        ("guard", describe_guard(run)),
    ]
    if run.num_shards > 1:
        held = f", of {', '.join(map(str, sizes))} samples in the last round" if sizes else ""
        rows.insert(4, ("shards", f"{run.num_shards}, a proxy each{held}"))
    return [
        line for name, text in rows for line in textwrap.wrap(f"  {name:8} {text}", width, subsequent_indent=INDENT)
    ]


def _name(value: object) -> str:
    return one_line(str(value), NAME_WIDTH, keep="end")


def _rounds_planned(run: RunFolder) -> str:
    steps = min(run.config["steps_per_round"], -(-run.config["max_train_steps"] // run.num_shards))
    return f"{run.num_rounds} round{'s' * (run.num_rounds != 1)} of {steps:,} steps per proxy"


def describe_guard(run: RunFolder) -> str:
    """Return what the guard was set to do."""
    get = run.config.get
    if not run.is_guarded:
        return f"off (--memguard off): plain fine-tuning, there is nothing {either([*run.columns, 'moved'])}"
    skip, augment, moved = get("skip_threshold") or 0, get("augment_threshold") or 0, get("redistribute_fraction") or 0
    if is_agc(run):
        parts = [f"skips below {skip} of the usual loss" if skip else "skips nothing"]
        parts.append(f"augments below {augment}" if augment > skip > 0 else "augments nothing")
    else:
        parts = [f"sample rule {_name(get('sample_rule'))}"]
    if run.num_shards > 1:
        parts.append(f"moves up to {moved:.0%} of a shard" if moved else "moves nothing")
    if share := get("random_affine"):
        parts.append(f"shows images translated, rotated and scaled by up to {share:.1%}")
    bank = f"; memory bank {get('bank_mode')}, decay {get('bank_decay')}" if is_agc(run) else ""
    preset = f"preset {get('preset')}: " if get("preset") else ""
    return f"{preset}{', '.join(parts)}{bank}"


def is_agc(run: RunFolder) -> bool:
    """Whether the sample rule is AGC, whose thresholds and memory bank are settings of their own."""
    return bool(run.config.get("sample_rule") == "agc")


def either(words: Sequence[str]) -> str:
    """Return the words as alternatives.

    >>> either(["skipped", "augmented", "moved"])
    'skipped, augmented or moved'
    """
    return " or ".join([", ".join(words[:-1]), *words[-1:]] if len(words) > 1 else words)


def no_actions(run: RunFolder) -> str:
    """Return why no image is memory-prone."""
    return (
        f"no sample was {either(run.prone_columns)}" if run.prone_columns else "no action of the rule is a sign of it"
    )


def _rounds(run: RunFolder) -> list[str]:
    if not run.rounds:
        return []
    probed = any(row.get("heldout_loss") is not None for row in run.rounds)
    header = ["round", "kind", "steps", "loss"]
    if run.is_guarded:
        header += [*run.columns, *(["extra steps"] if AUGMENT in run.actions else []), "moves"]
    if probed:
        header += ["trained on", "held out", "gap"]
    rows = [_round_cells(row, run, probed) for row in run.rounds]
    lines = table(header, rows, left=["kind"])
    if len(rows) > MAX_ROUNDS_LISTED:
        half = MAX_ROUNDS_LISTED // 2
        between = f"({len(rows) - 2 * half} rounds between are in memguard/rounds.jsonl)"
        lines = [*lines[: half + 1], between, *lines[-half:]]
    title = "Round by round (means over the shards"
    title += "; trained on, held out: probe losses of the average model)" if probed else ")"
    return [title, *(f"  {line}" for line in lines)]


def _round_cells(row: dict[str, Any], run: RunFolder, probed: bool) -> list[str]:
    steps = sum(shard["steps"] for shard in row["shards"])
    cells = [str(row["round"]), row["kind"], str(steps), _number(round_mean(row, "loss"))]
    if run.is_guarded:
        cells += [_percent(round_mean(row, f"{column}_fraction")) for column in run.columns]
        cells += [str(row["extra_steps"])] if AUGMENT in run.actions else []
        cells.append(str(sum(move["count"] for move in row["moves"])))
    if probed:
        trained, heldout = row.get("train_loss"), row.get("heldout_loss")
        gap = None if trained is None or heldout is None else heldout - trained
        cells += [_number(trained), _number(heldout), _number(gap)]
    return cells


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def _ending(run: RunFolder) -> list[str]:
    """Return what it ended with, or where it stands."""
    if not run.rounds:
        return []
    lines = ["How it ended" if run.is_finished else "Where it stands", *_gap_lines(run), *_sample_lines(run)]
    empty, nonfinite = (_total(run, name) for name in ("empty_steps", "nonfinite_steps"))
    lines.append(f"  steps    {empty} without a clean sample, {nonfinite} not finite")
    if "lora_rank" in run.summary:
        error = run.summary["lora_relative_error"]
        lines.append(f"  LoRA     file of rank {run.summary['lora_rank']}, relative error {error:.2e}")
    return lines


def _total(run: RunFolder, name: str) -> str:
    """Return a count over all rounds; runs of older versions have not kept it."""
    known = all(name in row for row in run.rounds)
    return str(sum(row[name] for row in run.rounds)) if known else "an unknown number"


def _gap_lines(run: RunFolder) -> list[str]:
    probed = [row for row in run.rounds if None not in (row.get("train_loss"), row.get("heldout_loss"))]
    if not probed:
        return [f"  gap      {NO_GAP}"]
    last, lowest = probed[-1], min(probed, key=lambda row: row["heldout_loss"])
    gap = last["heldout_loss"] - last["train_loss"]
    text = f"  gap      {gap:+.4f}: loss {last['train_loss']:.4f} on images trained on, "
    text += f"{last['heldout_loss']:.4f} on held-out ones"
    if last.get("relative_gap") is not None:
        text += f", relative gap {last['relative_gap']:.0%}"
    if lowest is not last:
        kept = ", the model that is kept" if run.summary.get("kept_step") == lowest["global_step"] else ""
        text += f" (lowest after round {lowest['round']}: {lowest['heldout_loss']:.4f}{kept})"
    return [text]


NO_GAP = "not measured: it needs images that are not trained on, `--validation_data_dir DIR` of the training"
"""Why there is no held-out gap."""


def _sample_lines(run: RunFolder) -> list[str]:
    if run.samples is None:
        return []
    seen, *counts = (int(np.sum(run.samples[name].to_numpy())) for name in ("seen", *run.columns))
    if not (run.is_guarded and run.columns and seen):
        return [f"  samples  {seen:,}"]
    shares = {f"{column}_fraction": count / seen for column, count in zip(run.columns, counts, strict=True)}
    text = f"  samples  {seen:,}: {shares_text(run.actions, shares)}"
    if AUGMENT not in run.actions:
        return [text]
    extra = sum(row["extra_steps"] for row in run.rounds)
    left = run.summary.get("augment_queue_left")
    queue = f", {left} left in the queues" if left is not None else ""
    return [f"{text} ({extra} extra steps on the copies{queue})"]


def memory_prone_table(run: RunFolder, num_images: int, width: int) -> list[str]:
    """Return the most memory-prone images and how they are ranked; nothing before the first round has ended."""
    if run.samples is None:
        return []
    prone = memory_prone_rows(run, num_images)
    if not prone:
        return [f"Memory-prone images: none, {no_actions(run)}."]
    header = ["", "skip ratio", "seen", *run.columns, "moves", "shard"]
    numbers = [
        [str(number), _percent(row["skip_ratio"]), *(str(row[name]) for name in header[2:])]
        for number, row in enumerate(prone, start=1)
    ]
    room = width - 6 - max(map(display_width, table(header, numbers)))
    files = [one_line(row["file"], min(max(room // 2, MIN_WIDTH), MAX_FILE_WIDTH), keep="end") for row in prone]
    room = max(room - max(map(display_width, files)), MIN_WIDTH)
    rows = [
        [*cells, file, one_line(row["caption"], room)] for cells, file, row in zip(numbers, files, prone, strict=True)
    ]
    return [
        "Most memory-prone images",
        *(f"  {line}" for line in table([*header, "file", "caption"], rows, left=["file", "caption"])),
        *(f"  {line}" for line in textwrap.wrap("; ".join(ranking_sentences(run, len(prone))) + ".", width - 2)),
    ]


def memory_prone_rows(run: RunFolder, num_images: int) -> list[dict[str, Any]]:
    """Return the rows of ``samples.parquet`` of the most memory-prone samples, most memory-prone first."""
    if run.samples is None:
        return []
    seen, unclean = _counts(run)
    order = memory_prone_order(seen, unclean)[:num_images]
    rows: list[dict[str, Any]] = run.samples.take(order).to_pylist()
    for row in rows:  # the launcher does not know both of every script
        row["file"] = row["file"] or f"sample {row['sample_id']}"
        row["caption"] = row["caption"] or ""
    return rows


def ranking_sentences(run: RunFolder, num_listed: int) -> list[str]:
    """Return how the list is ranked, and how much of it chance alone would make."""
    seen, unclean = _counts(run)
    order = memory_prone_order(seen, unclean)
    last = float(memory_prone_score(seen, unclean)[order[num_listed - 1]])
    num_reached = int(np.sum(memory_prone_score(seen, unclean) >= last - 1e-12))
    expected = expected_by_chance(seen, unclean, last)
    rate = unclean.sum() / seen.sum()
    total = " + ".join(run.prone_columns)
    total = f"({total})" if len(run.prone_columns) > 1 else total
    sentences = [
        f"skip ratio = {total} / seen; ranked by {total} / (seen + 1), ties by sample id",
        f"{num_reached:,} of {len(seen):,} images rank as high as the last one here; if every sample were "
        f"{either(run.prone_columns)} at the mean rate of {rate:.0%}, chance would put {expected:,.1f} there",
    ]
    times = f"an image was seen {np.median(seen):g} times (median)"
    if expected >= num_reached:
        sentences.append(f"so this list says nothing yet: {times}")
    elif expected > num_reached / 2:
        sentences.append(f"so more than half of this list may be chance: {times}")
    return sentences


def _counts(run: RunFolder) -> tuple[Counts, Counts]:
    assert run.samples is not None
    seen = run.samples["seen"].to_numpy()
    return seen, sum((run.samples[column].to_numpy() for column in run.prone_columns), np.zeros_like(seen))

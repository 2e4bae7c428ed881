"""`sd-memguard check DIR`: look through a folder of captioned images before anybody trains on it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_memguard.check.findings import Findings, find, repeated_captions
from sd_memguard.check.page import page
from sd_memguard.errors import UserError
from sd_memguard.files import replace_text

CLEAN, FOUND = 0, 1
"""Exit statuses: nothing to mend, something to mend. A folder that cannot be checked at all gives 2."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="sd-memguard check",
        description="Find unreadable and odd images, faulty captions, duplicates and near-duplicates in a folder. The "
        "exit status is 0 where there is nothing to mend, 1 where there is, 2 where the folder cannot be checked.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("train_data_dir", type=Path, metavar="DIR", help="folder of images with metadata or .txt captions")
    add("--output_dir", type=Path, help="receives report.html and check.json; default: nothing is written")
    add("--write_filtered", type=Path, metavar="FILE", help=".txt: files to keep, .jsonl: metadata of what to keep")
    add("--duplicates_flip", action="store_true", help="count flipped images as duplicates")
    add("--resolution", type=int, help="name images with a shorter edge, in pixels")
    add("--max_aspect_ratio", type=float, default=4.0, help="name images that are longer")
    add(
        "--local_features",
        action="store_true",
        help="name large images that share a part: strong crops, one pasted into another; at most 5,000 images, and "
        "needs pip install 'sd-memguard[local-features]'",
    )
    add("--image_column", default="image", help="of the metadata")
    add("--caption_column", default="text", help="of the metadata")
    return parser


def main(argv: Sequence[str]) -> int:
    """Check, print what was found, write what the flags ask for, and return the exit status.

    Raises:
        UserError: The folder cannot be read, or a file cannot be written.
    """
    settings = build_parser().parse_args(argv)
    filtered: Path | None = settings.write_filtered
    if filtered is not None and filtered.suffix not in (".txt", ".jsonl"):
        raise UserError(f"`--write_filtered` must end in .txt or .jsonl, got {filtered}; rename it")
    findings = find(
        settings.train_data_dir,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        flip=settings.duplicates_flip,
        resolution=settings.resolution,
        max_aspect_ratio=settings.max_aspect_ratio,
        local_features=settings.local_features,
    )
    headline = summary(findings)
    print(headline)
    for line in _first(findings):
        print(line)
    if settings.output_dir is not None:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        replace_text(settings.output_dir / "report.html", page(findings, headline))
        replace_text(settings.output_dir / "check.json", json.dumps(as_json(findings), indent=1, ensure_ascii=False))
        print(f"the page to look at: {settings.output_dir / 'report.html'}")
    if filtered is not None:
        replace_text(filtered, filtered_text(findings, as_metadata=filtered.suffix == ".jsonl"))
        print(f"{len(findings.kept):,} of {len(findings.sizes):,} samples to keep: {filtered}")
    return FOUND if findings.unusable or findings.groups or findings.odd or findings.parts else CLEAN


def summary(findings: Findings) -> str:
    """Return what was found in a sentence."""
    exact = sum(group.is_exact for group in findings.groups)
    parts = f" {len(findings.parts):,} pairs share a part." if findings.parts else ""
    surplus = sum(len(group.rows) - 1 for group in findings.groups)
    return (
        f"{len(findings.sizes):,} samples: {len(findings.unusable):,} cannot be used, {surplus:,} repeat others "
        f"({exact:,} groups of equal files, {len(findings.groups) - exact:,} of near-duplicates), "
        f"{len(findings.odd):,} are odd.{parts}{'' if findings.has_captions else ' There are no captions.'}"
    )


def _first(findings: Findings, count: int = 5) -> list[str]:
    lines = []
    for words, faults in (("cannot be used", findings.unusable), ("odd", findings.odd)):
        lines += [f"  {words}: {findings.file(row)}: {fault}" for row, fault in list(faults.items())[:count]]
    for group in findings.groups[:count]:
        names = ", ".join(findings.file(row) for row in group.rows[:3])
        lines.append(f"  {len(group.rows)} times: {names}{', ...' if len(group.rows) > 3 else ''}")
    for part in findings.parts[:count]:
        lines.append(f"  share a part: {', '.join(map(findings.file, part.rows))}")
    return lines


def as_json(findings: Findings) -> dict[str, Any]:
    """Return everything that was found, for scripts; files relative to the folder."""
    return {
        "folder": findings.source.name,
        "num_samples": len(findings.sizes),
        "num_kept": len(findings.kept),
        "unusable": {findings.file(row): words for row, words in findings.unusable.items()},
        "odd": {findings.file(row): words for row, words in findings.odd.items()},
        "duplicates": [
            {
                "exact": group.is_exact,
                "kept": findings.file(group.kept),
                "files": [findings.file(row) for row in group.rows],
            }
            for group in findings.groups
        ],
        "shared_parts": [
            {"files": [findings.file(row) for row in part.rows], "num_matches": part.num_matches}
            for part in findings.parts
        ],
        "repeated_captions": [
            {"caption": caption, "images": images} for caption, images in repeated_captions(findings)
        ],
    }


def filtered_text(findings: Findings, *, as_metadata: bool) -> str:
    """Return the samples to keep: a file a line, or a line of metadata.jsonl for each."""
    lines = []
    for row in findings.kept:
        captions = findings.captions(row)
        text = captions[0] if len(captions) == 1 else captions
        record = {"file_name": findings.file(row), "text": text}
        lines.append(json.dumps(record, ensure_ascii=False) if as_metadata else findings.file(row))
    return "".join(f"{line}\n" for line in lines)

"""Build the captioned demo set: a fine-tuning folder with duplicated images and a held-out folder of the same style.

Web-scraped sets hold some images many times under unrelated file names, and those are what a model memorizes first. So
the first images are written several times, and the rows are shuffled and numbered again. Images that are equal to an
earlier one, under whatever caption, are left out of both folders.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

METADATA, ATTRIBUTES = "metadata.jsonl", "attributes.jsonl"
KEPT_ATTRIBUTES = ("named", "open")


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source_dir", type=Path, required=True, help="Imagefolder with captions and attributes.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Receives train/ and heldout/.")
    parser.add_argument("--num_images", type=int, default=512, help="Distinct images to fine-tune on.")
    parser.add_argument("--num_duplicated", type=int, default=32, help="How many of them, from the first on, repeat.")
    parser.add_argument("--num_copies", type=int, default=16, help="How often each of those is present.")
    parser.add_argument("--num_heldout", type=int, default=256, help="Held-out images, those that follow.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the order of the rows.")
    return parser.parse_args()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the distinct images of an imagefolder in the order of its metadata: path, caption, attributes."""
    lines = {
        name: [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in (METADATA, ATTRIBUTES)
    }
    attributes = {row["file_name"]: {key: row[key] for key in KEPT_ATTRIBUTES} for row in lines[ATTRIBUTES]}
    distinct: dict[bytes, dict[str, Any]] = {}
    for row in lines[METADATA]:
        path = folder / row["file_name"]
        distinct.setdefault(path.read_bytes(), {"path": path, "text": row["text"], **attributes[row["file_name"]]})
    return list(distinct.values())


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Copy the images, byte for byte, to `folder` under running numbers and write their captions and attributes."""
    folder.mkdir(parents=True)
    metadata, attributes = [], []
    for index, row in enumerate(rows):
        name = f"{index:04d}{row['path'].suffix}"
        shutil.copyfile(row["path"], folder / name)
        metadata.append({"file_name": name, "text": row["text"]})
        attributes.append({"file_name": name, **{key: row[key] for key in KEPT_ATTRIBUTES}})
    for name, lines in ((METADATA, metadata), (ATTRIBUTES, attributes)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Build both folders."""
    args = parse_args()
    rows = read_rows(args.source_dir)
    train, heldout = rows[: args.num_images], rows[args.num_images : args.num_images + args.num_heldout]
    train = train + train[: args.num_duplicated] * (args.num_copies - 1)
    random.Random(args.seed).shuffle(train)
    write_rows(train, args.output_dir / "train")
    write_rows(heldout, args.output_dir / "heldout")


if __name__ == "__main__":
    main()

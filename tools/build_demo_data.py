"""Build the captioned demo set: a fine-tuning folder with repeated images and a held-out folder of the same style.

Scraped sets hold some images many times under unrelated names, and those are what a model memorizes first. The
first images of the source are therefore written several times, and the rows are shuffled and numbered again. A
held-out image that is also a training image, under whatever caption, is left out.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

METADATA = "metadata.jsonl"


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--train_dir", type=Path, required=True, help="Imagefolder to fine-tune on.")
    parser.add_argument("--heldout_dir", type=Path, required=True, help="Imagefolder never to be trained on.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Receives train/ and heldout/.")
    parser.add_argument("--num_repeated", type=int, default=32, help="How many images, from the first on, repeat.")
    parser.add_argument("--num_copies", type=int, default=16, help="How often each of those is present.")
    parser.add_argument("--num_heldout", type=int, default=256, help="How many held-out images, from the first on.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the order of the rows.")
    return parser.parse_args()


def read_rows(folder: Path) -> list[tuple[Path, str]]:
    """Return the images and captions of an imagefolder, in the order of its metadata."""
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    return [(folder / row["file_name"], row["text"]) for row in map(json.loads, lines)]


def write_rows(rows: list[tuple[Path, str]], folder: Path) -> None:
    """Copy the images, byte for byte, to `folder` under running numbers and write their metadata."""
    folder.mkdir(parents=True)
    with (folder / METADATA).open("w", encoding="utf-8") as metadata:
        for index, (image, caption) in enumerate(rows):
            file_name = f"{index:04d}{image.suffix}"
            shutil.copyfile(image, folder / file_name)
            metadata.write(json.dumps({"file_name": file_name, "text": caption}, ensure_ascii=False) + "\n")


def main() -> None:
    """Build both folders."""
    args = parse_args()
    rows = read_rows(args.train_dir)
    trained_on = {image.read_bytes() for image, _ in rows}
    heldout = [row for row in read_rows(args.heldout_dir) if row[0].read_bytes() not in trained_on]
    rows += rows[: args.num_repeated] * (args.num_copies - 1)
    random.Random(args.seed).shuffle(rows)
    write_rows(rows, args.output_dir / "train")
    write_rows(heldout[: args.num_heldout], args.output_dir / "heldout")


if __name__ == "__main__":
    main()

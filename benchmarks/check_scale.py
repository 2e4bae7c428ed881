"""What `sd-memguard check` costs for many images: time and peak memory, from reading the folder to the written page.

Images of 64 x 64 pixels are made of the bundled ones: a part of one, flipped or not, its hue turned, with a part of
another in it. One in a hundred is a byte-equal copy of an earlier one, four in a hundred are slightly cropped and
recompressed; the share of both that is found is told. Each size runs in a process of its own.

    python -m benchmarks.check_scale --output_dir runs/check_scale --num_images 20000 50000 100000

Seconds are those of the processor, of all threads together, and memory is the peak resident set, that of the
interpreter and its libraries included. The last line is the straight line through the measured sizes, at a million
images: a projection, not a measurement. Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.verification import as_jpeg, crop, read_distinct, turn_hue
from sd_memguard.assets import demo_data_path

SIDE, PER_FOLDER, SEED = 64, 1000, 0
EQUAL, CHANGED = 100, 25
"""Every so many images one is equal to an earlier one, or changed from one."""
PROJECTED = 1_000_000


def make_image(sources: list[Image.Image], rng: random.Random) -> Image.Image:
    """Return an image that there is only once."""
    one, other = rng.sample(sources, 2)
    edge = rng.randint(36, 52)
    left, top = rng.randint(0, SIDE - edge), rng.randint(0, SIDE - edge)
    image = one.crop((left, top, left + edge, top + edge)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = turn_hue(ImageOps.mirror(image) if rng.random() < 0.5 else image, rng.uniform(-180, 180))
    part = other.resize((rng.randint(16, 32), rng.randint(16, 32)), Image.Resampling.BICUBIC)
    image.paste(part, (rng.randint(0, SIDE - part.width), rng.randint(0, SIDE - part.height)))
    return image


def make_folder(folder: Path, count: int) -> dict[str, str]:
    """Fill a folder, and return of each planted copy the original."""
    rng, sources = random.Random(SEED), read_distinct(demo_data_path())
    names: list[str] = []
    lines: list[str] = []
    copies: dict[str, str] = {}
    for number in range(count):
        name = f"{number // PER_FOLDER:04}/{number:07}.png"
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if names and number % EQUAL == 0:
            original = rng.choice(names)
            file.write_bytes((folder / original).read_bytes())
            copies[name] = original
        elif names and number % CHANGED == 0:
            original = rng.choice(names)
            with Image.open(folder / original) as image:
                as_jpeg(crop(image.convert("RGB"), 0.03, rng), 80).save(file)
            copies[name] = original
        else:
            make_image(sources, rng).save(file)
            names.append(name)
        lines.append(json.dumps({"file_name": name, "text": f"image number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return copies


def measure(folder: Path, copies: dict[str, str], output_dir: Path) -> dict[str, Any]:
    """Check a folder in a process of its own, and return what it took and found."""
    command = [sys.executable, "-m", "sd_memguard", "check", str(folder), "--output_dir", str(output_dir)]
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 1:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    report = json.loads((output_dir / "check.json").read_text(encoding="utf-8"))
    group_of = {file: number for number, group in enumerate(report["duplicates"]) for file in group["files"]}
    found = [copy in group_of and group_of[copy] == group_of.get(original) for copy, original in copies.items()]
    planted = set(copies) | set(copies.values())
    return {
        "images": report["num_samples"],
        "seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "clock_seconds": round(seconds, 1),
        "peak_mb": round(usage.ru_maxrss / 1e3),
        "planted": len(copies),
        "found": round(float(np.mean(found)), 4),
        "groups": len(report["duplicates"]),
        "groups_without_a_planted_copy": sum(not planted & set(one["files"]) for one in report["duplicates"]),
        "html_mb": round((output_dir / "report.html").stat().st_size / 1e6, 1),
        "json_mb": round((output_dir / "check.json").stat().st_size / 1e6, 1),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="receives images, reports and results.json")
    parser.add_argument("--num_images", type=int, nargs="+", default=[20_000, 50_000, 100_000])
    args = parser.parse_args()
    rows = []
    for count in args.num_images:
        folder = args.output_dir / f"images-{count}"
        planted = args.output_dir / f"planted-{count}.json"
        if not planted.exists():
            planted.parent.mkdir(parents=True, exist_ok=True)
            planted.write_text(json.dumps(make_folder(folder, count)))
        rows.append(measure(folder, json.loads(planted.read_text()), args.output_dir / f"report-{count}"))
        print(json.dumps(rows[-1]), flush=True)
    (args.output_dir / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    if len(rows) > 1:
        print(projection(rows))


def projection(rows: list[dict[str, Any]]) -> str:
    """Return the straight lines through the measured sizes, and the exponent of the time, in words."""
    counts = np.array([row["images"] for row in rows], float)
    seconds, memory = (np.array([row[name] for row in rows], float) for name in ("seconds", "peak_mb"))
    (per_image, fixed), (mb_per_image, fixed_mb) = (np.polyfit(counts, values, 1) for values in (seconds, memory))
    exponent = np.polyfit(np.log(counts), np.log(seconds), 1)[0]
    return (
        f"{1e3 * per_image:.2f} ms and {1e3 * mb_per_image:.2f} kB an image; the time grows with the power "
        f"{exponent:.2f} of their number; projected to {PROJECTED:,}: "
        f"{(fixed + per_image * PROJECTED) / 3600:.1f} hours of one core, "
        f"{(fixed_mb + mb_per_image * PROJECTED) / 1e3:.1f} GB"
    )


if __name__ == "__main__":
    main()

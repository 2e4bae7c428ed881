"""Peak memory and time of the audit's exact search, and its results against a brute-force check.

By default 10,000 queries against 1,000,000 gallery vectors of 512 that lie in a memory-mapped float16 file:

    python benchmarks/search_memory.py --output_dir runs/search_memory

It needs 1 GB of disk. Linux only: anonymous memory is read from /proc.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np
import torch

from sd_memguard.audit.metrics.similarity import best_matches, cosine

ROWS_PER_BLOCK = 4096
LIMIT_BYTES = 2 * 1024**3
NUM_CHECKED = 20


class PeakMemory(threading.Thread):
    """Samples this process's anonymous active memory every 5 ms and keeps the highest value, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * kibibytes)
            time.sleep(0.005)


def make_gallery(file: Path, count: int, width: int, generator: torch.Generator) -> None:
    """Write unit vectors in float16."""
    gallery = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(count, width))
    for start in range(0, count, ROWS_PER_BLOCK):
        rows = torch.randn(min(ROWS_PER_BLOCK, count - start), width, generator=generator)
        gallery[start : start + len(rows)] = torch.nn.functional.normalize(rows, dim=1).half().numpy()
    gallery.flush()


def main() -> None:
    """Measure, check, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_queries", type=int, default=10_000)
    parser.add_argument("--num_gallery", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    file = args.output_dir / "gallery.npy"
    make_gallery(file, args.num_gallery, args.width, generator)
    queries = torch.nn.functional.normalize(torch.randn(args.num_queries, args.width, generator=generator), dim=1)
    gallery = torch.from_numpy(np.load(file, mmap_mode="c"))
    memory, start = PeakMemory(), time.monotonic()
    found = best_matches(queries, gallery.split(ROWS_PER_BLOCK), 1, cosine)
    seconds, peak = time.monotonic() - start, memory.peak
    checked = queries[:NUM_CHECKED]
    slow = torch.cat([checked @ block.float().T for block in gallery.split(ROWS_PER_BLOCK)], 1).max(1)
    figures = {
        "queries": args.num_queries,
        "gallery": args.num_gallery,
        "width": args.width,
        "seconds": round(seconds, 1),
        "peak_anonymous_bytes": peak,
        "within_limit": peak < LIMIT_BYTES,
        "nearest_agree": bool((slow.indices == found.indices[:NUM_CHECKED, 0]).all()),
    }
    (args.output_dir / "results.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))
    file.unlink()


if __name__ == "__main__":
    main()

"""What millions of samples cost: start-up, shards, a round's end and the records, in seconds and memory.

Synthetic rows without images: names and captions in Arrow arrays as the readers make them, one sample in a hundred in
a group of duplicates, a tenth of the samples skipped. Everything runs in this process; seconds are its processor's, and
memory is anonymous memory: its growth over a stage, and its peak within it.

    python -m benchmarks.scale --output_dir runs/scale

What grows with the images themselves (decoding, thumbnails, hashing of files) is not in here. Linux only.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.memory_sd15 import PeakMemory
from sd_memguard.config import GuardConfig, make_train_config
from sd_memguard.core.sampler import ShardSampler
from sd_memguard.data.captions import Captions
from sd_memguard.data.samples import Samples
from sd_memguard.guard import MemorizationGuard
from sd_memguard.proxies.state_file import load_state, save_state
from sd_memguard.runs.records import RunRecords

NUM_SHARDS, BATCH, SEED = 4, 16, 0
ROWS_AT_ONCE = 1_000_000


class Stages:
    """Runs one stage after the other and keeps what each took."""

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.rows: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what a stage returns."""
        before = self.memory.now()
        self.memory.peak = before
        start = time.process_time()
        result = work()
        seconds = time.process_time() - start
        self.memory.peak = max(self.memory.peak, self.memory.now())
        kept, peak = (1e-6 * (size - before) for size in (self.memory.now(), self.memory.peak))
        self.rows[name] = {"seconds": round(seconds, 3), "kept_mb": round(kept), "peak_mb": round(peak)}
        print(f"| {name} | {seconds:.2f} | {kept:.0f} | {peak:.0f} |", flush=True)
        return result


def make_samples(num_samples: int) -> Samples:
    """Return captioned samples without images, as many captions as samples."""
    files, captions = [], []
    for start in range(0, num_samples, ROWS_AT_ONCE):
        numbers = range(start, min(start + ROWS_AT_ONCE, num_samples))
        files.append(pa.array([f"part-{n // 1000:05}/{n:08}.jpg" for n in numbers], pa.large_string()))
        texts = [[f"a photograph of thing number {n}"] for n in numbers]
        captions.append(pa.array(texts, pa.large_list(pa.large_string())))
    groups = np.arange(num_samples)
    twins = np.arange(99, num_samples, 100)
    groups[twins] = twins - 1
    sizes = np.full((num_samples, 2), 512, np.int32)
    names, texts = pa.concat_arrays(files), pa.concat_arrays(captions)
    no_images: Any = None
    return Samples("synthetic", num_samples, np.arange(num_samples), sizes, [], names, texts, no_images, groups)


def record_samples(guard: MemorizationGuard, num_batches: int) -> None:
    """Count batches of samples as a step does."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(num_batches):
        ids = torch.randint(guard.plan.assignment.numel(), (BATCH,), generator=generator)
        skip = torch.rand(BATCH, generator=generator) < 0.1
        guard.ledger.record(ids, skip.long())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of scale.json")
    parser.add_argument("--num_samples", type=int, default=10_000_000)
    settings = parser.parse_args()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    stages, count = Stages(), settings.num_samples
    print(f"{count:,} samples\n\n| stage | seconds | memory kept, MB | peak, MB |\n|---|---|---|---|")
    samples = stages.run("rows: names and captions", lambda: make_samples(count))
    dropout = make_train_config(pretrained="bundled", train_data_dir="bundled", caption_dropout=0.1)
    captions = stages.run("captions as numbers", lambda: Captions(samples, dropout, SEED))
    stages.run("content hashes of the captions", captions.keys)
    del captions
    config = GuardConfig(num_shards=NUM_SHARDS, seed=SEED)
    groups = torch.from_numpy(samples.groups)
    guard = stages.run("guard: shards and ledger", lambda: MemorizationGuard(config, count, groups=groups))
    sampler = ShardSampler(0)
    stages.run(
        "order of a shard's pass, 1000 steps of it",
        lambda: sampler.peek(guard.plan.members(0), 1000 * BATCH, SEED),
    )
    stages.run("ledger: 1000 batches", lambda: record_samples(guard, 1000))
    guard.ledger.skips[torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.1] += 1
    stages.run("redistribution", guard.redistribute)
    with tempfile.TemporaryDirectory() as folder:
        stages.run("state of the guard, written", lambda: save_state(guard.state_dict(), Path(folder), "state"))
        stages.run("and read", lambda: guard.load_state_dict(load_state(Path(folder), "state")))
        records = RunRecords(Path(folder))
        stages.run("samples.parquet", lambda: records.write_samples(samples, guard))
    record = {"num_samples": count, "stages": stages.rows}
    (settings.output_dir / "scale.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

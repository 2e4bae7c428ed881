"""What a checkpoint costs: seconds, and new bytes on disk, for offloaded proxies in RAM and on disk.

    python -m benchmarks.saving --output_dir runs/saving

A UNet with the blocks of SD 1.5 and random weights trains with four full-weight proxies and saves after every step, so
that each checkpoint shows what one more costs when another proxy has become the active one: the most that the disk
store can cost. A proxy is its weights and AdamW's two moments; 40 GB of disk are needed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_sd15 import make_pipeline
from sd_memguard.config import make_train_config
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.training.run_state import RunState
from sd_memguard.training.trainer import train

NUM_SHARDS, STEPS = 4, 8


def new_bytes(folders: list[Path]) -> list[int]:
    """Return for each folder, in order, the bytes of its files that none of those before it links to."""
    seen: set[int] = set()
    sizes = []
    for folder in folders:
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        sizes.append(sum(file.st_size for file in files if file.st_ino not in seen))
        seen |= {file.st_ino for file in files}
    return sizes


def save_often(pipeline: Path, folder: Path, proxy_store: str) -> dict[str, Any]:
    """Train with a checkpoint after every step, and return what the checkpoints cost."""
    seconds: list[float] = []
    save = RunState.save_checkpoint

    def timed(state: RunState, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = save(state, *arguments)
        seconds.append(time.perf_counter() - start)
        return result

    RunState.save_checkpoint = timed  # type: ignore[method-assign,assignment]
    try:
        train(
            make_train_config(
                pretrained_model_name_or_path=str(pipeline),
                train_data_dir="bundled",
                max_train_samples=16,
                resolution=64,
                center_crop=True,
                output_dir=str(folder),
                train_batch_size=1,
                max_train_steps=STEPS,
                num_shards=NUM_SHARDS,
                steps_per_round=1,
                proxy_store=proxy_store,
                checkpointing_steps=1,
                seed=0,
            )
        )
    finally:
        RunState.save_checkpoint = save  # type: ignore[method-assign]
    checkpoints = list_checkpoints(folder)
    full = sum(path.stat().st_size for path in checkpoints[-1].rglob("*") if path.is_file())
    unet = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    return {
        "proxy_store": proxy_store,
        "unet_bytes": unet,
        "checkpoint_in_unets": round(full / unet, 2),
        "new_in_unets": round(statistics.median(new_bytes(checkpoints)[NUM_SHARDS:]) / unet, 2),
        "seconds": round(statistics.median(seconds), 2),
        "seconds_per_new_gigabyte": round(
            statistics.median(seconds) / (statistics.median(new_bytes(checkpoints)[NUM_SHARDS:]) / 1e9), 2
        ),
    }


def main() -> None:
    """Measure both stores and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the runs and the figures go")
    parser.add_argument("--base_channels", type=int, default=96, help="width of the UNet; SD 1.5 has 320")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = options.output_dir / "pipeline"
    if not (pipeline / "model_index.json").exists():
        make_pipeline(pipeline, options.base_channels)
    rows = [save_often(pipeline, options.output_dir / store, store) for store in ("ram", "disk")]
    (options.output_dir / "figures.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"UNet of {rows[0]['unet_bytes'] / 4e6:.0f}M parameters, {NUM_SHARDS} full-weight proxies\n")
    print("| proxy store | checkpoint, in UNets | new on disk, in UNets | seconds | seconds per new GB |")
    print("|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row['checkpoint_in_unets']} | {row['new_in_unets']}"
        print(f"| {row['proxy_store']} | {sizes} | {row['seconds']} | {row['seconds_per_new_gigabyte']} |")


if __name__ == "__main__":
    main()

"""Checks what is claimed for a GPU: a row of PASS, FAIL or SKIP for each claim, with figures, and a JSON file.

    python -m benchmarks.gpu_acceptance --window 1 --output_dir runs/gpu
    python -m benchmarks.gpu_acceptance --window 1 --check resume --check host_waits --output_dir runs/gpu

Window 1: the bundled model; 2: processes and diffusers' scripts; 3: the sizes of SD 1.5 and SDXL. Each is made to end
within ten minutes on one H100. Without a GPU it runs what a CPU can and says what is open. docs/gpu.md says more.
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch

from benchmarks.gpu_acceptance import processes, sizes, training
from benchmarks.gpu_acceptance.rows import Place, run_checks
from sd_memguard.console import configure_logging

WINDOWS = {1: training.CHECKS, 2: processes.CHECKS, 3: sizes.CHECKS}


def main() -> None:
    """Run the checks of a window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, choices=WINDOWS, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of window-N.json")
    parser.add_argument("--check", action="append", metavar="NAME", help="run this check alone; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names of the window's checks and end")
    parser.add_argument("--diffusers_examples", type=Path, help="folder `examples` of a checkout of diffusers")
    parser.add_argument("--seconds", type=float, default=540, help="after which no further check begins")
    settings = parser.parse_args()
    checks = WINDOWS[settings.window]
    names = [check.name for check in checks]
    if settings.list:
        print("\n".join(names))
        return
    if unknown := set(settings.check or ()) - set(names):
        parser.error(f"no check of window {settings.window} has the name {min(unknown)}; it has {', '.join(names)}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # by which resumed runs can be the same to the bit
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    configure_logging()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU here: what a CPU can do is run, and the rest stays open", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), device, settings.diffusers_examples)
        chosen = [check for check in checks if settings.check is None or check.name in settings.check]
        report = settings.output_dir / f"window-{settings.window}.json"
        rows = run_checks(chosen, place, report, settings.seconds)
    counts = Counter(row["status"] for row in rows)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} open; figures in {report}")
    raise SystemExit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    main()

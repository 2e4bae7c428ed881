"""Runs diffusers' training scripts plain and under the launcher on tiny pipelines, and prints a table of them.

    python -m benchmarks.upstream_scripts path/to/diffusers/examples [--only train_dreambooth.py ...] [--work DIR]

Each script is run for the same steps from the same seed: plain; under a neutral guard, whose losses and final weights
have to be the plain ones; under the full guard; and, where a case says so, under the full guard from the checkpoint
that this run has left halfway, which has to end in the same weights. Needs the scripts' own requirements (those for IP
adapters the package `ip_adapter` of tencent-ailab/IP-Adapter on the path), no GPU, no network. With `--refused` the
scripts that are refused by their source are started instead, and timed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.script_runs import load_libraries, run_script
from benchmarks.upstream_cases import CASES, HALF, Case, command_of, make_data

NEUTRAL = ["--memguard", "off"]
SURVEY = Path(__file__).parents[1] / "tests" / "fixtures" / "diffusers_scripts.json"
"""What is known of every script: whether it is guarded, or refused and at which stage."""


def losses(output: Path, log: Path) -> list[float]:
    """Return the losses that a script has logged, or printed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for events in sorted(output.rglob("events.out.tfevents.*")):
        scalars = EventAccumulator(str(events)).Reload()
        for tag in ("train_loss", "loss"):
            if tag in scalars.Tags()["scalars"]:
                return [event.value for event in scalars.Scalars(tag)]
    return [float(found) for found in re.findall(r"step_loss: ([\d.e-]+)", log.read_text(encoding="utf-8"))]


def equal(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Say whether tensors are equal to the bit; files may differ in the order of their metadata."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def outputs(output: Path) -> set[str]:
    """Return the names of what a script has left, but for its logs and for what the guard adds."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    names = {name.replace(output.name, "output") for name in names}  # some scripts call files by their folder
    return {name for name in names if "memguard/" not in name and not name.startswith("logs/")}


def weights_of(output: Path) -> dict[str, Tensor]:
    """Return all tensors that a script has left, those of its last checkpoint where there are no others."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    files = {path for path in output.rglob("*.safetensors") if "memguard" not in path.parts}
    within = {path for folder in checkpoints for path in folder.rglob("*.safetensors")}
    last = {path for path in within & files if path.is_relative_to(checkpoints[-1])} if checkpoints else set()
    chosen = files - within or last
    loaded = {path.relative_to(output).as_posix().replace(output.name, "output"): load_file(path) for path in chosen}
    return {f"{path}:{name}": value for path, tensors in loaded.items() for name, value in tensors.items()}


def row_of(case: Case, examples: Path, work: Path) -> str:
    """Run a script in its ways and return its row of the table."""
    script, stem = examples / case.script, "-".join(Path(case.script).with_suffix("").parts[-2:])
    ways: dict[str, Sequence[str] | None] = {"plain": None, "neutral": NEUTRAL, "guarded": case.guard}
    if case.resumed:
        ways["resumed"] = case.guard
    folders = {way: work / f"{stem}-{way}" for way in ways}
    cells, closing = [f"`{case.script}` {' '.join(case.flags)}".strip()], ""
    for way, guard in ways.items():
        shutil.rmtree(folders[way], ignore_errors=True)
        flags = command_of(case, script.read_text(encoding="utf-8"), work, folders[way])
        if way == "resumed":
            shutil.copytree(folders["guarded"] / f"checkpoint-{HALF}", folders[way] / f"checkpoint-{HALF}")
            flags += ["--resume_from_checkpoint", "latest"]
        status, text = run_script(script, flags, guard)
        (work / f"{stem}-{way}.log").write_text(text, encoding="utf-8")
        if status:
            lines = [line for line in text.splitlines() if line.strip()]
            errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): |error: ", line)]
            return f"| {cells[0]} | {way} ends with status {status}: {(errors or lines or ['nothing'])[-1][:300]} |"
        if way == "guarded":
            closing = next(line.split("memguard: ")[1] for line in text.splitlines() if "batches judged" in line)
    weights = {way: weights_of(folder) for way, folder in folders.items()}
    logged = {way: losses(folder, work / f"{stem}-{way}.log") for way, folder in folders.items()}
    cells += [
        f"{len(logged['plain'])} losses {'equal' if logged['neutral'] == logged['plain'] else 'DIFFER'}, "
        f"{len(weights['plain'])} tensors {'identical' if equal(weights['neutral'], weights['plain']) else 'DIFFER'}",
        closing,
        "same" if outputs(folders["plain"]) == outputs(folders["guarded"]) else "DIFFER",
        ("identical" if equal(weights["resumed"], weights["guarded"]) else "DIFFERS") if case.resumed else "",
    ]
    return f"| {' | '.join(cells)} |"


def refusals(examples: Path) -> None:
    """Start each script that is refused by its source in a process of its own, and print a row of the table for it."""
    print("| script | status | seconds of the processor | by the clock | reason |")
    print("|---|---|---|---|---|")
    for row in json.loads(SURVEY.read_text(encoding="utf-8"))["scripts"]:
        if row["stage"] == "source":
            command = [sys.executable, "-m", "sd_memguard.run", str(examples / row["script"])]
            before, start = os.times(), time.perf_counter()
            ended = subprocess.run(command, capture_output=True, text=True)
            after, clock = os.times(), time.perf_counter() - start
            used = after.children_user + after.children_system - before.children_user - before.children_system
            reason = (ended.stderr.strip().splitlines() or ["none"])[-1]
            print(f"| `{row['script']}` | {ended.returncode} | {used:.2f} | {clock:.2f} | {reason} |", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="the folder `examples` of a checkout of diffusers")
    parser.add_argument("--only", nargs="*", help="ends of paths of scripts")
    parser.add_argument("--work", type=Path, help="folder for data, outputs and logs; a temporary one by default")
    parser.add_argument("--refused", action="store_true", help="start the scripts that are refused by their source")
    arguments = parser.parse_args()
    if arguments.refused:
        refusals(arguments.examples)
        return
    work = (arguments.work or Path(tempfile.mkdtemp())).resolve()
    work.mkdir(parents=True, exist_ok=True)
    examples = arguments.examples.resolve()
    os.chdir(work)
    load_libraries()
    from benchmarks.tiny_pipelines import make  # not before: the libraries read at import that they are offline

    if not (work / "images").exists():
        make_data(work)
    print("| script | off against plain | guarded | files | resumed = uninterrupted |")
    print("|---|---|---|---|---|", flush=True)
    for case in CASES:
        if arguments.only is None or any(case.script.endswith(name) for name in arguments.only):
            for name in (case.pipeline, *(["image_encoder"] if case.data == "image_prompts" else [])):
                if not (work / name).exists():
                    make(name, work / name)
            print(row_of(case, examples, work), flush=True)


if __name__ == "__main__":
    main()

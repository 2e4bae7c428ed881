r"""Runs diffusers' own tests of its training scripts, as they are and under the launcher, and prints a table of passes.

    python -m benchmarks.upstream_tests path/to/diffusers [--work DIR] [--files test_dreambooth.py ...] [-k EXPRESSION]

The tests are those of the checkout (`examples/*/test_*.py`); names of the hub in them are replaced by tiny local
pipelines of random weights and by images of the demo. The scripts run in forks of one process that has loaded the
libraries: what a test starts by `accelerate launch` gets the same command line here. Needs the scripts' own
requirements, no GPU, no network.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.script_runs import load_libraries, run_script

PIPELINES = {
    "tiny-stable-diffusion-torch": "sd",
    "tiny-stable-diffusion-xl-pipe": "sdxl",
    "tiny-sdxl-pipe": "sdxl",
    "tiny-playground-v2-5-pipe": "edm_sdxl",
    "tiny-sd3-pipe": "sd3",
    "tiny-sd35-pipe": "sd3",
    "tiny-flux-pipe": "flux",
    "tiny-flux-kontext-pipe": "kontext",
    "tiny-flux2-klein": "flux2_klein",
    "tiny-qwenimage-pipe": "qwen_image",
    "tiny-sana-pipe": "sana",
    "tiny-lumina2-pipe": "lumina2",
    "tiny-hidream-i1-pipe": "hidream",
    "tiny-random-LlamaForCausalLM": "llama",
    "tiny-controlnet": "controlnet",
    "diffusers/ddpm_dummy": "ddpm",
}
"""Names of the hub, and the tiny pipeline that takes the place of each."""
DATASETS = {"dummy_image_text_data": 8, "dummy_image_class_data": 6, "instructpix2pix-10-samples": 10, "fill10": 10}
"""Datasets of the hub, and how many images take the place of each: as many, so that steps and checkpoints agree."""
INSTANCE_IMAGES = "docs/source/en/imgs"
WAYS = ("plain", "guarded")
LAUNCH_WORDS = 4
"""`accelerate launch --config_file FILE`, before the script."""


def prepare(checkout: Path, work: Path) -> Path:
    """Copy the examples with their tests to a folder, with local names in place of the hub's, and return it."""
    from benchmarks.tiny_pipelines import make

    hub, copy = work / "hub", work / "checkout"
    for name in sorted(set(PIPELINES.values())):
        if not (hub / name).exists():
            make(name, hub / name)
    for name, count in DATASETS.items():
        if not (hub / name).exists():
            _write_images(hub / name, count, edits=name.startswith("instructpix2pix"))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkout / "examples", copy / "examples", ignore=shutil.ignore_patterns("research_projects"))
    _write_images(copy / INSTANCE_IMAGES, 5)
    (copy / INSTANCE_IMAGES / "metadata.jsonl").unlink()
    for file in copy.glob("examples/**/test_*.py"):
        text = file.read_text(encoding="utf-8")
        for name in PIPELINES:
            text = re.sub(rf"(hf-internal-testing/)?{re.escape(name)}\b(?!-)", str(hub / PIPELINES[name]), text)
        for name in DATASETS:
            text = text.replace(f"hf-internal-testing/{name}", str(hub / name))
        file.write_text(text, encoding="utf-8")
    return copy


def _write_images(folder: Path, count: int, *, edits: bool = False) -> None:
    """Write images with captions; with ``edits`` a table of pairs and what was done to them."""
    from sd_memguard import assets

    source = assets.demo_data_path()
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    folder.mkdir(parents=True, exist_ok=True)
    if edits:
        import datasets
        from PIL import Image

        images = [Image.open(source / row["file_name"]).convert("RGB") for row in rows]
        table = {"input_image": images, "edit_prompt": [row["text"] for row in rows], "edited_image": images[::-1]}
        datasets.Dataset.from_dict(table).to_parquet(folder / "train.parquet")
        return
    for number, row in enumerate(rows):
        shutil.copy(source / row["file_name"], folder / f"{number:03}.png")
    texts = [json.dumps({"file_name": f"{number:03}.png", "text": row["text"]}) for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")


class Runs:
    """The plugin of pytest: runs each test in both ways, and keeps what came of them.

    Attributes:
        outcomes: of each test by way; None: passed, else why it failed.
    """

    def __init__(self, guard_flags: Sequence[str]) -> None:
        self.guard_flags = list(guard_flags)
        self.way = WAYS[0]
        self.last_output = ""
        self.outcomes: dict[str, dict[str, str | None]] = defaultdict(dict)

    @pytest.fixture(autouse=True, params=WAYS)
    def _way(self, request: pytest.FixtureRequest) -> None:
        self.way, self.last_output = request.param, ""

    def run_command(self, command: Sequence[str], return_stdout: bool = False) -> str | None:
        """Run what a test has started, in a fork.

        Raises:
            RuntimeError: it has failed.
        """
        script, *flags = command[LAUNCH_WORDS:]
        status, self.last_output = run_script(script, flags, self.guard_flags if self.way == "guarded" else None)
        if status:
            raise RuntimeError(f"{script} ended with {status}:\n{self.last_output}")
        return self.last_output if return_stdout else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what came of a test."""
        if report.when != "call" and not report.failed:
            return
        file, _, name = report.nodeid.rpartition("/")[2].partition("::")
        test, _, way = name.rstrip("]").rpartition("[")
        self.outcomes[f"{file}::{test}"][way] = self._reason(report) if report.failed else None

    def _reason(self, report: pytest.TestReport) -> str:
        lines = [line.strip() for line in self.last_output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1]
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
        return lines[-1] if message.startswith("RuntimeError") and lines else message.splitlines()[0]


def table(outcomes: dict[str, dict[str, str | None]]) -> str:
    """Return a row for each file of tests: how many pass in each way, and why tests fail."""
    files = defaultdict(list)
    for test, ways in outcomes.items():
        files[test.partition("::")[0]].append(ways)
    rows = ["| tests | number | upstream passes | under the launcher | why not |", "|---|---|---|---|---|"]
    for file, tests in sorted(files.items()):
        passes = [sum(ways.get(way, "not run") is None for ways in tests) for way in WAYS]
        reasons = {f"{way}: {why[:300]}" for ways in tests for way in WAYS if (why := ways.get(way))}
        rows.append(f"| `{file}` | {len(tests)} | {passes[0]} | {passes[1]} | {'; '.join(sorted(reasons))} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> Runs:
    """Run what the command line asks for, print the table, and return the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers; its examples are used")
    parser.add_argument("--work", type=Path, help="folder for pipelines and copies; a temporary one by default")
    parser.add_argument("--files", nargs="*", help="names of test files; all by default")
    parser.add_argument("-k", default="", help="pytest's expression that chooses tests")
    parser.add_argument("--guard", default="", help="flags of the guard, in one word")
    arguments = parser.parse_args(argv)
    work = (arguments.work or Path(tempfile.mkdtemp())).resolve()
    copy = prepare(arguments.checkout.resolve(), work)
    files = [
        file for file in copy.glob("examples/*/test_*.py") if arguments.files is None or file.name in arguments.files
    ]
    runs = Runs(arguments.guard.split())
    back = Path.cwd()
    os.chdir(copy)
    sys.path.insert(0, str(copy / "examples"))
    try:
        import test_examples_utils  # the tests take `run_command` from it when they are imported

        test_examples_utils.run_command = runs.run_command
        load_libraries()
        options = [
            "-q",
            "--no-header",
            "--noconftest",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "--tb=no",
            f"--rootdir={copy}",
            "-c",
            os.devnull,
        ]
        pytest.main([*options, "-k", arguments.k, *map(str, sorted(files))], plugins=[runs])
    finally:
        os.chdir(back)
        sys.path.remove(str(copy / "examples"))
    (work / "outcomes.json").write_text(json.dumps(runs.outcomes, indent=1), encoding="utf-8")
    print(table(runs.outcomes))
    return runs


if __name__ == "__main__":
    main()

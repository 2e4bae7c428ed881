"""Install a built wheel into a clean environment, run the demo there, and remove it again.

    python -m build && python tools/check_distribution.py dist

The demo takes a few steps only: that its programs, models, images and templates are all in the wheel is what counts.
The checkout is out of reach: the commands run in an empty folder with an isolated Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

MAX_MEGABYTES = 20
"""Of the wheel and of the source archive; the bundled model takes 14 of them."""
WANTED = {"sd_memguard", "sd_memguard.egg-info", "PKG-INFO", "pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md"}
WANTED |= {"LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}
"""What the archives hold at their top, besides the wheel's folder of metadata."""


def main() -> None:
    """Check the one wheel and the one source archive of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheel and the source archive are")
    parser.add_argument("--steps", default="4", help="optimizer steps of each of the demo's fine-tunes")
    arguments = parser.parse_args()
    (wheel,), (source,) = (list(arguments.folder.glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as zipped:
        check_contents(wheel, [name for name in zipped.namelist() if ".dist-info/" not in name])
    with tarfile.open(source) as packed:
        check_contents(source, [name.partition("/")[2] for name in packed.getnames() if "/" in name])
    with tempfile.TemporaryDirectory() as folder:
        run_demo(wheel.resolve(), Path(folder), arguments.steps)


def check_contents(archive: Path, names: list[str]) -> None:
    """Refuse an archive that is large, or holds what users do not need."""
    size = archive.stat().st_size / 1e6
    unwanted = [name for name in names if name.split("/")[0] not in WANTED or name.endswith((".pyc", ".DS_Store"))]
    print(f"{archive.name}: {size:.1f} MB, {len(names)} files", flush=True)
    if size > MAX_MEGABYTES:
        raise SystemExit(f"{archive.name} must be at most {MAX_MEGABYTES} MB")
    if unwanted:
        raise SystemExit(f"{archive.name} holds what users do not need: {', '.join(unwanted[:5])}")


def run_demo(wheel: Path, folder: Path, steps: str) -> None:
    """Install the wheel with what it needs for everything, run the demo, and uninstall it."""
    venv.create(folder / "env", with_pip=True)
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = str(programs / "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    (folder / "empty").mkdir()

    def run(*command: str) -> str:
        start = time.monotonic()
        done = subprocess.run(command, cwd=folder / "empty", env=environment, stdout=subprocess.PIPE, text=True)
        print(f"{' '.join(command[1:])[:80]}: {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            sys.exit(done.stdout + f"\n{' '.join(command)} ended with status {done.returncode}")
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[all]")
    place = run(python, "-c", "import sd_memguard; print(sd_memguard.__file__)").strip()
    if not Path(place).is_relative_to(folder.resolve()):
        raise SystemExit(f"the package was imported from {place}, not from the wheel")
    program = str(programs / "sd-memguard")
    run(program, "demo", "--max_train_steps", steps, "--num_images_per_prompt", "1", "--output_dir", "demo")
    models = json.loads((folder / "empty/demo/results.json").read_text(encoding="utf-8"))["models"]
    if set(models) != {"plain", "guarded"} or not (folder / "empty/demo/audit/report.html").is_file():
        raise SystemExit(f"the demo's results are those of {sorted(models)}")
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "sd-memguard")
    if Path(place).parent.exists() or Path(program).exists():
        raise SystemExit(f"uninstalling left {place} or {program}")


if __name__ == "__main__":
    main()

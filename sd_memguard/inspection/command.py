"""`sd-memguard inspect`: what a run did, in words and images, from what it has written down; no model is loaded."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_memguard.errors import UserError
from sd_memguard.inspection.contact_sheet import contact_sheet, image_folder, image_loader
from sd_memguard.inspection.plots import NothingToPlotError, bank_figure, fractions_figure, gap_figure, moves_figure
from sd_memguard.inspection.summary import format_summary, memory_prone_rows, no_actions, ranking_sentences
from sd_memguard.runs.folder import FOLDER, RunFolder, read_run

IMAGES_FOLDER = "inspect"
CONTACT_SHEET = "contact_sheet.png"
PLOTS = {
    "bank.png": bank_figure,
    "fractions.png": fractions_figure,
    "heldout_gap.png": gap_figure,
    "moves.png": moves_figure,
}
MIN_WIDTH, FALLBACK_WIDTH, MAX_WIDTH = 80, 120, 200


@dataclass(frozen=True)
class InspectSettings:
    """What the command line asks for.

    Attributes:
        run: the run folder.
        output_dir: where the images go.
        num_images: how many memory-prone images are shown.
        train_data_dir: where the training images are, None: where the run found them.
    """

    run: Path
    output_dir: Path
    num_images: int
    train_data_dir: str | None


def main(argv: Sequence[str] | None = None) -> None:
    """Print the summary of a run and plot its records.

    Args:
        argv: arguments; by default those of the command line.

    Raises:
        UserError: the folder holds no run, or a folder cannot be read or written.
    """
    settings = parse_arguments(argv)
    run = read_run(settings.run)
    folder = image_folder(run, settings.train_data_dir)
    _print(format_summary(run, settings.num_images, _terminal_width()))
    written, missing = write_images(run, folder, settings)
    if written:
        _print(f"\nWrote to {settings.output_dir}: {', '.join(written)}")
    for reason in missing:
        _print(f"Not written: {reason}")


def parse_arguments(argv: Sequence[str] | None) -> InspectSettings:
    """Return the settings; ends the program with a message where an argument is unknown or out of range."""
    parser = argparse.ArgumentParser(prog="sd-memguard inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder: `--output_dir` of the training")
    parser.add_argument("--output_dir", type=Path, help="where the images go; RUN/memguard/inspect if not given")
    parser.add_argument(
        "--num_images", type=_count, default=20, help="how many memory-prone images to show (default: 20)"
    )
    parser.add_argument("--train_data_dir", help="where the training images are now, if the run found them elsewhere")
    given = parser.parse_args(argv)
    output_dir = given.output_dir or given.run / FOLDER / IMAGES_FOLDER
    return InspectSettings(given.run, output_dir, given.num_images, given.train_data_dir)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return int(text)


def write_images(run: RunFolder, folder: Path | None, settings: InspectSettings) -> tuple[list[str], list[str]]:
    """Write the contact sheet and the plots, and return what was written and why something was not.

    Raises:
        UserError: the output folder cannot be written.
    """
    written, missing = [], []
    try:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        rows = memory_prone_rows(run, settings.num_images)
        if rows:
            load = None if folder is None else image_loader(folder)
            sheet = contact_sheet(rows, load, ranking_sentences(run, len(rows)))
            sheet.save(settings.output_dir / CONTACT_SHEET, optimize=True)
            written.append(CONTACT_SHEET)
            missing += [] if folder else [f"the training images, {_where_they_were(run)}"]
        else:
            why = "no round has ended yet" if run.samples is None else no_actions(run)
            missing.append(f"{CONTACT_SHEET}, since {why}")
        for name, make in PLOTS.items():
            try:
                make(run).savefig(settings.output_dir / name)
                written.append(name)
            except NothingToPlotError as reason:
                missing.append(str(reason))
    except OSError as error:
        raise UserError(f"`--output_dir` {settings.output_dir} cannot be written: {error.strerror}") from error
    return written, missing


def _where_they_were(run: RunFolder) -> str:
    dataset = run.config.get("dataset_name")
    folder = run.config.get("train_data_dir") or "any folder that the run knows"
    where = f"which are in the dataset {dataset}" if dataset else f"not found in {folder}"
    return f"{where}; `--train_data_dir DIR` names the folder that holds them"


def _terminal_width() -> int:
    columns = shutil.get_terminal_size((FALLBACK_WIDTH, 24)).columns
    return min(max(columns, MIN_WIDTH), MAX_WIDTH)


def _print(text: str) -> None:
    """Print; letters that the terminal cannot show become escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))

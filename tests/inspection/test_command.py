"""The command as a whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd_memguard import cli
from sd_memguard.inspection.command import main

ROOT = Path(__file__).parents[2]
ALL = ["bank.png", "contact_sheet.png", "fractions.png", "heldout_gap.png", "moves.png"]


@pytest.fixture
def copied(finished_run, tmp_path):
    """Return a copy of the run folder."""
    return Path(shutil.copytree(finished_run.output_dir, tmp_path / "copy"))


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_run(copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    main([str(copied), "--num_images", "3"])
    assert written(copied / "memguard/inspect") == ALL
    for name in ALL:
        with Image.open(copied / "memguard/inspect" / name) as image:
            image.load()
            assert min(image.size) > 400
    assert all(path.read_bytes() == content for path, content in before.items())
    text = capsys.readouterr().out
    assert "contact_sheet.png, bank.png, fractions.png, heldout_gap.png, moves.png" in text
    assert "Not written" not in text
    assert "\x1b" not in text


def test_what_cannot_be_drawn_is_said(copied, capsys, tmp_path):
    (copied / "memguard/banks.safetensors").unlink()
    config = copied / "memguard/config.json"
    config.write_text(config.read_text().replace("square", "moved away"))
    main([str(copied), "--output_dir", str(tmp_path / "out")])
    assert written(tmp_path / "out") == [name for name in ALL if name != "bank.png"]
    assert not (copied / "memguard/inspect").exists()
    text = " ".join(capsys.readouterr().out.split())
    assert "made before banks were kept there; the rest is shown" in text
    assert "Not written: bank.png" in text
    assert "Not written: the training images, not found in" in text


def test_a_run_before_its_first_round(copied, capsys):
    for name in ("rounds.jsonl", "samples.parquet", "banks.safetensors", "summary.json"):
        (copied / "memguard" / name).unlink()
    main([str(copied)])
    assert written(copied / "memguard/inspect") == []
    assert capsys.readouterr().out.count("Not written") == 5


def test_no_run_and_bad_arguments(tmp_path, capsys, copied):
    for arguments, words in (
        ([str(tmp_path)], "is no run folder"),
        ([str(copied), "--train_data_dir", str(tmp_path / "no")], "--train_data_dir"),
        ([str(copied), "--output_dir", str(copied / "model_index.json")], "cannot be written"),
        ([str(copied), "--num_images", "0"], "1 or more"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["inspect", *arguments])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
    assert not (copied / "memguard/inspect").exists()


@pytest.mark.slow
def test_a_pipe_that_knows_ascii_alone_and_no_model_library(copied):
    config = copied / "memguard/config.json"
    config.write_text(config.read_text().replace('"resolution": 32', '"resolution": "32 \N{MULTIPLICATION SIGN} 32"'))
    program = (
        "import sys\n"
        "from sd_memguard.cli import main\n"
        f"main(['inspect', {str(copied)!r}])\n"
        "print({'diffusers', 'accelerate', 'peft'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "90"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="ascii"
    )
    assert done.returncode == 0, done.stderr
    assert "at 32 \\xd7 32 px" in " ".join(done.stdout.split())  # a long path wraps the line
    assert done.stdout.endswith("\nset()\n")

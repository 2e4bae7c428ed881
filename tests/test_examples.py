"""The examples run as they are printed."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from sd_memguard.flags import parse_train_args
from sd_memguard.launcher.arguments import parse_command

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop_skips_samples_and_stays_short(capsys):
    example = EXAMPLES / "plug_into_your_loop.py"
    guard = runpy.run_path(str(example))["train"](steps=25, num_pictures=32)

    assert int(guard.ledger.seen.sum()) == 25 * 16
    assert 0 < int(guard.ledger.skipped.sum()) < 25 * 16
    assert int(guard.ledger.augmented.sum()) == 0
    assert [row["kind"] for row in guard.attachment.rounds.history] == ["redistribute", "average"]
    assert "step   20: loss" in capsys.readouterr().out
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80


def test_accelerate_loop_resumes_and_gains_ten_lines_at_most(tmp_path, monkeypatch, capsys):
    example = EXAMPLES / "accelerate_loop.py"
    main = runpy.run_path(str(example))["main"]
    sizes = ["--max_train_steps", "8", "--max_train_samples", "32", "--checkpointing_steps", "5"]

    def run(name: str, *flags: str) -> bytes:
        monkeypatch.setattr(sys, "argv", ["loop", "--output_dir", str(tmp_path / name), *sizes, *flags])
        main()
        return (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    whole = run("whole")
    assert run("resumed", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-5")) == whole
    assert "visits were skipped" in capsys.readouterr().out
    assert 5 <= example.read_text(encoding="utf-8").count("# +") <= 10


def test_the_launcher_script_gives_flags_that_parse(tmp_path):
    text = (EXAMPLES / "sdxl_lora_with_run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    words = re.search(r"-m sd_memguard\.run (.*)$", text, re.MULTILINE)[1].split()
    script = tmp_path / "train_text_to_image_lora_sdxl.py"
    script.touch()

    command = parse_command([str(script) if word.endswith('.py"') else word for word in words])

    assert command.guard.num_shards == 4
    assert "--gradient_checkpointing" in command.arguments


@pytest.mark.parametrize("script", ["finetune_bundled.sh", "finetune_sd15.sh", "lora_style.sh"])
def test_scripts_give_flags_that_parse(script):
    text = (EXAMPLES / script).read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"^(?:sd-memguard train|accelerate launch .* sd_memguard/train\.py) (.*)$", text, re.MULTILINE)
    arguments = command[1].replace('"$@"', "").replace('"$pictures"', "pictures").replace('"$output"', "run").split()

    config = parse_train_args(arguments)

    assert config.memguard == "on"
    assert config.center_crop

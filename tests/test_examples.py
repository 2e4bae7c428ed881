"""The examples run as they are printed."""

import re
import runpy
from pathlib import Path

import pytest

from sd_memguard.flags import parse_train_args

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop_skips_samples_and_stays_short(capsys):
    example = EXAMPLES / "plug_into_your_loop.py"
    guard = runpy.run_path(str(example))["train"](steps=25, num_pictures=32)

    assert int(guard.ledger.seen.sum()) == 25 * 16
    assert 0 < int(guard.ledger.skipped.sum()) < 25 * 16
    assert int(guard.ledger.augmented.sum()) == 0
    assert "step   20: loss" in capsys.readouterr().out
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("script", ["finetune_bundled.sh", "finetune_sd15.sh"])
def test_scripts_give_flags_that_parse(script):
    text = (EXAMPLES / script).read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"^(?:sd-memguard train|accelerate launch .* sd_memguard/train\.py) (.*)$", text, re.MULTILINE)
    arguments = command[1].replace('"$@"', "").replace('"$pictures"', "pictures").replace('"$output"', "run").split()

    config = parse_train_args(arguments)

    assert config.memguard == "on"
    assert config.center_crop

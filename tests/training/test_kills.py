"""Runs that are killed at random moments and resumed end with the bytes of runs that were not."""

import os
import random

import pytest

from benchmarks.kill_test import MODES, NUM_PROCESSES, SETTINGS, survive

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of this process")]


@pytest.mark.parametrize("mode", ["full", "disk", "lora", "processes"])
def test_killed_runs_end_as_others_do(mode, pipeline, images, tmp_path):
    settings = SETTINGS | MODES[mode] | {"pretrained_model_name_or_path": str(pipeline), "train_data_dir": str(images)}
    settings |= {"resolution": 32, "max_train_samples": None, "center_crop": False, "lr_warmup_steps": 0}
    outcome = survive(settings, tmp_path, 3, random.Random(1), NUM_PROCESSES.get(mode, 1))
    assert outcome["kills"] == 3
    assert all(outcome["identical"].values())

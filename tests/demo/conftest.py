import shutil
from functools import partial

import pytest

from sd_memguard.assets import tiny_sd_path
from sd_memguard.audit import attribute_probe
from sd_memguard.audit.metrics import attributes
from sd_memguard.demo import command as demo


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The demonstration with the bundled model itself in place of both fine-tunes, few prompts and two steps."""

    def fine_tune(model, settings):
        shutil.copytree(tiny_sd_path(), settings.folder / model)
        return demo.Training(heldout_loss=0.08, train_loss=0.07, seconds=1.0)

    monkeypatch.setattr(demo, "fine_tune", fine_tune)
    monkeypatch.setattr(demo, "NUM_PROMPTS", 3)
    monkeypatch.setattr(demo, "NUM_PROBES", 4)
    monkeypatch.setattr(demo, "NUM_INFERENCE_STEPS", 2)
    quickly = partial(attributes.train_classifier, num_steps=3)
    monkeypatch.setattr(attribute_probe, "train_classifier", quickly)
    monkeypatch.setattr(attribute_probe, "user_cache_folder", lambda: tmp_path / "cache")
